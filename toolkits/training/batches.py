"""From a dataset on disk to the micro batches of one rank.

    dataset -> samples that fit SEQ_LEN -> rows of whole conversations -> an order -> micro batches

The order is a pure function of (seed, epoch, index): which rows a step trains on does not depend on the
parallel layout, and a run can go on at any step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from data_preprocessing.dataset import Dataset
from data_preprocessing.packing import one_per_row, pack

from ..foundation.errors import DataError
from .config import BatchSettings, DataSettings
from .layout import Layout

HELD_OUT = 0.01  # part of the training data that validates when there is no validation set
T = TypeVar("T")
PAD_TOKEN = 0  # never trained on and never seen by a conversation, so any id does


@dataclass(frozen=True)
class Sample:
    """A conversation of the dataset, cut to `length` tokens."""

    index: int
    length: int


@dataclass(frozen=True)
class Rows:
    """Rows of at most `seq_len` tokens, each a tuple of whole conversations of `dataset`."""

    dataset: Dataset
    rows: Sequence[tuple[Sample, ...]]
    seq_len: int

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end, in megatron-core's packed format.

    tokens, labels and positions are int64 [1, t], loss_mask fp32 [1, t]: 1 where the label is trained on.
    Labels are shifted already: position i predicts labels[i].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    packed: PackedSeqParams

    def cuda(self) -> "MicroBatch":
        """Return the batch with all its tensors on the GPU."""
        return replace(_on_gpu(self), packed=_on_gpu(self.packed))


def fitting_samples(dataset: Dataset, settings: DataSettings) -> tuple[list[Sample], list[str]]:
    """Return the conversations that can be trained on, cut to fit, and a sentence for each thing left out.

    Raises DataError when nothing is left, or when `too_long` is `stop` and something is too long.
    """
    samples, remarks = _fitting(dataset, settings)
    if not samples:
        raise DataError(f"{dataset.path}: no conversation with a trained token fits --seq-len {settings.seq_len}")
    return samples, remarks


def make_rows(dataset: Dataset, samples: Sequence[Sample], settings: DataSettings) -> Rows:
    """Return rows of whole conversations: packed, or one a row."""
    fill = pack if settings.packing else one_per_row
    lengths = np.array([sample.length for sample in samples])
    rows = [tuple(samples[i] for i in members) for members in fill(lengths, settings.seq_len)]
    return Rows(dataset, rows, settings.seq_len)


def hold_out(samples: Sequence[Sample], *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out 1% of the conversations, one at least; return (training, validation), each in order.

    Raises DataError when there are fewer than two.
    """
    if len(samples) < 2:
        raise DataError(f"{len(samples)} conversation that fits is too few to hold one out for validation")
    held_out = max(1, round(len(samples) * HELD_OUT))
    order = np.random.default_rng([seed, len(samples)]).permutation(len(samples))
    return [samples[i] for i in sorted(order[held_out:])], [samples[i] for i in sorted(order[:held_out])]


