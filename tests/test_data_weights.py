"""Answers that are trained with a weight: in the mask, in what reads it, and in the loss."""

import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from data_world import TEMPLATES, fuzzed_rows, talk, unmarked, write_rows, write_tokenizer

from data_preprocessing import chat
from data_preprocessing.audit.run import AuditOptions, audit
from data_preprocessing.blend import Mix
from data_preprocessing.build import BuildOptions, build
from data_preprocessing.chat import ChatEncoder
from data_preprocessing.compare import compare
from data_preprocessing.compare_view import report
from data_preprocessing.dataset import LEAST_WEIGHT, MOST_WEIGHT, WEIGHT_OF, mask_byte, open_dataset
from data_preprocessing.doubled_writer import write_doubled
from data_preprocessing.inspect import Entries
from data_preprocessing.records import conversation
from toolkits.foundation.errors import DataError
from toolkits.training.batches import micro_batch
from toolkits.training.objectives.cross_entropy import CrossEntropy
from toolkits.training.rows import Rows, make_rows, select
from toolkits.training.settings import DataSettings

STRIPPING = "{% for m in messages %}{{ '<é>' + m.role + m.content | trim + '</s>' }}{% endfor %}"
NOT_COPYING = "{% for m in messages %}{{ m.role + m.content.replace('q', 'r') + '</s>' }}{% endfor %}"


def weighted_rows(count, seed=0):
    """Return conversations of which every answer has a weight or no mark at all."""
    draw, rows = random.Random(seed), fuzzed_rows(count, seed)
    for row in rows:
        for turn in row["messages"]:
            if turn["role"] == "assistant" and draw.random() < 0.8:
                turn[draw.choice(["loss", "weight"])] = draw.choice([True, False, 0.5, 0.02, 2.55, 1.5, 0, 1, 1.0, 2])
    return rows


