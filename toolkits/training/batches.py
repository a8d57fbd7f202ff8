"""From rows to the micro batches of one rank.

    rows -> an order -> tokens, labels and loss mask, laid end to end

The order is a pure function of (seed, epoch, index): which rows a step trains on does not depend on the
parallel layout, and a run can go on at any step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from .layout import Layout
from .rows import Rows
from .settings import BatchSettings

T = TypeVar("T")
PAD_TOKEN = 0  # never trained on and never seen by a document, so any id does


@dataclass(frozen=True)
class Answers:
    """The documents of a micro batch of answers; of pairs, better and worse in turn, pair after pair; all [n].

    `places` int64: which of the packed sequences each is. `numbers` int64: of the documents in their dataset.
    `ends` int64: which of its tokens a reward model's score is that of. `reference` fp32: the log-probability of their
    trained tokens under the reference, 0 where nobody has asked it. `good` fp32: 1 or 0, of single answers; `baseline`
    fp32 [], what these are held against.
    """

    places: torch.Tensor
    numbers: torch.Tensor
    ends: torch.Tensor
    reference: torch.Tensor
    good: torch.Tensor
    baseline: torch.Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end, in megatron-core's packed format.

    tokens, labels and positions are int64 [1, t], loss_mask fp32 [1, t]: the weight with which the
    label is trained on, mostly 1 or 0.
    Labels are shifted already: position i predicts labels[i]. `answers`: of rows of pairs or single answers;
    `others`: the same prompts with answers to other prompts.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    packed: PackedSeqParams
    answers: Answers | None = None
    others: "MicroBatch | None" = None

    def cuda(self) -> "MicroBatch":
        """Return the batch with all its tensors on the GPU."""
        return self.each(lambda tensor: tensor.cuda(non_blocking=True))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        """Return the batch with `change` applied to each of its tensors."""
        return replace(
            _changed(self, change),
            packed=_changed(self.packed, change),
            answers=self.answers and _changed(self.answers, change),
            others=self.others and self.others.each(change),
        )


class Batches:
    """The micro batches of one data-parallel rank, step after step; `row_length` is a row's length in memory."""

    def __init__(self, rows: Rows, batch: BatchSettings, layout: Layout, *, replica: int, seed: int) -> None:
        self.rows, self.batch, self.layout, self.replica, self.seed = rows, batch, layout, replica, seed
        self.row_length = rows.physical_length(layout)
        self.others = Batches(rows.others, batch, layout, replica=replica, seed=seed) if rows.others else None
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def row_numbers(self, consumed: int) -> list[int]:
        """Return the rows of the next global batch, over all ranks, when the run has consumed `consumed` rows."""
        return [self._row_at(consumed + place) for place in range(self.batch.global_batch_size)]

    def evaluation(self) -> Iterator[Iterator[MicroBatch]]:
        """Yield every row once in global batches; empty rows fill the last one, so that ranks stay in step."""
        size = self.batch.global_batch_size
        for start in range(0, len(self.rows), size):
            numbers = range(start, start + size)
            yield self.micro_batches([number if number < len(self.rows) else None for number in numbers])

    def micro_batches(self, numbers: Sequence[int | None]) -> Iterator[MicroBatch]:
        """Yield this rank's micro batches of the rows `numbers`; None is an empty row."""
        micro, replicas = self.batch.micro_batch_size, self.layout.data
        for start in range(self.replica * micro, len(numbers), micro * replicas):
            yield self._micro_batch(numbers[start : start + micro])

    def _micro_batch(self, numbers: Sequence[int | None]) -> MicroBatch:
        batch = micro_batch(self.rows, numbers, length=self.row_length, multiple=self.layout.segment_multiple)
        return batch if self.others is None else replace(batch, others=self.others._micro_batch(numbers))

    def _row_at(self, place: int) -> int:
        part, index = self.rows.mix.at(place)
        epoch, row = divmod(index, len(self.rows.parts[part]))
        return int(self.rows.first_rows[part] + self._order(part, epoch)[row])

    def _order(self, part: int, epoch: int) -> np.ndarray:
        order = self._orders.get((part, epoch))
        if order is None:
            order = np.random.default_rng([self.seed, epoch, part]).permutation(len(self.rows.parts[part]))
            kept = {key: value for key, value in self._orders.items() if key[0] != part or key[1] == epoch - 1}
            # Replaced whole: the thread that builds ahead asks too.
            self._orders = {**kept, (part, epoch): order}
        return order


def micro_batch(rows: Rows, numbers: Sequence[int | None], *, length: int, multiple: int = 1) -> MicroBatch:
    """Lay the rows `numbers` end to end, each padded to `length`; None is an empty row.

    Each segment is padded to a multiple of `multiple`, and what remains of a row is a sequence of its own. A
    document that goes on in another row still says what its last token here predicts.
    """
    tokens = np.full(len(numbers) * length, PAD_TOKEN, dtype=np.int64)
    labels, positions = tokens.copy(), np.zeros_like(tokens)
    mask = np.zeros(len(tokens), dtype=np.float32)
    ends: list[int] = []
    answers: list[tuple[float, ...]] = []
    for place, number in enumerate(numbers):
        at = place * length
        part, segments = (rows.parts[0], []) if number is None else rows.segments(number)
        for document, start, count in segments:
            found = part.dataset.tokens(document)[start : start + count + 1]
            tokens[at : at + count] = found[:count]
            positions[at : at + count] = np.arange(count)
            predicting = slice(at, at + len(found) - 1)
            labels[predicting] = found[1:]
            weights = 1 if part.every_token else part.dataset.weights(document)[start + 1 : start + count + 1]
            mask[predicting] = weights
            if part.holds_answers:
                end = end_of(found[:count], part.pad_token)
                answers.append((len(ends), document, end, *part.told_of(document)))
            ends.append(at := at + -(-count // multiple) * multiple)
        if at < (place + 1) * length:
            ends.append((place + 1) * length)
    lengths = np.diff([0, *ends])
    packed = packed_params(ends, longest=int(lengths.max()))
    tensors = [torch.from_numpy(array).unsqueeze(0) for array in (tokens, labels, mask, positions)]
    told = _answers(answers) if rows.parts[0].holds_answers else None
    return MicroBatch(*tensors, packed=packed, answers=told)  # type: ignore[misc]


def end_of(tokens: np.ndarray, pad_token: int | None) -> int:
    """Return where a sequence ends as transformers sees it: at its last token that is not the pad token."""
    if pad_token is None:
        return len(tokens) - 1
    return int((np.arange(len(tokens)) * (tokens != pad_token)).argmax())


def _answers(told: Sequence[tuple[float, ...]]) -> Answers:
    places, numbers, ends, reference, good = np.array(told, np.float64).reshape(-1, 5).T
    whole, real = (
        [torch.from_numpy(each.astype(kind)) for each in some]
        for kind, some in ((np.int64, (places, numbers, ends)), (np.float32, (reference, good)))
    )
    return Answers(*whole, *real)


def _changed(value: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """Return a dataclass with `change` applied to its tensors."""
    members = {field.name: getattr(value, field.name) for field in fields(value)}  # type: ignore[arg-type]
    changed = {name: change(member) for name, member in members.items() if torch.is_tensor(member)}
    return replace(value, **changed)  # type: ignore[type-var]


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