class Batches:
    """The micro batches of one data-parallel rank, step after step."""

    def __init__(self, rows: Rows, batch: BatchSettings, layout: Layout, *, replica: int, seed: int) -> None:
        self.rows, self.batch, self.layout, self.replica, self.seed = rows, batch, layout, replica, seed
        self._orders: dict[int, np.ndarray] = {}

    def row_numbers(self, consumed: int) -> list[int]:
        """Return the rows of the next global batch, over all ranks, when the run has consumed `consumed` rows."""
        count = len(self.rows)
        places = range(consumed, consumed + self.batch.global_batch_size)
        return [int(self._order(place // count)[place % count]) for place in places]

    def evaluation(self) -> Iterator[Iterator[MicroBatch]]:
        """Yield every row once in global batches; empty rows fill the last one, so that ranks stay in step."""
        size = self.batch.global_batch_size
        for start in range(0, len(self.rows), size):
            numbers = range(start, start + size)
            yield self.micro_batches([number if number < len(self.rows) else None for number in numbers])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {last: order for last, order in self._orders.items() if last == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self._orders[epoch]

    def micro_batches(self, numbers: Sequence[int | None]) -> Iterator[MicroBatch]:
        """Yield this rank's micro batches of the rows `numbers`; None is an empty row."""
        micro, replicas = self.batch.micro_batch_size, self.layout.data
        for start in range(self.replica * micro, len(numbers), micro * replicas):
            chosen = [() if n is None else self.rows.rows[n] for n in numbers[start : start + micro]]
            yield micro_batch(self.rows.dataset, chosen, row_length(self.rows.seq_len, self.layout))


def row_length(seq_len: int, layout: Layout) -> int:
    """Return the tokens a row takes: sequence parallelism needs a multiple of TP."""
    return -(-seq_len // layout.tensor) * layout.tensor


def micro_batch(dataset: Dataset, rows: Sequence[Sequence[Sample]], length: int) -> MicroBatch:
    """Lay `rows` end to end, each padded to `length`; the padding is a sequence of its own."""
    tokens = np.full(len(rows) * length, PAD_TOKEN, dtype=np.int64)
    labels, positions = tokens.copy(), np.zeros_like(tokens)
    mask = np.zeros(len(tokens), dtype=np.float32)
    ends = []
    for number, row in enumerate(rows):
        at = number * length
        for sample in row:
            span = slice(at, at + sample.length)
            tokens[span] = dataset.tokens(sample.index)[: sample.length]
            labels[at : span.stop - 1] = tokens[at + 1 : span.stop]
            mask[at : span.stop - 1] = dataset.mask(sample.index)[1 : sample.length]
            positions[span] = np.arange(sample.length)
            ends.append(at := span.stop)
        if at < (number + 1) * length:
            ends.append((number + 1) * length)
    lengths = np.diff([0, *ends])
    packed = packed_params(ends, longest=int(lengths.max()))
    tensors = [torch.from_numpy(array).unsqueeze(0) for array in (tokens, labels, mask, positions)]
    return MicroBatch(*tensors, packed=packed)  # type: ignore[misc]


def _on_gpu(value: T) -> T:
    """Return a dataclass with its tensors on the GPU; the copies do not wait for one another."""
    tensors = {field.name: getattr(value, field.name) for field in fields(value)}  # type: ignore[arg-type]
    moved = {name: tensor.cuda(non_blocking=True) for name, tensor in tensors.items() if torch.is_tensor(tensor)}
    return replace(value, **moved)  # type: ignore[type-var]


def packed_params(ends: Sequence[int], *, longest: int) -> PackedSeqParams:
    """Describe sequences that end at `ends`; `longest` must be exact, or positions run on along the row."""
    cumulative = torch.tensor([0, *ends], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _fitting(dataset: Dataset, settings: DataSettings) -> tuple[list[Sample], list[str]]:
    lengths = np.asarray(dataset.lengths)
    long = lengths > settings.seq_len
    if settings.too_long == "stop" and long.any():
        worst = int(lengths.argmax())
        raise DataError(
            f"{dataset.path}: {long.sum():,} of {len(lengths):,} conversations are longer than --seq-len "
            f"{settings.seq_len}, the longest {lengths.max():,} tokens (row {worst}); raise SEQ_LEN, or cut them "
            "with --too-long truncate, or leave them out with --too-long drop"
        )
    samples, dropped, untrained = [], 0, 0
    for index, (length, is_long) in enumerate(zip(lengths.tolist(), long.tolist(), strict=True)):
        mask = dataset.mask(index)
        if is_long:
            length = _last_turn_end(mask, settings.seq_len) if settings.too_long == "truncate" else 0
        if length == 0:
            dropped += 1
        elif not mask[1:length].any():
            untrained += 1
        else:
            samples.append(Sample(index, length))
    return samples, _remarks(dataset, int(long.sum()) - dropped, dropped, untrained, settings.seq_len)


def _last_turn_end(mask: np.ndarray, limit: int) -> int:
    """Return where the last trained turn ends that is whole within `limit` tokens; 0 when none is."""
    ends = np.flatnonzero(np.diff(mask[: limit + 1].astype(np.int8)) == -1) + 1
    return int(ends[-1]) if len(ends) else 0


def _remarks(dataset: Dataset, cut: int, dropped: int, untrained: int, seq_len: int) -> list[str]:
    remarks = []
    if cut:
        remarks.append(f"{cut:,} conversations over {seq_len} tokens were cut behind their last whole answer that fits")
    if dropped:
        remarks.append(f"{dropped:,} conversations were left out: over {seq_len} tokens, and no whole answer fits")
    if untrained:
        remarks.append(f"{untrained:,} conversations were left out: no token of them is trained on")
    return [f"{dataset.path}: {remark}" for remark in remarks]
