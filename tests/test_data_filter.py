"""Filtering: which rows stay, that no row is lost, and what can go wrong on the way."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from data_world import command, talk, write_rows, write_tokenizer

from data_preprocessing.build import build
from data_preprocessing.curate import pipeline
from data_preprocessing.curate.facts import facts_of
from data_preprocessing.curate.judges import TokenCounter
from data_preprocessing.curate.pipeline import filter_rows
from data_preprocessing.curate.step import Resources
from data_preprocessing.curate.steps import read_steps
from data_preprocessing.curate.survey import ReadOptions
from data_preprocessing.dataset import open_dataset
from data_preprocessing.reading import ReadReport, read_rows
from data_preprocessing.rows import Row
from toolkits.foundation.errors import DataError, UsageError, exit_code_of

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the of and in river stone lamp window green quiet seven market bread train paper cloud".split()  # noqa: SIM905
SKIP = ReadOptions(on_bad_row="skip", max_bad=0.9)


def steps_of(*said, split=None):
    steps, parts = read_steps(said, split)
    return {"steps": steps, "split": parts}


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def sentence(rng, words):
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


def many_rows(count, seed=0):
    """Return rows in several layouts, some of which say the same, nearly the same, refuse, or are short."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        question, answer = sentence(rng, 9), sentence(rng, 40)
        kind = rng.randrange(12)
        if kind == 1 and rows:
            row = rng.choice(rows)
        elif kind == 2:
            row = talk(question, "I'm sorry, but I can't help with that.")
        elif kind == 3:
            row = {"instruction": question, "output": "请问您想要怎么做？" * 2, "source": "zh"}
        elif kind == 4:
            row = {"instruction": question, "output": answer[:-1] + "!", "source": "near"}
            rows.append({"instruction": question, "output": answer})
        elif kind == 5:
            row = {"instruction": "привет", "output": "Как дела, что нового и где ты был?"}
        elif kind == 6:
            row = {"instruction": "hi", "output": "hi"}
        elif kind == 7:
            row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        else:
            row = {"instruction": question, "input": "", "output": answer, "source": f"s{number % 3}"}
        rows.append(row)
    return rows[:count]


EVERY_STEP = [
    "length:min=10,max=2000",
    "language:keep=en,zh",
    "exact",
    "near:threshold=0.9",
    "quality",
    "diverse:keep=100",
    "sample:n=20,per=language,seed=3",
]


def test_every_row_is_kept_or_rejected_exactly_once_and_in_order(tmp_path):
    rows = many_rows(300)
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0, indent=None).encode() for number, row in enumerate(rows)]
    lines[7:7], lines[200:200] = [b'{"messages": }'], [b'{"unknown": 1}', b"  ", b'{"text":"\xc4\xe3"}']
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\r\n".join(lines) + b"\n")
    report = filter_rows(
        [source], tmp_path / "out.jsonl", options=SKIP, **steps_of(*EVERY_STEP, split="valid=0.2,test=0.1,seed=5")
    )
    written = {name: (tmp_path / name).read_bytes().splitlines() for name in report["output"]}
    rejects = lines_of(tmp_path / "out.jsonl.rejects.jsonl")
    assert {entry["file"] for entry in rejects} == {str(source)}
    gone = [entry["line"] for entry in rejects]
    assert gone == sorted(set(gone))
    # What stays are the very bytes of the other lines, each part in their order.
    stays = [line for number, line in enumerate(lines, start=1) if number not in gone and line.strip()]
    assert sorted(line for part in written.values() for line in part) == sorted(stays)
    for part in written.values():
        places = iter(stays)
        assert all(line in places for line in part), "rows keep their order"
    for entry in rejects:
        line = lines[entry["line"] - 1]
        assert entry["row"] == line.decode("utf-8", "replace").rstrip("\r")
        assert entry["step"] in [*(step["step"] for step in report["steps"]), "reading"]
        assert entry["reason"] and entry["message"]
    assert [entry["line"] for entry in rejects if entry["step"] == "reading"] == [8, 201, 203]
    assert report["bad_rows"] == {"encoding": 1, "layout": 1, "syntax": 1}
    # The figures of the report are those of the files.
    assert report["dropped"] == len(rejects) and report["input"]["rows"] == len(rejects) + len(stays)
    assert {name: len(part) for name, part in written.items()} == report["output"]
    counts = [count for step in report["steps"] for count in (step["in"], step["out"])]
    assert counts == sorted(counts, reverse=True) and counts[1:-1:2] == counts[2::2]
    assert all(step["in"] - step["out"] == sum(step["dropped"].values()) for step in report["steps"])
    assert sum(bool(step["dropped"]) for step in report["steps"]) >= 6, "nearly every step has something to do here"
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text()) == report


