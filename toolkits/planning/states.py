"""Bytes of weights, gradients and optimizer state of one rank, as megatron-core 0.16.1 allocates them.

Full tuning in bf16 or fp16 takes 18 bytes a parameter: the weight 2, its gradient in fp32 4, and of AdamW the fp32
weight 4 and two fp32 moments 8. The distributed optimizer divides the last 12 by the data-parallel ranks:
6 + 12/DP. In fp32 the weight is its own fp32 copy: 16, or 8 + 8/DP.

The distributed optimizer's buffers are padded (megatron/core/distributed/param_and_grad_buffer.py): a weight
starts at a multiple of 64 elements, a bucket ends at one of lcm(DP, 128). Gradients are not reduced while the
backward pass still runs, so all weights are one bucket; only a tied embedding of a pipeline has its own.
Adam's step counter, 4 bytes a weight, is not counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .weights import Tuning, Weight

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes
GRADIENT = MASTER = 4
MOMENTS = 8
WEIGHT_START, BUCKET_END = 64, 128  # elements
# NF4 with double quantisation (Dettmers et al., 2023): 4 bits, an 8-bit scale for 64 weights, and an fp32
# scale for 256 of those.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class States:
    """Bytes that stay allocated for the whole run; `updated` is the number of parameters this rank's AdamW steps."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    updated: int

    @property
    def optimizer(self) -> int:
        return self.masters + self.moments

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Bucket:
    """A piece of the gradient buffer that is reduced at once: element ranges of the buffer, weight by weight."""

    start: int
    end: int
    weights: tuple[tuple[int, int], ...]

    def owned(self, replica: int, replicas: int) -> int:
        """Return the elements of weights in the share of data-parallel rank `replica`; padding is none of them."""
        share = (self.end - self.start) // replicas
        first = self.start + replica * share
        return sum(max(0, min(end, first + share) - max(start, first)) for start, end in self.weights)


def states(
    weights: Sequence[Weight],
    tuning: Tuning,
    *,
    precision: str,
    replicas: int,
    replica: int = 0,
    distributed: bool = True,
) -> States:
    """Return the bytes of a rank that holds `weights` and is data-parallel rank `replica` of `replicas`."""
    element = ELEMENT[precision]
    frozen, trained = 0.0, list(weights)
    if tuning.method != "full":
        stored = NF4_BYTES if tuning.method == "qlora" else element
        frozen = sum(weight.count * (stored if weight.linear else element) for weight in weights)
        trained = [Weight(f"{weight.name}.adapter", weight.adapter * tuning.lora_rank) for weight in weights]
    if distributed:
        pieces = buckets(trained, replicas)
        buffer, updated = pieces[-1].end, sum(piece.owned(replica, replicas) for piece in pieces)
    else:
        buffer = updated = sum(weight.count for weight in trained)
    return States(
        parameters=math.ceil(frozen) + buffer * element,
        gradients=buffer * GRADIENT,
        masters=updated * MASTER if element < MASTER else 0,
        moments=updated * MOMENTS,
        updated=updated,
    )


def buckets(weights: Sequence[Weight], replicas: int) -> list[Bucket]:
    """Lay `weights` into the distributed optimizer's buffer, last weight first."""
    divisor = math.lcm(replicas, BUCKET_END)
    found: list[Bucket] = []
    inside: list[tuple[int, int]] = []
    start = position = 0

    def close(end: int) -> int:
        nonlocal start, inside
        end = _up(end, divisor)
        found.append(Bucket(start, end, tuple(inside)))
        start, inside = end, []
        return end

    for weight in reversed(weights):
        position = _up(position, WEIGHT_START)
        if weight.shared and inside:
            position = close(position)
        inside.append((position, position + weight.count))
        position += weight.count
        if weight.shared:
            position = close(position)
    if inside:
        close(position)
    return found


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