def marked_alone(row, number):
    """Return the row with turn `number` alone marked as trained."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    turns[number]["loss"] = True
    return {"messages": turns}


def weight_of(turn):
    said = turn.get("loss", turn.get("weight"))
    return 1.0 if said is None else float(said)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    """A set of three rows, the second with weights."""
    folder = tmp_path_factory.mktemp("weighted")
    rows = [talk("q", "one"), talk("q", "two", "q", "three"), talk("q", "four")]
    rows[1]["messages"][1]["loss"] = 0.25
    tokenizer = write_tokenizer(folder / "t")
    build(write_rows(folder / "rows", rows), folder / "set", tokenizer=tokenizer)
    for row in rows:
        row["messages"][1].pop("loss", None)
    build(write_rows(folder / "plain", rows), folder / "plain", tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("template", [*TEMPLATES.values(), *map(unmarked, TEMPLATES.values()), STRIPPING, NOT_COPYING])
def test_each_answer_has_its_weight(tmp_path, template, kind):
    folder = write_tokenizer(tmp_path / "t", template, kind=kind)
    rows = [row for row in weighted_rows(25) if any(weight_of(t) for t in row["messages"] if t["role"] == "assistant")]
    places = [(at, number) for at, row in enumerate(rows) for number in range(len(row["messages"]))]
    answers = [(at, number) for at, number in places if rows[at]["messages"][number]["role"] == "assistant"]
    build(write_rows(tmp_path / "rows", rows), tmp_path / "all", tokenizer=folder)
    alone = write_rows(tmp_path / "alone", [marked_alone(rows[at], number) for at, number in answers])
    build(alone, tmp_path / "alone", tokenizer=folder, options=BuildOptions(train_on="marked"))
    found, single = open_dataset(tmp_path / "all"), open_dataset(tmp_path / "alone")
    expected = [np.zeros(int(length), np.float32) for length in found.lengths]
    for place, (at, number) in enumerate(answers):
        expected[at] += np.float32(weight_of(rows[at]["messages"][number])) * single.mask(place)
    for row, wanted in enumerate(expected):
        assert found.weights(row).tolist() == wanted.tolist()
        assert found.mask(row).tolist() == (wanted != 0).tolist()
    targets = [np.count_nonzero(wanted[1:]) for wanted in expected]
    assert found.trained_targets().tolist() == targets and found.num_trained_tokens >= sum(targets) > 0


def test_a_byte_holds_every_weight_to_the_hundredth():
    weights = [0, 1, *np.arange(round(100 * LEAST_WEIGHT), round(100 * MOST_WEIGHT) + 1) / 100]
    for weight in weights:
        assert abs(WEIGHT_OF[mask_byte(weight)] - weight) < 1e-6
    assert WEIGHT_OF[0] == 0 and WEIGHT_OF[1] == 1


@pytest.mark.parametrize(("train_on", "kept"), [("all", [0.5, 1.0]), ("last", [1.0]), ("marked", [0.5])])
def test_which_answers_are_trained_and_how_much(tmp_path, train_on, kept):
    row = talk("q", "one", "q", "two")
    row["messages"][1]["loss"] = 0.5
    folder = write_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    source = write_rows(tmp_path / "rows", [row])
    build(source, tmp_path / "set", tokenizer=folder, options=BuildOptions(train_on=train_on))
    weights = open_dataset(tmp_path / "set").weights(0)
    assert [weight for weight in dict.fromkeys(weights.tolist()) if weight] == kept


def test_two_sets_that_differ_in_weights_are_not_equal(weighted, capsys):
    sets = open_dataset(weighted / "set"), open_dataset(weighted / "plain")
    comparison = compare(*sets)
    assert (comparison.num_equal, comparison.other_mask.tolist()) == (2, [[1, 1]])
    report(comparison, *sets, tokenizer=None, limit=3)
    said = capsys.readouterr().out
    assert "row 1 of A, row 1 of B" in said and "is trained with weight 0.25 in A, 1 in B" in said


def test_older_versions_do_not_read_weights_as_whole_numbers(weighted):
    sets = [open_dataset(weighted / name).manifest for name in ("set", "plain")]
    assert [manifest["format_version"] for manifest in sets] == [2, 1]
    assert sets[0]["counts"]["weighted_tokens"] > 0 == sets[1]["counts"]["weighted_tokens"]


def test_rows_and_the_set_that_they_become_are_checked_alike(weighted):
    reports = []
    for source in (weighted / "rows", weighted / "set"):
        found = audit([str(source)], tokenizer=weighted / "t", options=AuditOptions()).as_json()
        reports.append({key: value for key, value in found.items() if key not in ("name", "read_as")})
    assert reports[0] == reports[1]
    assert reports[0]["answers_end_with"][0]["answers"] == 4


def test_other_kinds_of_rows_have_no_weights(tmp_path):
    folder = write_tokenizer(tmp_path / "t")
    turns = talk("q", "a")["messages"]
    turns[1]["loss"] = 0.5
    for row in ({"messages": turns, "label": True}, {"messages": turns[:1], "chosen": turns[1:], "rejected": "b"}):
        with pytest.raises(DataError, match="a weight is for answers of conversations"):
            build(write_rows(tmp_path / "rows", [row]), tmp_path / "out", tokenizer=folder)
    pair = {"messages": turns[:1], "chosen": turns[1:], "rejected": [{**turns[1], "loss": True}]}
    with pytest.raises(DataError, match="chosen and rejected are the same answer"):
        build(write_rows(tmp_path / "rows", [pair]), tmp_path / "out", tokenizer=folder)


def test_an_answer_in_several_marked_pieces_has_its_weight(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content[:1] }}{% endgeneration %}"
        "{% generation %}{{ m.content[1:] + '</s>' }}{% endgeneration %}{% else %}{{ m.content + '</s>' }}{% endif %}"
        "{% endfor %}"
    )
    row = talk("q", "one")
    row["messages"][1]["loss"] = 0.5
    build(write_rows(tmp_path / "rows", [row]), tmp_path / "set", tokenizer=write_tokenizer(tmp_path / "t", template))
    assert set(open_dataset(tmp_path / "set").weights(0).tolist()) == {0.0, 0.5}


def test_many_weights_leave_room_for_the_shapes_of_ordinary_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SHAPES", 8)
    encoder = ChatEncoder(write_tokenizer(tmp_path / "t", unmarked(TEMPLATES["chatml"])), encoder="tokenizers")
    for number in range(2, 40):
        row = talk("q", "a")
        row["messages"][1]["loss"] = number / 100
        assert encoder.render(conversation(row)).marks == [number] or number < 8
    monkeypatch.setattr(encoder.template, "render", Mock(wraps=encoder.template.render))
    for _ in range(5):
        encoder.render(conversation(talk("q", "a", "q", "a")))
    assert encoder.template.render.call_count < 12  # of the first alone


@pytest.mark.parametrize("workers", [1, 2])
def test_weights_come_through_every_way_of_working(weighted, tmp_path, workers):
    options = BuildOptions(workers=workers, chunk_rows=1)
    build(weighted / "rows", tmp_path / "set", tokenizer=weighted / "t", options=options)
    name = "set_text_document.mask"
    assert (tmp_path / name).read_bytes() == (weighted / name).read_bytes()


def test_a_row_is_shown_with_its_weights(weighted):
    entries = Entries(open_dataset(weighted / "set"), weighted / "t")
    assert [len(entries[row].notes) for row in range(3)] == [0, 1, 0]
    number = np.count_nonzero(entries.dataset.weights(1) == 0.25)
    assert entries[1].notes[0].startswith(f"weights of the trained tokens: 0.25 for {number}, 1 for ")


def test_the_layout_of_older_tools_has_no_place_for_weights(weighted, tmp_path):
    with pytest.raises(
        DataError, match=r"\d tokens are trained with weights; the doubled layout has no place for them"
    ):
        write_doubled(open_dataset(weighted / "set"), tmp_path / "out", seq_len=64, pad=0)
    assert list(tmp_path.iterdir()) == []
    write_doubled(open_dataset(weighted / "plain"), tmp_path / "out", seq_len=64, pad=0)


def test_the_loss_counts_a_token_by_its_weight(weighted):
    settings = DataSettings(data=str(weighted / "set"), seq_len=64)
    selection, _ = select(open_dataset(weighted / "set"), settings)
    rows = Rows((make_rows(selection, settings),), Mix([1]))
    batch = micro_batch(rows, list(range(len(rows))), length=64)
    told = sorted(batch.loss_mask.unique().tolist())
    assert told == [0.0, 0.25, 1.0]
    losses = torch.rand_like(batch.loss_mask)
    total, count, figures = CrossEntropy()(losses, batch=batch)
    by_hand = sum(
        float(loss) * float(weight) for loss, weight in zip(losses[0], batch.loss_mask[0], strict=True) if weight
    )
    assert total.item() == pytest.approx(by_hand, rel=1e-6)
    assert count == figures["trained_tokens"] == int(open_dataset(weighted / "set").trained_targets().sum())
