"""`temper data diff`: every row is in one kind, and which one a slow search by hand says."""

import io
import json
import random
import re

import numpy as np
import pytest
from click.testing import CliRunner
from data_world import doubled, talk, write_index, write_rows, write_tokenizer

from data_preprocessing.build import BuildOptions, build
from data_preprocessing.compare import _longest_rise, compare
from data_preprocessing.compare_view import report
from data_preprocessing.dataset import document_prefix, open_dataset
from data_preprocessing.writer import DatasetWriter
from toolkits.commands.data import data

KINDS = ("moved", "other_about", "other_mask", "other_tokens", "only_a", "only_b")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


def write(folder, name, rows, **about):
    prefix = document_prefix(folder / name)
    with DatasetWriter(folder, prefix.name) as writer:
        for tokens, mask in rows:
            writer.add(np.array(tokens), np.array(mask))
        writer.finish({"tokenizer": {"name": "t", "folder": "/t", "fingerprint": "f" * 64}, **about})
    return open_dataset(prefix)


def built(folder, name, rows, tokenizer, **options):
    source = write_rows(folder / f"{name}.jsonl", rows)
    build(source, folder / name, tokenizer=tokenizer, options=BuildOptions(**options))
    return open_dataset(folder / name)


def said(comparison):
    """Return what a comparison found, without what is empty."""
    return {kind: getattr(comparison, kind).tolist() for kind in KINDS if len(getattr(comparison, kind))}


def row(number, mask=(0, 1)):
    return [number, number + 1], list(mask)


ROWS = [row(10 * number) for number in range(1, 9)]


def test_equal_sets_are_equal_in_any_layout(tmp_path):
    one, other = write(tmp_path, "a", ROWS), write(tmp_path, "b", ROWS)
    comparison = compare(one, other)
    assert said(comparison) == {} and comparison.num_equal == 8
    assert (comparison.differ, comparison.manifest) == (False, {})
    old = open_dataset(write_index(document_prefix(tmp_path / "old"), doubled([ROWS], 16), "<i8"))
    assert not compare(one, old).differ and compare(one, old).manifest == {"manifest": ("present", None)}
    assert compare(old, old).manifest == {}


@pytest.mark.parametrize(
    ("changed", "expected", "num_equal"),
    [
        (ROWS[:2] + ROWS[3:], {"only_a": [2]}, 7),
        ([*ROWS[:5], row(5), *ROWS[5:]], {"only_b": [5]}, 8),
        ([*ROWS[:3], row(5), *ROWS[4:]], {"other_tokens": [[3, 3]]}, 7),
        ([*ROWS[1:3], row(5), *ROWS[4:]], {"other_tokens": [[3, 2]], "only_a": [0]}, 6),
        ([*ROWS[:3], row(40, (1, 1)), *ROWS[4:]], {"other_mask": [[3, 3]]}, 7),
        ([*ROWS[1:], ROWS[0]], {"moved": [[0, 7]]}, 7),
        ([*ROWS, ROWS[2], ROWS[2]], {"only_b": [8, 9]}, 8),
        (ROWS[::-1], {"moved": [[n, 7 - n] for n in range(8)]}, 1),
        ([], {"only_a": list(range(8))}, 0),
        ([row(90, (1, 1)), *ROWS[1:7], row(95)], {"other_tokens": [[0, 0], [7, 7]]}, 6),
    ],
)
def test_each_kind_of_change_is_found(tmp_path, changed, expected, num_equal):
    comparison = compare(write(tmp_path, "a", ROWS), write(tmp_path, "b", changed))
    found = said(comparison)
    if len(found.get("moved", [])) == 7:  # which row of a reversed set stays is anybody's choice
        assert all(pair in expected["moved"] for pair in found["moved"])
        found = expected
    assert (found, comparison.num_equal, comparison.differ) == (expected, num_equal, True)
    assert [totals.rows for totals in comparison.totals] == [8, len(changed)]
    assert [totals.tokens for totals in comparison.totals] == [16, 2 * len(changed)]
    assert comparison.totals[1].trained_tokens == sum(sum(mask) for _, mask in changed)