def reference(rows, said):
    """Apply steps one behind the other on plain lists: what `filter_rows` must come to."""
    facts = [facts_of(number, row, **vars_of(SKIP)) for number, row in enumerate(rows)]
    for step in said:
        if step.startswith("length"):
            low, high = (int(pair.partition("=")[2]) for pair in step.partition(":")[2].split(","))
            facts = [row for row in facts if low <= len(row.row) <= high]
        elif step == "exact":
            seen = {}
            facts = [
                row for row in facts if seen.setdefault((row.prompt, tuple(row.answers)), row.number) == row.number
            ]
        else:
            (worker,) = [one.start(Resources()) for one in read_steps([step])[0]]
            facts = [row for row in facts if worker.judge([row])[0] is None]
    return [row.number for row in facts]


def vars_of(options):
    return {"encoding": options.encoding, "merge_consecutive": False, "columns": ()}


@pytest.mark.parametrize(
    "said",
    [
        ("length:min=60,max=275", "quality", "exact"),
        ("exact", "length:min=60,max=275", "quality"),
        ("quality:signs=refusal", "exact", "language:drop=zh"),
    ],
)
def test_steps_work_one_behind_the_other(tmp_path, said):
    source = write_rows(tmp_path / "in.jsonl", many_rows(200, seed=2))
    rows = list(read_rows(source, ReadReport()))
    filter_rows([source], tmp_path / "out.jsonl", **steps_of(*said))
    expected = reference(rows, said)
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(rows[number].data for number in expected)
    assert 0 < len(expected) < 200


def test_many_steps_in_one_run_are_one_run_for_each(tmp_path):
    said = ["exact", "near:threshold=0.9", "length:min=10", "diverse:keep=500", "quality:signs=refusal"]
    said += ["near:threshold=0.3,of=prompt", "language:drop=zh", "diverse:keep=300,of=answers", "length:max=330"]
    source = write_rows(tmp_path / "in.jsonl", many_rows(1200, seed=9))
    filter_rows([source], tmp_path / "at-once.jsonl", **steps_of(*said))
    last, rejects = source, []
    for number, step in enumerate(said):
        filter_rows([last], tmp_path / f"{number}.jsonl", **steps_of(step))
        last = tmp_path / f"{number}.jsonl"
        rejects += [(entry["step"], entry["reason"], entry["row"]) for entry in lines_of(f"{last}.rejects.jsonl")]
    assert (tmp_path / "at-once.jsonl").read_bytes() == last.read_bytes() != b""
    entries = lines_of(tmp_path / "at-once.jsonl.rejects.jsonl")
    assert sorted((entry["step"], entry["reason"], entry["row"]) for entry in entries) == sorted(rejects)
    assert len({step for step, _, _ in rejects}) >= 7


def test_what_steps_share_is_made_once_for_each_row():
    made = []

    def values(rows):
        made.extend(row.number for row in rows)
        return np.array([[row.number * 10, 1] for row in rows])

    column = Resources().column("key", values)
    rows = [facts_of(number, Row(1, {"text": "x"}), **vars_of(SKIP)) for number in (0, 2, 3, 5, 8, 9)]
    for batch in (rows[:3], rows[1:2], rows[3:], rows[4:], []):
        column.remember(batch)
    assert made == [0, 2, 3, 5, 8, 9]
    assert column.of(np.array([0, 2, 3, 5, 8, 9]))[:, 0].tolist() == [0, 20, 30, 50, 80, 90]
    assert column.of(np.array([2, 8, 9]))[:, 0].tolist() == [20, 80, 90]


