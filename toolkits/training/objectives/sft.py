"""Supervised fine-tuning: cross entropy of the trained tokens, summed.

An objective is a module with `forward_step`. It returns the model's output and a function from that to
(summed loss, number of trained tokens, figures); the step divides the sums of the whole global batch.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..batches import MicroBatch

LossResult = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def forward_step(
    batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossResult]]:
    """Run the next micro batch through `model`; the output is the loss [1, t] of each position."""
    batch = next(batches)
    packed = batch.packed
    packed.cu_seqlens_q, packed.cu_seqlens_kv = packed.cu_seqlens_q.cuda(), packed.cu_seqlens_kv.cuda()
    output = model(
        batch.tokens.cuda(), batch.positions.cuda(), None, labels=batch.labels.cuda(), packed_seq_params=packed
    )
    return output, partial(summed_loss, loss_mask=batch.loss_mask.cuda())


def summed_loss(losses: torch.Tensor, *, loss_mask: torch.Tensor) -> LossResult:
    """Return the sum of `losses` [1, t] where `loss_mask` [1, t] is 1, and how many those are."""
    total = (losses.float() * loss_mask).sum()
    trained = loss_mask.sum().to(torch.int)
    # Cloned: the schedule may divide the loss in place.
    return total, trained, {"loss": total.detach().clone(), "trained_tokens": trained.clone()}
