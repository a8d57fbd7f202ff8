"""Rows of plain turns take a short way through a build: everything that comes of them is what the long way makes."""

import json
import random

import numpy as np
import pytest
from data_world import PIECES, TEMPLATES, fuzzed_rows, talk, unmarked, write_tokenizer

from data_preprocessing.build import BuildOptions
from data_preprocessing.chunks import Chunk, ChunkWork
from data_preprocessing.layouts import LAYOUTS
from data_preprocessing.masks import filled
from data_preprocessing.records import plain_conversations, record
from data_preprocessing.rendered import RenderedRows
from data_preprocessing.row_error import RowError
from data_preprocessing.rows import Row, Rows
from data_preprocessing.turns import is_encodable

STRIPPING = "{% for m in messages %}{{ '<é>' + m.role + m.content | trim + '</s>' }}{% endfor %}"
NAMES = {"user": "human", "assistant": "gpt"}


class LongWay(ChunkWork):
    wants_records = True


def odd_rows(count):
    """Return rows of every kind that the short way must leave alone, or must not change."""
    draw = random.Random(3)
    rows = []
    for _ in range(count):
        text = lambda: draw.choice(["", "  ", "a\0b", "<|im_end|>", "</s>", "\ud800", 5, None, *PIECES])  # noqa: E731
        turns = [(role, text()) for role in ["user", "assistant"] * draw.randint(1, 2)]
        turns = [("system", text())] * draw.choice([0, 0, 1, 2]) + turns
        if draw.random() < 0.1:
            turns.append((draw.choice(["user", "tool", "nobody", 3, ["user"], {}, None]), text()))
        said = [{"role": role, "content": content} for role, content in turns]
        if draw.random() < 0.4:
            named = [NAMES.get(role, role) if isinstance(role, str) else role for role, _ in turns]
            said = [{"from": role, "value": turn["content"]} for role, turn in zip(named, said, strict=True)]
        row = {draw.choice(["messages", "messages", "conversations"]): said}
        if draw.random() < 0.3:
            beside = {
                "tools": "",
                "system": "s",
                "id": 1,
                "text": "t",
                "label": True,
                "conversations": [],
                "messages": 0,
            }
            key = draw.choice(list(beside))
            row = {key: beside[key], **row}
        rows.append(row)
    for _ in range(count // 2):
        text = lambda: draw.choice(["", " ", "a\0b", "<|im_end|>", "\ud800", 5, None, [], *PIECES])  # noqa: E731
        row = (
            {"instruction": text(), "output": text()} if draw.random() < 0.7 else {"prompt": "q", "completion": text()}
        )
        beside = {
            "input": text(),
            "history": draw.choice([None, [], "", [["q", "a"]]]),
            "system": text(),
            "prompt": "p",
        }
        rows.append(row | {key: beside[key] for key in draw.choices(list(beside), k=draw.randint(0, 2))})
    rows += [{"instruction": "", "input": "i", "output": "o"}, {"instruction": "q", "input": 0, "output": "o"}]
    return [*rows, [], 7, {}, {"messages": {}}, {"messages": [3]}, {"messages": [{"role": "user"}]}, {"messages": []}]


def prepared(work, rows):
    chunk = Chunk(0, Rows.of([Row(line, value) for line, value in enumerate(rows, start=1)]))
    done = work.prepare(chunk)
    bad = [(index, error.reason, str(error)) for index, error in done.rejects]
    return said(done.rendered), done.groups, bad, done.layouts


def said(rows):
    """Return what rendered rows say, without how they are kept."""
    every = [row for _, row in rows.some(range(len(rows)))]
    return [(one.text, list(one.spans), list(one.marks), *one[2:4]) for one in every]


@pytest.mark.parametrize("template", [*TEMPLATES.values(), *map(unmarked, TEMPLATES.values()), STRIPPING])
@pytest.mark.parametrize("train_on", ["all", "last", "marked"])
def test_both_ways_make_the_same(tmp_path, template, train_on):
    folder, rows = write_tokenizer(tmp_path, template), [*fuzzed_rows(40), *odd_rows(150)]
    for merge in (False, True):
        options = BuildOptions(encoder="tokenizers", train_on=train_on, merge_consecutive=merge)
        short, long = (kind("conversations", folder, options) for kind in (ChunkWork, LongWay))
        assert prepared(short, rows) == prepared(long, rows)


def test_most_rows_take_the_short_way_and_no_other_does():
    taken = 0
    for value in [*fuzzed_rows(100), *odd_rows(1000)]:
        turns = plain_conversations([value])
        if turns is not None and all(map(is_encodable, turns.contents)):
            taken += 1
            found = record(value)
            assert (found.layout, found.tools) == (turns.layout, ())
            (roles,) = turns.roles
            assert [(one.role, one.content) for one in found.messages] == list(zip(roles, turns.contents, strict=True))
            assert all(one.is_plain and one.loss is None for one in found.messages)
    assert taken > 150


def test_rows_are_plain_together_when_each_of_them_is():
    rows = [value for value in [*fuzzed_rows(100), *odd_rows(300)] if plain_conversations([value])]
    for layout, (*_, key) in LAYOUTS.items():
        alike = [value for value in rows if plain_conversations([value]).layout == layout]
        alike = [value for value in alike if type(value[key]) is str or "role" in value[key][0]]
        found, alone = plain_conversations(alike), [plain_conversations([value]) for value in alike]
        assert len(alike) >= 10 and found.layout == layout
        assert found.roles == [one.roles[0] for one in alone]
        assert found.contents == [text for one in alone for text in one.contents]
        for odd in odd_rows(300):
            assert plain_conversations([odd]) or plain_conversations([*alike[:3], odd]) is None


@pytest.mark.parametrize("template", [TEMPLATES["chatml"], STRIPPING])
def test_spans_in_bytes_are_those_of_the_text(tmp_path, template):
    work = ChunkWork("conversations", write_tokenizer(tmp_path, template), BuildOptions(encoder="tokenizers"))
    rows, values = RenderedRows(), []
    for value in [*fuzzed_rows(100), talk("é", "中")]:
        turns = plain_conversations([value])
        if turns and work.encoder.render_plain(turns, rows):
            values.append(value)
    places = filled(rows.runs, rows.sizes)
    long_way = RenderedRows([work.encoder.render(record(value)) for value in values])
    assert said(rows) == said(long_way) and len(rows) > 20
    assert all(map(np.array_equal, places, filled(long_way.runs, [])))
    first_edges = np.cumsum(places.num_edges) - places.num_edges
    for start, (_, row) in zip(first_edges, rows.some(range(len(rows))), strict=True):
        first, past = places.edges[start : start + 2]
        assert row.text.encode()[first:past].decode() == row.text[slice(*row.spans[0])]


def test_a_role_that_is_no_text_is_an_error():
    with pytest.raises(RowError, match="role is"):
        record({"messages": [{"role": ["user"], "content": "a"}, {"role": "assistant", "content": "b"}]})


def test_json_that_only_the_slower_parser_reads_goes_the_long_way(tmp_path):
    folder = write_tokenizer(tmp_path / "t")
    work = ChunkWork("conversations", folder, BuildOptions(encoder="tokenizers"))
    line = json.dumps(talk("a", "\ud800")).encode()
    done = work.prepare(Chunk(0, Rows.of([Row(1, line), Row(2, json.dumps(talk("a", "b")).encode())])))
    assert [(index, error.reason) for index, error in done.rejects] == [(0, "character")]
    assert len(done.rendered) == 1
