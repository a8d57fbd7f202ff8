"""From conversations to micro batches: nothing crosses a conversation, nothing is lost, order is a function."""

import dataclasses

import numpy as np
import pytest

from toolkits.foundation.errors import DataError
from toolkits.training.batches import Batches, Rows, Sample, fitting_samples, hold_out, make_rows, micro_batch
from toolkits.training.config import BatchSettings, DataSettings
from toolkits.training.layout import Layout


class Conversations:
    """A dataset in memory: each conversation a list of (token, trained)."""

    path = "memory"

    def __init__(self, conversations):
        self._tokens = [np.array([token for token, _ in one], np.int32) for one in conversations]
        self._mask = [np.array([trained for _, trained in one], np.uint8) for one in conversations]
        self.lengths = np.array([len(one) for one in conversations])

    def __len__(self):
        return len(self._tokens)

    def tokens(self, index):
        return self._tokens[index]

    def mask(self, index):
        return self._mask[index]


def conversation(*turns, start):
    """`turns` are (length, trained); tokens count up from `start`."""
    flags = [trained for length, trained in turns for _ in range(length)]
    return [(start + i, trained) for i, trained in enumerate(flags)]


@pytest.fixture
def dataset():
    return Conversations(
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
    return Conversations([list(zip(dataset.tokens(i), dataset.mask(i), strict=True)) for i in indices])


def training_rows(dataset, options):
    samples, remarks = fitting_samples(dataset, options)
    return make_rows(dataset, samples, options), remarks


def layout(world=1, tensor=1, micro_batches=1):
    return Layout(world, tensor, 1, tensor > 1, micro_batches)


def test_a_micro_batch_is_what_one_would_write_by_hand(dataset):
    rows = [[Sample(0, 5), Sample(3, 4)], [Sample(1, 7)]]
    batch = micro_batch(dataset, rows, 10)
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
    rows, remarks = training_rows(dataset, settings(seq_len=9))
    assert sorted(sample.index for row in rows.rows for sample in row) == [0, 1, 3]
    assert all(sum(sample.length for sample in row) <= 9 for row in rows.rows) and len(rows) == 2
    assert remarks == ["memory: 1 conversations were left out: no token of them is trained on"]


def test_without_packing_a_row_is_one_conversation(dataset):
    rows, _ = training_rows(dataset, settings(packing=False))
    assert [len(row) for row in rows.rows] == [1, 1, 1]


def test_a_long_conversation_is_cut_behind_its_last_whole_answer(dataset):
    rows, remarks = training_rows(only(dataset, [1]), settings(seq_len=5))
    assert rows.rows == [(Sample(0, 3),)]
    assert "1 conversations over 5 tokens were cut behind their last whole answer" in remarks[0]


def test_an_answer_that_just_fits_is_not_cut(dataset):
    rows, _ = training_rows(only(dataset, [1]), settings(seq_len=6))
    assert rows.rows == [(Sample(0, 6),)]


def test_a_conversation_without_a_whole_answer_is_left_out_and_said(dataset):
    rows, remarks = training_rows(only(dataset, [0, 3]), settings(seq_len=4))
    assert rows.rows == [(Sample(1, 4),)]
    assert "1 conversations were left out: over 4 tokens" in remarks[0]


def test_too_long_can_drop_or_stop(dataset):
    rows, _ = training_rows(only(dataset, [1, 3]), settings(seq_len=5, too_long="drop"))
    assert rows.rows == [(Sample(1, 4),)]
    with pytest.raises(DataError, match=r"1 of 2 .* longer than --seq-len 5, the longest 7 tokens \(row 0\)"):
        training_rows(only(dataset, [1, 3]), settings(seq_len=5, too_long="stop"))


def test_nothing_to_train_on_is_an_error(dataset):
    with pytest.raises(DataError, match="no conversation with a trained token fits"):
        training_rows(only(dataset, [2]), settings())


def row_numbers_and_data(replicas, global_batch, rows=7, micro=1):
    data = Conversations([conversation((1, 0), (1, 1), start=10 * i) for i in range(rows)])
    made = Rows(data, [(Sample(i, 2),) for i in range(rows)], 2)
    shape = layout(world=replicas, micro_batches=global_batch // replicas // micro)
    batch = BatchSettings(micro_batch_size=micro, global_batch_size=global_batch)
    return [Batches(made, batch, shape, replica=replica, seed=5) for replica in range(replicas)]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_ranks_share_the_global_batch_without_overlap(replicas):
    ranks = row_numbers_and_data(replicas, 4)
    for step in range(5):
        seen = [int(b.tokens[0, 0]) // 10 for rank in ranks for b in rank.micro_batches(rank.row_numbers(4 * step))]
        assert sorted(seen) == sorted(ranks[0].row_numbers(4 * step))


def test_the_order_depends_on_seed_and_epoch_only():
    one, four = row_numbers_and_data(1, 4)[0], row_numbers_and_data(4, 4)[0]
    stream = [one.row_numbers(consumed) for consumed in range(0, 28, 4)]
    assert stream == [four.row_numbers(consumed) for consumed in range(0, 28, 4)]
    flat = [number for step in stream for number in step]
    epochs = [flat[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs), "every epoch sees every row once"
    assert len(set(map(tuple, epochs))) > 1, "epochs are shuffled anew"


@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluation_sees_every_row_once_and_ranks_stay_in_step(replicas):
    ranks = row_numbers_and_data(replicas, 4)
    seen, counts = [], []
    for rank in ranks:
        batches = [list(step) for step in rank.evaluation()]
        counts.append([len(step) for step in batches])
        seen += [int(b.tokens[0, 0]) // 10 for step in batches for b in step if b.loss_mask.any()]
    assert sorted(seen) == list(range(7))
    assert len(set(map(tuple, counts))) == 1


def test_one_percent_is_held_out_and_one_row_at_least():
    samples = [Sample(i, 2) for i in range(250)]
    training, validation = hold_out(samples, seed=3)
    assert len(validation) == 2 and sorted([*training, *validation], key=lambda sample: sample.index) == samples
    assert validation == hold_out(samples, seed=3)[1]
    assert len(hold_out(samples[:3], seed=3)[1]) == 1
    with pytest.raises(DataError, match="1 conversation that fits is too few to hold one out"):
        hold_out(samples[:1], seed=3)


def test_rows_are_rounded_up_for_sequence_parallelism():
    from toolkits.training.batches import row_length

    assert row_length(9, layout(world=2, tensor=2)) == 10 and row_length(9, layout()) == 9


def test_samples_are_plain_values():
    assert dataclasses.asdict(Sample(1, 2)) == {"index": 1, "length": 2}
