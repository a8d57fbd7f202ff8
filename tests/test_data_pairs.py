"""temper data pairs: what the model answers is rejected, what it should have answered is chosen."""

import json
import re

import pytest
from click.testing import CliRunner
from generate_world import ASKED, MOST, ROWS, copied, generator_of
from training_world import write_model

from data_preprocessing.build import build
from data_preprocessing.dataset import open_dataset
from data_preprocessing.records import Preference, record
from data_preprocessing.turns import Message
from toolkits.cli import temper
from toolkits.foundation.errors import exit_code_of
from toolkits.generation.pairs import _reason
from toolkits.generation.prompts import question_of, read_questions, with_system


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A model whose answers differ: three end by themselves, one is cut short, one is empty."""

    def end_likely(content):
        content["lm_head.weight"][256] *= 2.5

    folder = tmp_path_factory.mktemp("pairs")
    base = write_model(folder / "base", tied=False, max_position_embeddings=192, seed=3)
    return copied(base, folder / "ending", tensors=end_likely)


@pytest.fixture(scope="module")
def said(ending):
    """What it answers to ASKED."""
    answers = generator_of(ending).answer_all([question_of(text) for text in ASKED], batch_size=1)
    whole = [answer.text for answer in answers if answer.reason == "stop" and answer.text.strip()]
    assert len(set(whole)) == 3 and sorted(answer.reason for answer in answers) == ["length", *["stop"] * 4], answers
    return {answer.question.text: answer for answer in answers}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words):
    words = ("data", "pairs", *words, "--max-new-tokens", MOST)
    return CliRunner().invoke(temper, [str(word) for word in words])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(row, side):
    (turn,) = row[side]
    assert turn["role"] == "assistant"
    return turn["content"]


def whole(said):
    return {asked: answer.text for asked, answer in said.items() if answer.reason == "stop" and answer.text.strip()}


def test_expressions_correct_what_the_model_says(ending, said, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ASKED])
    first = re.escape(next(iter(whole(said).values()))[:2])
    out = tmp_path / "out.jsonl"
    result = run(prompts, out, "--model", ending, "--replace", f"(?s)^{first}(.*)$", r"B\1", "--replace", "^B", "C")
    assert result.exit_code == 0, result.output
    expected = {
        asked: (text, re.sub("^B", "C", re.sub(f"(?s)^{first}(.*)$", r"B\1", text)))
        for asked, text in whole(said).items()
    }
    changed = {asked: both for asked, both in expected.items() if both[0] != both[1]}
    found = rows_of(out)
    assert {row["prompt"][0]["content"]: (text_of(row, "rejected"), text_of(row, "chosen")) for row in found} == changed
    assert [row["prompt"] for row in found] == [[{"role": "user", "content": asked}] for asked in changed]
    # Nothing is left out in silence: every prompt is a pair or counted with its reason.
    left = re.search(r"^left out  (.*)$", result.output, re.M)[1]
    counts = {code: int(count) for count, code in re.findall(r"(\d+) ([a-z ]+) \(", left)}
    assert counts == {"unchanged": 2, "cut short": 1, "empty": 1}
    assert sum(counts.values()) + len(changed) == len(ASKED) and f"{len(changed)} pairs" in result.output
    assert f"by 'C': {len(changed)} times" in result.output
    before = out.read_bytes()
    refused = run(prompts, out, "--model", ending, "--replace", "a", "b")
    assert exit_code_of(refused.exception) == 2 and "output exists already" in str(refused.exception)
    assert run(prompts, out, "--model", ending, "--replace", "(?s)^.*$", "B", "--overwrite").exit_code == 0
    assert out.read_bytes() != before and len(rows_of(out)) == len(expected)


def test_every_layout_is_asked_up_to_its_last_answer_and_built_as_preferences(ending, tmp_path):
    rows = [row for name, (row, _, _) in ROWS.items() if name not in ("text", "bad")]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "out.jsonl"
    words = (prompts, out, "--model", ending, "--replace", "(?s)^.*$", "B", "--system", "S")
    assert run(*words).exit_code == 0
    asked = with_system(read_questions(prompts), "S")
    answers = {
        question.messages: answer.text
        for question, answer in zip(asked, generator_of(ending).answer_all(asked, batch_size=4), strict=True)
        if answer.reason == "stop" and answer.text.strip()
    }
    pairs = [record(row) for row in rows_of(out)]
    assert len({pair.chosen.messages[: pair.num_shared] for pair in pairs}) == len(answers) > 1
    for pair in pairs:
        assert isinstance(pair, Preference)
        prompt = pair.chosen.messages[: pair.num_shared]
        assert prompt[0].role == "system" and pair.chosen.messages[pair.num_shared :] == (Message("assistant", "B"),)
        assert pair.rejected.messages == (*prompt, Message("assistant", answers[prompt]))
    build([out], tmp_path / "set", tokenizer=ending)
    built = open_dataset(tmp_path / "set")
    assert built.kind == "preferences" and built.manifest["counts"]["rows"] == 2 * len(pairs)
    first = out.read_bytes()
    out.unlink()
    assert run(*words).exit_code == 0 and out.read_bytes() == first


def corrected(said):
    return {asked: f"better {number}" for number, asked in enumerate(said)}


def given_rows(way, said):
    better = corrected(said)
    if way == "in order":
        return [text if number % 2 else {"answer": text} for number, text in enumerate(better.values())]
    if way == "by prompt":
        rows = [{"prompt": asked, "completion": text} for asked, text in better.items()]
        return [
            {"messages": [{"role": "user", "content": "never asked"}, {"role": "assistant", "content": "?"}]},
            *rows[::-1],
        ]
    return [{"id": number, "chosen": text} for number, text in reversed(list(enumerate(better.values())))]


@pytest.mark.parametrize("way", ["in order", "by prompt", "by key"])
def test_a_file_has_the_better_answers(ending, said, tmp_path, way):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": text, "id": str(n)} for n, text in enumerate(ASKED)])
    answers = write(tmp_path / "answers.jsonl", given_rows(way, said))
    key = ("--key", "id") if way == "by key" else ()
    result = run(prompts, tmp_path / "out.jsonl", "--model", ending, "--answers", answers, *key)
    assert result.exit_code == 0, result.exception
    better = corrected(said)
    assert {row["prompt"][0]["content"]: text_of(row, "chosen") for row in rows_of(tmp_path / "out.jsonl")} == {
        asked: better[asked] for asked in whole(said)
    }
    assert ("1 answers to what is not asked" in result.output) == (way == "by prompt")


def test_a_better_model_has_the_better_answers(ending, said, tmp_path):
    def ends_sooner(content):
        content["lm_head.weight"][256] *= 1.6

    worse = copied(ending, tmp_path / "worse", tensors=ends_sooner)
    asked = [question_of(text) for text in ASKED]
    answers = {one.question.text: one for one in generator_of(worse).answer_all(asked, batch_size=1)}
    expected = {
        text: (better, whole(answers)[text])
        for text, better in whole(said).items()
        if text in whole(answers) and better != answers[text].text
    }
    assert expected, "this test would compare nothing"
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ASKED])
    result = run(prompts, tmp_path / "out.jsonl", "--model", worse, "--better", ending, "--batch-size", 2)
    assert result.exit_code == 0, result.exception
    found = {
        row["prompt"][0]["content"]: (text_of(row, "chosen"), text_of(row, "rejected"))
        for row in rows_of(tmp_path / "out.jsonl")
    }
    assert {asked: both for asked, both in found.items() if asked in whole(said)} == expected
    same = run(prompts, tmp_path / "same.jsonl", "--model", ending, "--better", ending)
    assert exit_code_of(same.exception) == 3 and "3 unchanged" in str(same.exception)
    assert not (tmp_path / "same.jsonl").exists()


def test_two_answers_that_make_no_pair():
    cases = [(None, "a"), ("a", None), ("a", " a\n"), ("", "a"), ("a", " "), ("a", "b\0"), ("a", "b")]
    reasons = [_reason(*case) for case in cases]
    assert reasons == ["cut short", "cut short", "unchanged", "empty", "empty", "no text", None]


def test_complaints_come_all_at_once(tmp_path):
    words = ("--replace", "(", "x", "--replace", "a", r"\1", "--answers", "nowhere.jsonl", "--better", "nowhere")
    error = run(tmp_path / "p.jsonl", tmp_path / "out.csv", "--model", tmp_path, *words).exception
    assert exit_code_of(error) == 2
    for part in ("--replace and --answers and --better were given", "'('", "invalid group reference 1", "out.jsonl"):
        assert part in str(error), part
    error = run(tmp_path / "p.jsonl", tmp_path / "out.jsonl", "--model", tmp_path, "--key", "id").exception
    assert "none was given" in str(error) and "--key says" in str(error)


@pytest.mark.parametrize(
    ("answers", "more", "expected"),
    [
        (["a"], (), [r"prompts.jsonl:2: prompt 2 has no answer, .*answers.jsonl has 1"]),
        (["a", "b", "c"], (), [r"answers.jsonl:3: this is answer 3, and there are 2 prompts"]),
        ([{"answer": ""}, 7], (), [r"answers.jsonl:1: the answer is empty", r"answers.jsonl:2: .* is a number"]),
        ([{"said": "a"}, "b"], (), [r"answers.jsonl:1: no answer: expected one of answer, .*; found said"]),
        ([{"prompt": "q0", "answer": "a"}, "b"], (), [r"answers.jsonl:2: some rows have a prompt"]),
        ([{"prompt": "q0", "answer": "a"}], (), [r"prompts.jsonl:2: .*answers.jsonl has no answer to it"]),
        (
            [{"prompt": "q0", "answer": a} for a in "ab"],
            (),
            [r"answers.jsonl:2: another answer to what .*answers.jsonl:1 answers"],
        ),
        ([{"id": 0, "answer": "a"}, {"answer": "b"}], ("--key", "id"), [r"answers.jsonl:2: the row has no .* 'id'"]),
    ],
)
def test_answers_that_do_not_fit_are_named(ending, tmp_path, answers, more, expected):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"q{n}", "id": n} for n in range(2)])
    file = write(tmp_path / "answers.jsonl", answers)
    error = run(prompts, tmp_path / "out.jsonl", "--model", ending, "--answers", file, *more).exception
    assert exit_code_of(error) == 3, error
    for pattern in expected:
        assert re.search(pattern, str(error)), (pattern, str(error))
    assert not (tmp_path / "out.jsonl").exists()


def test_both_models_are_looked_at_before_one_is_loaded(tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    words = ("--model", tmp_path / "one", "--better", tmp_path / "two")
    error = run(prompts, tmp_path / "out.jsonl", *words).exception
    assert exit_code_of(error) == 4 and "one: no such folder" in str(error) and "two: no such folder" in str(error)