def test_a_row_goes_by_the_first_step_that_drops_it(tmp_path):
    # The second is a duplicate, and like the first too short.
    rows = [
        talk("q", "I cannot help with that."),
        talk("q", "I cannot help with that."),
        talk("q", "A long answer. " * 9),
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    filter_rows([source], tmp_path / "a.jsonl", **steps_of("exact", "length:min=50"))
    filter_rows([source], tmp_path / "b.jsonl", **steps_of("length:min=50", "exact"))
    rejects = [lines_of(tmp_path / f"{name}.jsonl.rejects.jsonl") for name in "ab"]
    said = [[(entry["line"], entry["reason"]) for entry in one] for one in rejects]
    assert said == [[(1, "short"), (2, "duplicate")], [(1, "short"), (2, "short")]]
    assert rejects[0][1]["message"] == f"the same row as {source}:1"
    for said in (("quality", "length:min=50"), ("length:min=50", "quality")):
        filter_rows([source], tmp_path / "c.jsonl", overwrite=True, **steps_of(*said))
        steps = [entry["step"] for entry in lines_of(tmp_path / "c.jsonl.rejects.jsonl")]
        assert steps == [said[0]] * 2, "both steps refuse both rows"


def test_exact_duplicates_are_found_across_layouts_and_tools_tell_rows_apart(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [{"instruction": "q", "output": "a"}, {"messages": turns}, {"messages": turns, "tools": tools}]
    rows += [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    rows += [{"messages": turns, "label": True}, {"messages": turns, "label": False}]
    report = filter_rows([write_rows(tmp_path / "in.jsonl", rows)], tmp_path / "out.jsonl", **steps_of("exact"))
    assert [entry["line"] for entry in lines_of(tmp_path / "out.jsonl.rejects.jsonl")] == [2, 4]
    assert report["output"] == {"out.jsonl": 4}


def test_rows_without_a_prompt_or_an_answer_are_no_duplicates_of_each_other(tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "one"}])
    prompts = [{"prompt": f"question {n}", "answer": "a"} for n in range(3)]
    asked = write_rows(tmp_path / "prompts.jsonl", prompts)
    for step in ("exact", "near"):
        for source, part in ((texts, "prompt"), (asked, "answers")):
            report = filter_rows([source], tmp_path / "out.jsonl", overwrite=True, **steps_of(f"{step}:of={part}"))
            assert report["dropped"] == 0
        report = filter_rows([texts], tmp_path / "out.jsonl", overwrite=True, **steps_of(f"{step}:of=answers"))
        assert report["dropped"] == 1


def test_the_same_bytes_whatever_python_hashes(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", many_rows(120))
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        words = [word for step in EVERY_STEP for word in ("--step", step)]
        code, said, errors = command(
            "filter", source, folder / "out.jsonl", *words, "--split", "valid=0.2", hash_seed=seed
        )
        assert code == 0, errors
        found.append([said.replace(str(folder), ""), *(path.read_bytes() for path in sorted(folder.iterdir()))])
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_a_killed_writer_leaves_the_old_output_whole(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", many_rows(150))
    said = ["filter", source, tmp_path / "out.jsonl", "--step", "exact", "--split", "valid=0.1"]
    assert command(*said)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # It kills itself at the hundredth row that it copies.
    script = (
        "import os, signal; from data_preprocessing.curate import pipeline; write, seen = pipeline.line_of, []\n"
        "def line_of(*what):\n    seen.append(1)\n    len(seen) > 99 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*what)\n"
        "pipeline.line_of = line_of; from toolkits.cli import main; main()"
    )
    words = [sys.executable, "-c", script, "data", *map(str, said), "--overwrite", "--step", "quality"]
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert (tmp_path / ".tmp-out" / "out.jsonl").exists(), "it was at work"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name[0] != "."} == before
    assert command(*said, "--overwrite")[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failing_writer_leaves_nothing(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "in.jsonl", many_rows(30))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "line_of", fail)
    with pytest.raises(OSError, match="No space left"):
        filter_rows([source], tmp_path / "out.jsonl", **steps_of("exact"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_existing_outputs_and_inputs_are_not_written_over(tmp_path):
    source, out = write_rows(tmp_path / "in.jsonl", many_rows(60)), tmp_path / "out.jsonl"
    filter_rows([source], out, **steps_of("exact", split="valid=0.1,test=0.1"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"output exists already: .*out.jsonl; use --overwrite"):
        filter_rows([source], out, **steps_of("exact"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # A part that the new output lacks would be taken for one of it.
    filter_rows([source], out, overwrite=True, **steps_of("exact", split="valid=0.1"))
    names = ["in.jsonl", "out.jsonl", "out.jsonl.rejects.jsonl", "out.jsonl.report.json", "out.valid.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for read, split in ((source, None), (out.with_name("out.valid.jsonl"), "valid=0.1")):
        with pytest.raises(UsageError, match=rf"{read}: the input would be written over"):
            filter_rows([read], out if split else read, overwrite=True, **steps_of("exact", split=split))
    with pytest.raises(UsageError, match=r"the output is JSONL, one row a line; call it out.jsonl"):
        filter_rows([source], tmp_path / "out.csv", **steps_of("exact"))


def test_a_build_beside_it_takes_nothing_away(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [talk("q", "a"), talk("q", "a")])
    filter_rows([source], tmp_path / "out.jsonl", **steps_of("exact"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    build(tmp_path / "out.jsonl", tmp_path / "out", tokenizer=write_tokenizer(tmp_path / "tokenizer"))
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}.items()


def test_what_cannot_be_read_twice_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in ("-", tmp_path / "pipe"):
        with pytest.raises(UsageError, match="read twice, which a pipe cannot be; put it into a file first"):
            filter_rows([source], tmp_path / "out.jsonl", **steps_of("exact"))


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "in.jsonl", many_rows(30))
    write = pipeline.line_of

    def append(*what):
        with open(source, "a") as file:
            file.write(json.dumps(talk("one", "more")) + "\n")
        return write(*what)

    monkeypatch.setattr(pipeline, "line_of", append)
    with pytest.raises(DataError, match=r"in.jsonl: the input changed while it was read"):
        filter_rows([source], tmp_path / "out.jsonl", **steps_of("exact"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_rows_stop_or_are_skipped_as_in_a_build(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [*many_rows(18), {"x": 1}, talk("q", "")])
    with pytest.raises(DataError, match=rf"{source}:19: no known layout.*--on-bad-row skip") as caught:
        filter_rows([source], tmp_path / "out.jsonl", **steps_of("exact"))
    assert exit_code_of(caught.value) == 3
    strict = ReadOptions(on_bad_row="skip", max_bad=0.05)
    said = (
        r"2 of 20 rows are bad \(10.00%, --max-bad allows 5.00%\): layout 1, empty_answer 1; the first: .*in.jsonl:19"
    )
    with pytest.raises(DataError, match=said):
        filter_rows([source], tmp_path / "out.jsonl", options=strict, **steps_of("exact"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_filter_that_keeps_nothing_says_what_each_step_left(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [talk("q", "a"), talk("q", "a")])
    with pytest.raises(DataError, match=r"no row stays of 2: exact left 1; length:min=100 left 0; loosen a step"):
        filter_rows([source], tmp_path / "out.jsonl", **steps_of("exact", "length:min=100"))
    with pytest.raises(UsageError, match="nothing to do: give --step, --split or --recipe"):
        filter_rows([source], tmp_path / "out.jsonl", **steps_of())


def test_rows_of_any_format_come_out_as_the_same_values(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [{"instruction": "问题一", "output": "café 1.50", "n": [1, 2.0, None]}, {"instruction": "q", "output": "a"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (tmp_path / "rows.csv").write_text('instruction,output\nq,"a, b"\n', encoding="utf-8")
    for name, expected in (
        ("list.json", rows),
        ("rows.jsonl.gz", rows),
        ("rows.csv", [{"instruction": "q", "output": "a, b"}]),
    ):
        filter_rows([tmp_path / name], tmp_path / "out.jsonl", overwrite=True, **steps_of("exact"))
        assert lines_of(tmp_path / "out.jsonl") == expected
    gbk = tmp_path / "gbk.jsonl"
    gbk.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:1]).encode("gb18030"))
    options = ReadOptions(encoding="gb18030")
    filter_rows([gbk], tmp_path / "out.jsonl", overwrite=True, options=options, **steps_of("exact"))
    assert lines_of(tmp_path / "out.jsonl") == rows[:1]


def test_tokens_are_counted_as_a_build_makes_them(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    pair = {"prompt": "hello", "chosen": "a long answer, world", "rejected": "no"}
    answered = {"prompt": "hello 1234?", "answer": "2"}
    kinds = {"talk": [talk("hello", "你好 world", "a", "b" * 30), talk("x", "y", system="s")], "pair": [pair]}
    kinds |= {"text": [{"text": "the cat sat on the mat " * 9}, {"text": "a"}], "prompt": [answered]}
    for kind, rows in kinds.items():
        source = write_rows(tmp_path / f"{kind}.jsonl", rows)
        build(source, tmp_path / kind, tokenizer=tokenizer)
        lengths = [int(length) for length in open_dataset(tmp_path / kind).lengths]
        if kind == "pair":
            assert lengths[0] != lengths[1]
            lengths = [max(lengths)]
        facts = [facts_of(n, row, **vars_of(SKIP)) for n, row in enumerate(read_rows(source, ReadReport()))]
        assert TokenCounter(tokenizer).count(facts) == lengths
    said = steps_of(f"length:max={lengths[0]},unit=tokens")
    report = filter_rows([source], tmp_path / "out.jsonl", resources=Resources(tokenizer), **said)
    assert report["output"] == {"out.jsonl": 1}
    with pytest.raises(UsageError, match="length:unit=tokens needs --tokenizer"):
        filter_rows([source], tmp_path / "other.jsonl", **said)