def test_every_row_is_in_one_kind_and_equal_rows_are_all_found(tmp_path):
    draw = random.Random(0)
    for trial in range(60):
        rows = [row(draw.randrange(12), draw.choice([(0, 1), (1, 1)])) for _ in range(draw.randrange(25))]
        other = [one for one in rows if draw.random() < 0.8]
        for _ in range(draw.randrange(4)):
            other.insert(draw.randint(0, len(other)), row(draw.randrange(16)))
        folder = tmp_path / str(trial)
        folder.mkdir()
        comparison = compare(write(folder, "a", rows), write(folder, "b", other))
        found = said(comparison)
        equal = sum(min(rows.count(one), other.count(one)) for one in {json.dumps(r): r for r in rows}.values())
        assert comparison.num_equal + len(comparison.moved) == equal
        pairs = [pair for kind in ("moved", "other_mask", "other_tokens") for pair in found.get(kind, [])]
        for side, (name, of) in enumerate((("only_a", rows), ("only_b", other))):
            named = [pair[side] for pair in pairs] + found.get(name, [])
            assert len(named) == len(set(named)) and len(named) + comparison.num_equal == len(of)
        assert all(rows[a] == other[b] for a, b in found.get("moved", []))
        assert all(rows[a][0] == other[b][0] and rows[a] != other[b] for a, b in found.get("other_mask", []))
        assert all(rows[a][0] != other[b][0] for a, b in found.get("other_tokens", []))


def test_the_longest_rise_is_the_longest():
    draw = random.Random(1)
    for _ in range(200):
        numbers = draw.sample(range(30), draw.randrange(9))
        places = _longest_rise(np.array(numbers, np.int64)).tolist()
        chosen = [numbers[place] for place in places]
        assert places == sorted(set(places)) and chosen == sorted(chosen)
        longest = 0
        for which in range(1 << len(numbers)):
            subset = [number for place, number in enumerate(numbers) if which >> place & 1]
            longest = max(longest, len(subset) if subset == sorted(subset) else 0)
        assert len(chosen) == longest


def test_another_label_is_a_difference(tmp_path, tokenizer):
    rows = [{**talk(f"q{number}", "a"), "label": number % 2 == 0} for number in range(4)]
    other = [dict(one) for one in rows]
    other[2]["label"] = False
    comparison = compare(built(tmp_path, "a", rows, tokenizer), built(tmp_path, "b", other, tokenizer))
    assert said(comparison) == {"other_about": [[2, 2]]} and comparison.num_equal == 3 and comparison.differ


def test_manifests_are_compared_by_what_they_say(tmp_path):
    one = write(tmp_path, "a", ROWS, train_on="all", chat_template={"source": "x", "sha256": "1"})
    other = write(tmp_path, "b", ROWS[:1], train_on="last", chat_template={"source": "x", "sha256": "2"}, kind="text")
    assert compare(one, other).manifest == {
        "train_on": ("all", "last"),
        "chat_template.sha256": ("1", "2"),
        "counts.max_token_id": (81, 11),
        "kind": (None, "text"),
    }


# ---------------------------------------------------------------------------------------- what people read


def run(*words):
    return CliRunner().invoke(data, ["diff", *map(str, words)])


