"""From documents to micro batches: nothing crosses a document, nothing is lost, order is a function."""

import numpy as np
import pytest

from data_preprocessing.blend import Mix
from toolkits.foundation.errors import DataError
from toolkits.training.batches import Batches, micro_batch
from toolkits.training.layout import Layout
from toolkits.training.rows import Rows, Segment, Selection, SetRows, make_rows, select
from toolkits.training.settings import BatchSettings, DataSettings


class Documents:
    """A dataset in memory: each document a list of (token, trained)."""

    path = "memory"

    def __init__(self, documents):
        self._tokens = [np.array([token for token, _ in one], np.int32) for one in documents]
        self._mask = [np.array([trained for _, trained in one], np.uint8) for one in documents]
        self.lengths = np.array([len(one) for one in documents])

    def __len__(self):
        return len(self._tokens)

    def tokens(self, index):
        return self._tokens[index]

    def mask(self, index):
        return self._mask[index]

    weights = mask

    def trained_targets(self):
        return np.array([int(mask[1:].sum()) for mask in self._mask])


def conversation(*turns, start):
    """`turns` are (length, trained); tokens count up from `start`."""
    flags = [trained for length, trained in turns for _ in range(length)]
    return [(start + i, trained) for i, trained in enumerate(flags)]


def texts(*lengths):
    """Documents whose tokens say where they come from: 1000 x document + place."""
    return Documents([conversation((length, 1), start=1000 * i) for i, length in enumerate(lengths, 1)])


@pytest.fixture
def dataset():
    return Documents(
        [
            conversation((2, 0), (3, 1), start=100),
            conversation((1, 0), (2, 1), (1, 0), (2, 1), (1, 0), start=200),
            conversation((4, 0), start=300),
            conversation((3, 0), (1, 1), start=400),
        ]
    )


def settings(**values):
    return DataSettings(data="d", **({"seq_len": 8} | values))


def only(dataset, indices):
    """The conversations `indices` of `dataset`, as a dataset."""
    return Documents([list(zip(dataset.tokens(i), dataset.mask(i), strict=True)) for i in indices])


def rows_of(dataset, options):
    """The rows of one dataset and what is said about them."""
    selection, remarks = select(dataset, options)
    return Rows((make_rows(selection, options),), Mix([1])), remarks


def by_hand(dataset, rows, seq_len):
    """The rows that lists of (document, number of tokens) say."""
    documents, lengths = (np.array(column) for column in zip(*(pair for row in rows for pair in row), strict=True))
    ends = np.cumsum(lengths)
    borders = np.append(0, ends)[np.cumsum([0, *map(len, rows)])]
    return Rows((SetRows(dataset, documents, ends, borders, seq_len),), Mix([1]))


def segments(rows):
    return [rows.segments(number)[1] for number in range(len(rows))]


def layout(world=1, tensor=1, micro_batches=1, context=1):
    return Layout(world, tensor, 1, tensor > 1, micro_batches, context=context)


def test_a_micro_batch_is_what_one_would_write_by_hand(dataset):
    rows = by_hand(dataset, [[(0, 5), (3, 4)], [(1, 7)]], 10)
    batch = micro_batch(rows, [0, 1], length=10)
    assert batch.tokens.tolist() == [
        [100, 101, 102, 103, 104, 400, 401, 402, 403, 0, 200, 201, 202, 203, 204, 205, 206, 0, 0, 0]
    ]
    assert batch.labels.tolist() == [
        [101, 102, 103, 104, 0, 401, 402, 403, 0, 0, 201, 202, 203, 204, 205, 206, 0, 0, 0, 0]
    ]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0]]
    assert batch.packed.cu_seqlens_q.tolist() == [0, 5, 9, 10, 17, 20]
    assert batch.packed.max_seqlen_q == 7
    assert batch.loss_mask.sum() == 8


