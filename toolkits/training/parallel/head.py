"""The output layer and the cross entropy as one operation, which never holds the logits of all tokens.

The logits are the largest tensor of a training step: 152,000 numbers a token. Here they exist for a part of the
tokens at a time, and are computed again in the backward pass: two more FLOPs a token and weight of the layer,
against writing and reading the fp32 logits several times. megatron-core's own fused cross entropy holds them all,
and rounds their gradient to bf16 in every number format.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from ..layout import LOSS_TOKENS
from .fused import fused

AHEAD = 2.0**8  # factor of a gradient that is taken before its token's is known: fp16 ends at 6e-8


class LossHead(ColumnParallelLinear):
    """megatron-core's output layer, which also goes straight to the loss."""

    def forward(  # type: ignore[override]
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: torch.Tensor | None = None,
        vocab_size: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ColumnParallelLinear's logits and bias; with `labels` [b, s] their cross entropy fp32 [b, s], None.

        `input_` is [s, b, h], or this rank's part of it with sequence parallelism. Rows of the weight from
        `vocab_size` on only pad it, so that TP divides it: they take no part in the softmax.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)  # type: ignore[no-any-return]
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        first = self.tp_group.rank() * len(weight)
        share = (first, max(0, min(len(weight), vocab_size - first)), self.tp_group)
        losses = LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, labels.t().flatten(), *share)
        return losses.view(labels.shape[::-1]).t(), None


class LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(hidden weight^T)[label] of every token, in fp32, with the vocabulary divided over TP.

    Takes hidden [t, h], weight [rows, h] and labels [t]; the weight's row 0 belongs to token id `first`, and its
    first `real` rows count. Returns fp32 [t], the same on all ranks of `group`. The gradient of `hidden` is this
    rank's part of the sum.

    With a frozen weight each token's gradient is known up to its factor while the logits are there: it is taken in
    the forward pass, and no logits are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        first: int,
        real: int,
        group: torch.distributed.ProcessGroup,
    ) -> torch.Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        of_hidden = torch.zeros_like(hidden) if needs_hidden and not needs_weight else None
        log_total, chosen = (torch.empty_like(labels, dtype=torch.float32) for _ in range(2))
        rows = weight[:real]
        for part in parts(len(labels)):
            logits, places = hidden[part] @ rows.t(), labels[part] - first
            log_total[part], chosen[part] = _over_ranks(logits, places, group)
            if of_hidden is not None and real:
                factor = torch.full_like(log_total[part], AHEAD)
                torch.mm(logits_gradient(logits, places, log_total[part], factor), rows, out=of_hidden[part])
        if of_hidden is not None:
            ctx.save_for_backward(of_hidden)
        else:
            ctx.save_for_backward(hidden, weight, labels, log_total)
        ctx.first, ctx.real = first, real
        return log_total - chosen

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if not needs_weight:
            (of_hidden,) = ctx.saved_tensors
            return scaled(of_hidden, grad / AHEAD), None, None, None, None, None
        hidden, weight, labels, log_total = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Summed over parts in fp32: a bf16 sum would lose more than the parts do.
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        rows = weight[: ctx.real]
        for part in parts(len(labels)) if ctx.real else ():
            logits = hidden[part] @ rows.t()
            of_logits = logits_gradient(logits, labels[part] - ctx.first, log_total[part], grad[part])
            if of_hidden is not None:
                torch.mm(of_logits, rows, out=of_hidden[part])
            of_weight[: ctx.real] += of_logits.t() @ hidden[part]
        return of_hidden, of_weight.to(weight.dtype), None, None, None, None


def _over_ranks(
    logits: torch.Tensor, places: torch.Tensor, group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log of the sum of exp(logit) and the label's logit, of this rank's logits and those of the others."""
    if logits.shape[-1]:
        largest, total, chosen = statistics(logits, places)
    else:  # all of this rank's rows are padding
        largest = torch.full_like(places, -math.inf, dtype=torch.float32)
        total, chosen = torch.zeros_like(largest), torch.zeros_like(largest)
    if group.size() > 1:
        mine = largest.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        sums = torch.stack([total * (mine - largest).exp(), chosen])
        torch.distributed.all_reduce(sums, group=group)
        total, chosen = sums
    return total.log() + largest, chosen


def parts(tokens: int) -> Iterator[slice]:
    """Divide `tokens` into parts of at most LOSS_TOKENS, as equal as can be."""
    count = -(-tokens // LOSS_TOKENS)
    size = -(-tokens // count)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


@fused
def statistics(logits: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, of logits [t, v] in fp32: the largest [t], the sum of exp(logit - largest), and the label's logit.

    `places` [t] are the labels' columns; one that another rank holds is outside 0..v, and its logit counts 0 here.
    """
    wide = logits.float()
    largest = wide.amax(-1)
    total = (wide - largest.unsqueeze(-1)).exp().sum(-1)
    here = (places >= 0) & (places < logits.shape[-1])
    chosen = wide.gather(-1, torch.where(here, places, 0).unsqueeze(-1)).squeeze(-1)
    return largest, total, torch.where(here, chosen, 0.0)


@fused
def logits_gradient(
    logits: torch.Tensor, places: torch.Tensor, log_total: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """Return (softmax(logits) - one_hot(places)) * grad, [t, v] in the logits' number format; the rest is [t]."""
    softmax = (logits.float() - log_total.unsqueeze(-1)).exp()
    columns = torch.arange(logits.shape[-1], device=logits.device)
    one_hot = columns == places.unsqueeze(-1)
    return ((softmax - one_hot.float()) * grad.unsqueeze(-1)).to(logits.dtype)


@fused
def scaled(gradient: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return gradient [t, h] times the fp32 factors [t] of its rows, in its own number format."""
    return (gradient * factors.unsqueeze(-1)).to(gradient.dtype)
