"""One pass of a rank over the micro batches of a global batch, through megatron-core's schedule."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, tee
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from .batches import MicroBatch
from .layout import Layout

LossFunction = Callable[..., Any]


@dataclass(frozen=True)
class Pass:
    """How micro batches run: through this rank's `chunks` of the model."""

    chunks: Sequence[DistributedDataParallel]
    layout: Layout

    def run(self, loss: LossFunction, batches: Iterable[MicroBatch], *, forward_only: bool) -> list[dict[str, Any]]:
        """Run this rank's shares of one global batch, all of one length, forward only or backward too.

        Returns what `loss` said beside of each micro batch; of a rank without the output, nothing.
        """
        count, batches = len(self.chunks), iter(batches)
        first = next(batches)
        batches = chain([first], batches)
        results: list[dict[str, Any]] = get_forward_backward_func()(
            forward_step_func=partial(forward_step, loss),
            data_iterator=list(tee(batches, count)) if count > 1 else batches,
            model=list(self.chunks),
            num_microbatches=self.layout.micro_batches,
            # Packed rows lie end to end: one long row in the eyes of megatron-core.
            seq_length=first.tokens.shape[1] * self.layout.context,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return results

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let the model be as it is used, without dropout and gradients, while the block runs."""
        trained = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            yield
        for chunk, was in zip(self.chunks, trained, strict=True):
            chunk.train(was)


def forward_step(
    loss: LossFunction, batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Run the next micro batch through `model`; return its output and the function that makes the loss of it."""
    batch = next(batches).cuda()
    output = model(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)
    return output, partial(loss, batch=batch)