def test_packing_puts_every_trained_conversation_into_one_row(dataset):
    rows, remarks = rows_of(dataset, settings(seq_len=9))
    assert sorted(segment.document for row in segments(rows) for segment in row) == [0, 1, 3]
    assert all(sum(segment.length for segment in row) <= 9 for row in segments(rows)) and len(rows) == 2
    assert rows.tokens_in([0, 1]) == 16 and rows.tokens_in([]) == 0
    assert remarks == ["memory: 1 conversations were left out: no token of them is trained on"]


def test_without_packing_a_row_is_one_conversation(dataset):
    rows, _ = rows_of(dataset, settings(packing=False))
    assert segments(rows) == [[Segment(0, 0, 5)], [Segment(1, 0, 7)], [Segment(3, 0, 4)]]


def test_a_long_conversation_is_cut_behind_its_last_whole_answer(dataset):
    rows, remarks = rows_of(only(dataset, [1]), settings(seq_len=5))
    assert segments(rows) == [[Segment(0, 0, 3)]]
    assert micro_batch(rows, [0], length=5).loss_mask.tolist() == [[1, 1, 0, 0, 0]]
    assert "1 conversations over 5 tokens were cut behind their last whole answer" in remarks[0]


def test_an_answer_that_just_fits_is_not_cut(dataset):
    rows, _ = rows_of(only(dataset, [1]), settings(seq_len=6))
    assert segments(rows) == [[Segment(0, 0, 6)]]


def test_a_conversation_without_a_whole_answer_is_left_out_and_said(dataset):
    rows, remarks = rows_of(only(dataset, [0, 3]), settings(seq_len=4))
    assert segments(rows) == [[Segment(1, 0, 4)]]
    assert "1 conversations were left out: over 4 tokens" in remarks[0]


def test_too_long_can_drop_or_stop(dataset):
    rows, _ = rows_of(only(dataset, [1, 3]), settings(seq_len=5, too_long="drop"))
    assert segments(rows) == [[Segment(1, 0, 4)]]
    with pytest.raises(DataError, match=r"1 of 2 .* longer than SEQ_LEN 5, the longest 7 tokens \(row 0\)"):
        rows_of(only(dataset, [1, 3]), settings(seq_len=5, too_long="stop"))


def test_nothing_to_train_on_is_an_error(dataset):
    with pytest.raises(DataError, match="no conversation with a trained token fits"):
        rows_of(only(dataset, [2]), settings())
    with pytest.raises(DataError, match="no document has two tokens: there is nothing to predict"):
        rows_of(texts(1, 1), settings(rows="documents"))


# ------------------------------------------------------------------------------------------- documents


def chain(rows):
    """What the rows train, in their order: each (token, the token it predicts)."""
    pairs = []
    for number in range(len(rows)):
        batch = micro_batch(rows, [number], length=rows.parts[0].row_tokens)
        trained = batch.loss_mask[0].bool()
        pairs += zip(batch.tokens[0][trained].tolist(), batch.labels[0][trained].tolist(), strict=True)
    return pairs