def test_what_changed_is_shown(tmp_path, tokenizer):
    rows = [talk("q", "one", "r", "two"), talk("the same", "a"), talk("gone", "b"), talk("q", "a long answer")]
    a = built(tmp_path, "a", rows, tokenizer, train_on="all")
    b = built(tmp_path, "b", [*rows[:2], talk("q", "a short answer")], tokenizer, train_on="last")
    stream = io.StringIO()
    report(compare(a, b), a, b, tokenizer=None, limit=3, stream=stream)
    text = stream.getvalue()
    fewer = a.num_trained_tokens - b.num_trained_tokens
    assert f"B  {b.path}: 3 rows (-1), " in text and f"{b.num_trained_tokens} trained (-{fewer})\n" in text
    assert re.search(r"\n  train_on +all -> last\n", text)
    assert (
        "  equal                                         1\n  same text, another mask                       1\n" in text
    )
    assert "--- row 0 of A, row 0 of B: same text, another mask ---" in text
    assert "⟪one<|im_end|>⟫\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n⟦two<|im_end|>⟧" in text
    assert "--- row 2 of A, row 2 of B: other tokens in the same place ---" in text
    assert "--- row 3: only in A ---\n<|im_start|>user\nq<|im_end|>\n" in text
    assert text.endswith("⟦trained in both⟧ ⟪only in A⟫ ⦃only in B⦄ context\n")


def test_the_changed_stretch_of_a_row_is_marked(tmp_path, tokenizer):
    a = built(tmp_path, "a", [talk("q", "now a 1234 b")], tokenizer)
    b = built(tmp_path, "b", [talk("q", "now a 12994 b")], tokenizer)
    stream = io.StringIO()
    report(compare(a, b), a, b, tokenizer=None, limit=1, stream=stream)
    before = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert f"A: {before}⟦now a 12⟧⟪3⟫⟦4 b<|im_end|>⟧\n" in stream.getvalue()
    assert f"B: {before}⟦now a 12⟧⦃99⦄⟦4 b<|im_end|>⟧\n" in stream.getvalue()


def test_colours_on_a_terminal(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    a = built(tmp_path, "a", [talk("q", "one", "r", "two")], tokenizer)
    b = built(tmp_path, "b", [talk("q", "one", "r", "two")], tokenizer, train_on="last")
    stream = io.StringIO()
    report(compare(a, b), a, b, tokenizer=None, limit=1, stream=stream)
    assert "\x1b[1;31mone\x1b[0m" in stream.getvalue() and "\x1b[1;32mtwo\x1b[0m" in stream.getvalue()
    assert "⟦" not in stream.getvalue()


def test_without_a_tokenizer_ids_are_shown(tmp_path):
    a, b = write(tmp_path, "a", ROWS), write(tmp_path, "b", [row(10), row(21), *ROWS[2:]])
    result = run(a.path, b.path)
    assert result.exit_code == 0
    assert "ids of A are shown: the tokenizer folder /t is gone; give --tokenizer DIR" in result.output
    assert "A: ⟪20 21 ⟫\nB: ⦃21 22 ⦄\n" in result.output


def test_long_rows_are_shown_around_the_difference(tmp_path):
    ids = list(range(100, 400))
    a = write(tmp_path, "a", [(ids, [1] * 300)])
    b = write(tmp_path, "b", [([*ids[:150], 7, *ids[151:]], [1] * 300)])
    text = run(a.path, b.path).output
    assert f"A: ... ⟦{' '.join(map(str, range(226, 250)))} ⟧⟪250 ⟫⟦251 " in text
    assert f"B: ... ⟦{' '.join(map(str, range(226, 250)))} ⟧⦃7 ⦄⟦251 " in text and "321 ⟧ ...\n" in text


def test_exit_codes_and_json(tmp_path):
    a, b = write(tmp_path, "a", ROWS), write(tmp_path, "b", ROWS[:-1])
    assert run(a.path, b.path).exit_code == 0
    assert run(a.path, b.path, "--exit-code").exit_code == 1
    assert run(a.path, a.path, "--exit-code").exit_code == 0
    found = json.loads(run(a.path, b.path, "--json", "--limit", 0).stdout)
    assert found["differ"] is True and found["equal"] == 7
    assert found["only_a"] == {"count": 1, "first": []}
    assert found["totals"]["b"] == {"rows": 7, "tokens": 14, "trained_tokens": 7}
    assert found["manifest"]["counts.max_token_id"] == {"a": 81, "b": 71}
    assert json.loads(run(a.path, b.path, "--json").stdout)["only_a"]["first"] == [7]
    assert "every row is equal\n" in run(a.path, a.path).output
