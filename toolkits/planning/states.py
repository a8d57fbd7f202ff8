"""Bytes of weights, gradients and optimizer state of one rank, as megatron-core 0.16.1 allocates them.

Full tuning in bf16 or fp16 takes 18 bytes a parameter: the weight 2, its gradient in fp32 4, and of AdamW the fp32
weight 4 and two fp32 moments 8. The distributed optimizer divides the last 12 by the data-parallel ranks:
6 + 12/DP. In fp32 the weight is its own fp32 copy: 16, or 8 + 8/DP.

The distributed optimizer's buffers, one for each chunk of the model on a rank, are padded
(megatron/core/distributed/param_and_grad_buffer.py): a weight starts at a multiple of 64 elements, a bucket ends at
one of lcm(DP x CP, 128). On the first pipeline stage a bucket ends too when it has GRADIENT_BUCKET elements; a tied
embedding of a pipeline has its own. Adam's step counter, 4 bytes a weight, is not counted, nor that a router's bias is
in fp32 from the first pass on.

Experts that ranks share (EP > 1) lie in buffers of their own, divided by the ranks that hold the same ones:
DP x CP x TP / (EP x ETP). At EP = 1 they lie among the other weights.

Offloaded state lies in CPU memory: the fp32 weight and the moments, and beside them there the fp32 gradient.
megatron-core moves whole weights until the share is reached; here it is the share itself, so that a GPU may have less
than is said, and the CPU more, by at most the rank's largest weight.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..training.config import TrainConfig
from ..training.layout import GRADIENT_BUCKET, Layout
from .weights import Tuning, Weight, expert_ranks

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2}  # bytes; fp8 is for matrices while they are multiplied
GRADIENT = MASTER = 4
MOMENTS = 8
ON_HOST = MASTER + MOMENTS + GRADIENT
WEIGHT_START, BUCKET_END = 64, 128  # elements


@dataclass(frozen=True)
class Share:
    """Which of the `of` ranks with the same weights a rank is: the distributed optimizer divides its state by them."""

    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class Storage:
    """How a rank stores what it trains.

    `experts` is its share of experts that ranks share, None: they lie among the other weights. `bucket` is the number
    of elements that end a bucket of the rank's first chunk; None: nothing does. `offload` is the share of the
    optimizer's state in CPU memory.
    """

    element: int
    share: Share = Share()
    experts: Share | None = None
    distributed: bool = True
    bucket: int | None = None
    offload: float = 0.0


def storage_of(config: TrainConfig, layout: Layout, *, rank: int, offload: float = 0.0) -> Storage:
    """Return how `rank` stores its states; only the first pipeline stage has several buckets.

    megatron-core counts ranks along TP, then CP and DP, then PP; for experts along ETP, EP, what remains, PP.
    """
    ranks = layout.world // layout.pipeline
    stage, place = divmod(rank, ranks)
    one_expert_parallel = layout.expert * expert_ranks(layout)
    return Storage(
        element=ELEMENT[config.compute.precision],
        share=Share(place // layout.tensor, ranks // layout.tensor),
        experts=Share(place // one_expert_parallel, ranks // one_expert_parallel) if layout.expert > 1 else None,
        distributed=config.layout.distributed_optimizer,
        bucket=None if stage else GRADIENT_BUCKET,
        offload=offload,
    )


@dataclass(frozen=True)
class States:
    """Bytes that stay allocated for the whole run, and `host`, those that do so in CPU memory."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    host: int = 0

    @property
    def optimizer(self) -> int:
        return self.masters + self.moments

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Bucket:
    """A piece of the gradient buffer that is reduced at once, and the ranges of it in which weights lie."""

    start: int
    end: int
    weights: tuple[tuple[int, int], ...]

    def owned(self, replica: int, replicas: int) -> int:
        """Return the elements of weights in the share of data-parallel rank `replica`; padding is none of them."""
        share = (self.end - self.start) // replicas
        first = self.start + replica * share
        return sum(max(0, min(end, first + share) - max(start, first)) for start, end in self.weights)


def states(chunks: Sequence[Sequence[Weight]], tuning: Tuning, storage: Storage, *, registered: int = 0) -> States:
    """Return the bytes of a rank that holds `chunks`, and beside them `registered` elements that nobody trains."""
    element = storage.element
    frozen, trained = 0, chunks
    if tuning.method != "full":
        frozen = sum(each.frozen_bytes(tuning, element) for weights in chunks for each in weights)
        trained = [[one for each in weights for one in each.trained(tuning)] for weights in chunks]
    buffer = updated = 0
    for number, weights in enumerate(trained):
        for share, together in _buffers(weights, storage):
            whole, own = _lengths(together, storage, share=share, bucket=None if number else storage.bucket)
            buffer, updated = buffer + whole, updated + own
    away = math.floor(updated * storage.offload)
    return States(
        parameters=frozen + (buffer + registered) * element,
        gradients=buffer * GRADIENT,
        masters=(updated - away) * MASTER if element < MASTER else 0,
        moments=(updated - away) * MOMENTS,
        host=away * ON_HOST,
    )


def _buffers(weights: Sequence[Weight], storage: Storage) -> Iterator[tuple[Share, Sequence[Weight]]]:
    """Yield what lies in a buffer of its own, and who divides it."""
    if storage.experts is None:
        yield storage.share, weights
        return
    yield storage.share, [each for each in weights if not each.expert]
    yield storage.experts, [each for each in weights if each.expert]


def _lengths(weights: Sequence[Weight], storage: Storage, *, share: Share, bucket: int | None) -> tuple[int, int]:
    """Return the elements of a buffer, and of the weights in it that this rank updates."""
    if not storage.distributed:
        count = sum(each.count for each in weights)
        return count, count
    laid = list(buckets(weights, share.of, bucket))
    return laid[-1].end if laid else 0, sum(piece.owned(share.number, share.of) for piece in laid)


def buckets(weights: Iterable[Weight], shards: int, elements: int | None = None) -> Iterator[Bucket]:
    """Lay `weights` of one chunk into the distributed optimizer's buffer, last weight first.

    A bucket ends when it has `elements`; None: it does not for that.
    """
    divisor = math.lcm(shards, BUCKET_END)
    inside: list[tuple[int, int]] = []
    start = position = 0
    for weight in reversed(list(weights)):
        position = _up(position, WEIGHT_START)
        if weight.shared and inside:
            yield Bucket(start, end := _up(position, divisor), tuple(inside))
            start, position, inside = end, end, []
        if inside and inside[-1][1] == position:
            inside[-1] = (inside[-1][0], position + weight.count)
        else:
            inside.append((position, position + weight.count))
        position += weight.count
        if weight.shared or (elements is not None and position - start >= elements):
            yield Bucket(start, end := _up(position, divisor), tuple(inside))
            start, position, inside = end, end, []
    if inside:
        yield Bucket(start, _up(position, divisor), tuple(inside))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