@pytest.mark.parametrize("seq_len", [2, 7, 10, 64])
def test_documents_fill_every_row_and_every_token_but_a_first_is_predicted_once(seq_len):
    lengths = [3, 25, 2, 11, 1, 7, 40]
    rows, remarks = rows_of(texts(*lengths), settings(rows="documents", seq_len=seq_len))
    used = sum(lengths) - 1
    assert remarks == ["memory: 1 documents were left out: they have one token or none"]
    sizes = [sum(segment.length for segment in row) for row in segments(rows)]
    assert sizes == [seq_len] * (used // seq_len) + [used % seq_len] * bool(used % seq_len)
    expected = [(1000 * i + p, 1000 * i + p + 1) for i, n in enumerate(lengths, 1) for p in range(n - 1)]
    assert sorted(chain(rows)) == sorted(expected), "a border between two rows must lose no target"
    stretches = [segment for row in segments(rows) for segment in row]
    for document, length in enumerate(lengths):
        own = sorted((start, count) for which, start, count in stretches if which == document)
        assert [start for start, _ in own] == [sum(n for _, n in own[:i]) for i in range(len(own))]
        assert sum(count for _, count in own) == length * (length > 1)


def test_the_documents_own_mask_is_not_asked_for_documents(dataset):
    rows, _ = rows_of(dataset, settings(rows="documents", seq_len=100))
    assert micro_batch(rows, [0], length=100).loss_mask.sum() == sum(dataset.lengths) - len(dataset)


def test_documents_lie_in_an_order_that_the_seed_gives():
    orders = [rows_of(texts(*[5] * 50), settings(rows="documents", seed=seed))[0].parts[0] for seed in (1, 1, 2)]
    first, again, other = [list(part.documents) for part in orders]
    assert first == again != other and sorted(first) == sorted(other) == list(range(50)) != first


def test_a_hundred_thousand_documents_take_a_few_numbers_each():
    lengths = np.random.default_rng(0).integers(2, 2000, 100_000)

    class Long:
        path = "memory"

        def __init__(self):
            self.lengths = lengths

        def __len__(self):
            return len(lengths)

    rows, _ = rows_of(Long(), settings(rows="documents", seq_len=1024))
    part = rows.parts[0]
    assert part.documents.nbytes + part.ends.nbytes + part.borders.nbytes < 30 * len(lengths)
    assert part.num_tokens == lengths.sum()
    total = sum(segment.length for number in range(0, len(rows), 97) for segment in part.segments(number))
    assert total == rows.tokens_in(range(0, len(rows), 97)) == 1024 * len(range(0, len(rows), 97))


# ------------------------------------------------------------------------------- segments and context parallelism


def test_segments_are_padded_for_context_parallelism_and_the_rows_stay_the_same(dataset):
    rows = by_hand(dataset, [[(0, 5), (3, 4)], [(1, 7)]], 10)
    assert rows.physical_length(layout()) == 10
    shape = layout(world=2, context=2)
    assert (shape.segment_multiple, rows.physical_length(shape)) == (4, 12)  # 5 and 4 take 8 and 4
    batch = micro_batch(rows, [0, 1], length=12, multiple=4)
    assert batch.packed.cu_seqlens_q.tolist() == [0, 8, 12, 20, 24] and batch.packed.max_seqlen_q == 8
    plain = micro_batch(rows, [0, 1], length=10)
    for name in ("tokens", "labels"):
        kept = getattr(batch, name)[0][batch.loss_mask[0].bool()]
        assert kept.tolist() == getattr(plain, name)[0][plain.loss_mask[0].bool()].tolist()
    assert batch.tokens[0, 5:8].tolist() == [0, 0, 0] and batch.loss_mask[0, 4:8].sum() == 0


@pytest.mark.parametrize("rows_option", ["documents", "conversations"])
def test_the_longest_padded_row_is_the_longest_of_all(rows_option):
    rng = np.random.default_rng(3)
    dataset = texts(*rng.integers(2, 30, 60).tolist())
    rows, _ = rows_of(dataset, settings(rows=rows_option, seq_len=32))
    for multiple in (1, 4, 8):
        padded = [sum(-(-segment.length // multiple) * multiple for segment in row) for row in segments(rows)]
        assert rows.parts[0].longest_padded(multiple) == max(padded)


def test_rows_are_rounded_up_for_sequence_parallelism(dataset):
    rows, _ = rows_of(dataset, settings(seq_len=9))
    assert rows.physical_length(layout(world=2, tensor=2)) == 10 and rows.physical_length(layout()) == 9


# ---------------------------------------------------------------------------------------------- batches


def numbered(first, rows):
    """A set whose row i is the two tokens first + 10 i and the one behind."""
    data = Documents([conversation((1, 0), (1, 1), start=first + 10 * i) for i in range(rows)])
    return make_rows(Selection(data, np.arange(rows)[:, None], data.lengths[:, None]), settings(seq_len=2))


def batches_of(replicas, global_batch, rows=7, micro=1, parts=None, weights=(1,)):
    made = Rows(parts or (numbered(0, rows),), Mix(weights))
    shape = layout(world=replicas, micro_batches=global_batch // replicas // micro)
    batch = BatchSettings(micro_batch_size=micro, global_batch_size=global_batch)
    return [Batches(made, batch, shape, replica=replica, seed=5) for replica in range(replicas)]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_ranks_share_the_global_batch_without_overlap(replicas):
    ranks = batches_of(replicas, 4)
    for step in range(5):
        seen = [int(b.tokens[0, 0]) // 10 for rank in ranks for b in rank.micro_batches(rank.row_numbers(4 * step))]
        assert sorted(seen) == sorted(ranks[0].row_numbers(4 * step))


def test_the_order_depends_on_seed_and_epoch_only():
    one, four = batches_of(1, 4)[0], batches_of(4, 4)[0]
    stream = [one.row_numbers(consumed) for consumed in range(0, 28, 4)]
    assert stream == [four.row_numbers(consumed) for consumed in range(0, 28, 4)]
    flat = [number for step in stream for number in step]
    epochs = [flat[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs), "every epoch sees every row once"
    assert len(set(map(tuple, epochs))) > 1, "epochs are shuffled anew"
    assert epochs[1] == np.random.default_rng([5, 1]).permutation(7).tolist(), "what runs have begun with stays"


def test_each_set_of_a_blend_goes_through_epochs_of_its_own():
    parts = (numbered(0, 7), numbered(1000, 3))
    stream = batches_of(1, 4, parts=parts, weights=(3, 2))[0]
    flat = [number for consumed in range(0, 60, 4) for number in stream.row_numbers(consumed)]
    for first, size, share in ((0, 7, 36), (7, 3, 24)):
        own = [number - first for number in flat if first <= number < first + size]
        assert len(own) == share
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1
    late = batches_of(2, 4, parts=parts, weights=(3, 2))[0]  # another layout, and nothing was asked before
    assert late.row_numbers(40) == flat[40:44], "a row is a function of its number alone"
    seen = [int(b.tokens[0, 0]) for b in stream.micro_batches(flat[:4])]
    assert seen == [10 * n if n < 7 else 1000 + 10 * (n - 7) for n in flat[:4]]


def test_the_report_says_how_often_each_set_is_read():
    rows = Rows((numbered(0, 7), numbered(1000, 3)), Mix((3, 2)))
    first, second = rows.report(rows_of_run=50)
    assert first == "memory: 7 conversations, 14 tokens in 7 rows of 2 (100.0% full): 4.3 epochs in this run" + (
        "; beyond 4 of the same data, an epoch teaches little"
    )
    assert second.endswith("6.7 epochs in this run; beyond 4 of the same data, an epoch teaches little")
    assert rows.report(rows_of_run=5)[0].endswith("0.4 epochs in this run")


@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluation_sees_every_row_once_and_ranks_stay_in_step(replicas):
    ranks = batches_of(replicas, 4, parts=(numbered(0, 4), numbered(40, 3)), weights=(1, 1))
    seen, counts = [], []
    for rank in ranks:
        batches = [list(step) for step in rank.evaluation()]
        counts.append([len(step) for step in batches])
        seen += [int(b.tokens[0, 0]) // 10 for step in batches for b in step if b.loss_mask.any()]
    assert sorted(seen) == list(range(7))
    assert len(set(map(tuple, counts))) == 1


def test_one_percent_is_held_out_and_one_row_at_least():
    dataset = texts(*[2] * 250)
    whole = Selection(dataset, np.arange(250)[:, None], dataset.lengths[:, None])
    training, validation = whole.hold_out(seed=3)
    assert len(validation) == 2 and sorted([*training.documents, *validation.documents]) == list(range(250))
    assert list(validation.documents) == list(whole.hold_out(seed=3)[1].documents)
    few = Selection(dataset, np.arange(3)[:, None], dataset.lengths[:3, None])
    assert len(few.hold_out(seed=3)[1]) == 1
    with pytest.raises(DataError, match="memory: 1 that fits is too few to hold one out"):
        Selection(dataset, np.arange(1)[:, None], dataset.lengths[:1, None]).hold_out(seed=3)
