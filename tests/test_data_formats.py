"""The layouts that rows come in, what they become on disk, and the files that they come in."""

import gzip
import json
import math
import sys

import pytest
from click.testing import CliRunner
from data_world import (
    PAIRS,
    TEMPLATES,
    TOOLS_TEMPLATE,
    talk,
    trained_of,
    write_rows,
    write_tokenizer,
)

from data_preprocessing import reading
from data_preprocessing.build import BuildOptions, build
from data_preprocessing.dataset import open_dataset
from data_preprocessing.reading import ReadReport, find_inputs, read_batches, read_files
from data_preprocessing.records import conversation, record
from data_preprocessing.row_error import RowError
from data_preprocessing.rows import Row, parse_row
from data_preprocessing.tokenizer import load_tokenizer
from toolkits.commands.data import data
from toolkits.foundation.errors import DataError, UsageError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "三"]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), TOOLS_TEMPLATE)


def test_sharegpt_calls_are_those_of_openai():
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
        "tools": json.dumps([TOOL["function"]]),
        "system": "S",
    }
    text = json.dumps(CALL["function"]["arguments"])
    openai = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": text}}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [TOOL],
    }  # fmt: skip
    one, other = conversation(sharegpt), conversation(openai)
    assert one.messages == other.messages
    assert one.tools == other.tools == (TOOL,)
    assert one.messages[2].tool_calls == (CALL,)


def test_calls_are_trained_and_results_are_not(tmp_path, tokenizer):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "so: ", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "both", "reasoning_content": "thus"},
    ]
    build(write_rows(tmp_path / "rows", [{"messages": turns, "tools": [TOOL]}]), tmp_path / "out", tokenizer=tokenizer)
    dataset = open_dataset(tmp_path / "out")
    written = '[add{"a": 1, "b": [2, "三"]}]'
    assert trained_of(dataset, tokenizer, 0) == f"so: {written}{written}<|im_end|><think>thus</think>both<|im_end|>"


@pytest.mark.parametrize(
    ("turns", "reason", "said"),
    [
        ([("tool", {})], "turns", "turn 1 is tool; the first turn"),
        ([("user", {}), ("assistant", {}), ("tool", {})], "turns", "turn 3 is the result of a tool that no call"),
        (
            [("user", {}), ("assistant", {"tool_calls": [CALL]}), ("tool", {}), ("tool", {})],
            "turns",
            "turn 4 is the result of a tool that no call",
        ),
        (
            [("user", {}), ("assistant", {"tool_calls": [CALL]}), ("tool", {}), ("user", {})],
            "turns",
            "turn 4 is user behind tool; assistant or tool must follow",
        ),
        ([("user", {"tool_calls": [CALL]})], "role", r"messages\[0\] is user, and only an assistant calls tools"),
        ([("user", {}), ("assistant", {"tool_calls": [1]})], "tools", r"tool_calls\[0\] must be an object with name"),
        (
            [("user", {}), ("assistant", {"tool_calls": [{"name": "f", "arguments": "{"}]})],
            "tools",
            r"messages\[1\].tool_calls\[0\].arguments is text that is not JSON",
        ),
        (
            [("user", {}), ("assistant", {"tool_calls": [{"name": "f", "arguments": "[1]"}]})],
            "tools",
            r"arguments must be an object, it is list",
        ),
        (
            [("user", {}), ("assistant", {"tool_calls": [{"name": "f", "arguments": {"a": "\0"}}]})],
            "character",
            r"messages\[1\].tool_calls\[0\].arguments.a has a NUL character",
        ),
        (
            [("user", {}), ("assistant", {"loss": 0.01})],
            "type",
            r"messages\[1\].loss must be .* weight from 0.02 to 2.55",
        ),
        (
            [("user", {}), ("assistant", {"weight": 2.6})],
            "type",
            r"messages\[1\].weight must be true, false or a weight",
        ),
        ([("user", {}), ("assistant", {"loss": math.nan})], "type", r"messages\[1\].loss must be true, false or a w"),
        ([("user", {}), ("assistant", {"loss": "0.5"})], "type", r"messages\[1\].loss must be true, false or a weight"),
    ],
)
def test_turns_of_tools_that_do_not_fit_are_named(turns, reason, said):
    row = {"messages": [{"role": role, "content": "x", **more} for role, more in turns]}
    with pytest.raises(RowError, match=said) as caught:
        conversation(row)
    assert caught.value.reason == reason


def test_tools_must_be_a_list_of_objects():
    for tools, said in (("{", "tools is text that is not JSON"), ({"name": "f"}, "tools must be a list of objects")):
        with pytest.raises(RowError, match=said):
            conversation({**talk("q", "a"), "tools": tools})


def test_what_the_template_does_not_write_is_an_error(tmp_path):
    row = {**talk("q", "a"), "tools": [TOOL]}
    with pytest.raises(DataError, match="a tool of `tools` is not in the rendered text"):
        build(write_rows(tmp_path / "a", [row]), tmp_path / "o", tokenizer=write_tokenizer(tmp_path / "t"))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [CALL]}]
    with pytest.raises(DataError, match=r"the call of a tool in turn 2 \(assistant\) is not in the rendered text"):
        build(write_rows(tmp_path / "a", [{"messages": turns}]), tmp_path / "o", tokenizer=tmp_path / "t")
    turns[1] = {"role": "assistant", "content": "a", "reasoning_content": "why"}
    with pytest.raises(DataError, match=r"the reasoning of turn 2 \(assistant\) is not in the rendered text"):
        build(write_rows(tmp_path / "a", [{"messages": turns}]), tmp_path / "o", tokenizer=tmp_path / "t")


def test_control_text_in_calls_and_tools_stays_text(tmp_path, tokenizer):
    said = "<|im_end|>"
    call = {"name": "add", "arguments": {said: [said]}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"messages": turns, "tools": [{"name": f"f{said}"}]}
    manifest = build(write_rows(tmp_path / "rows", [row]), tmp_path / "out", tokenizer=tokenizer)
    assert manifest["control_text"] == {"texts": 3, "rows": 1}
    dataset = open_dataset(tmp_path / "out")
    end = load_tokenizer(tokenizer).ids[said]
    assert (dataset.tokens(0) == end).sum() == 2
    assert trained_of(dataset, tokenizer, 0) == '[add{"<|im_end|>": ["<|im_end|>"]}]<|im_end|>'


def test_other_names_of_columns(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows", [{"question": "q", "reply": "a", "output": "not this"}])
    words = ["build", str(source), str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    done = CliRunner().invoke(data, [*words, "--columns", "instruction=question, output=reply"])
    assert done.exit_code == 0, done.output
    assert trained_of(open_dataset(tmp_path / "out"), tokenizer, 0) == "a<|im_end|>"
    with pytest.raises(RowError, match="--columns names nothing, which this row does not have; it has prompt"):
        record({"prompt": 1}, columns=(("instruction", "nothing"),))
    for wrong, said in (("a", "'a' is not of the form"), ("a=b,a=c", "a is named twice")):
        done = CliRunner().invoke(data, [*words, "--columns", wrong])
        assert done.exit_code == 2 and said in done.output


def values(paths, **options):
    report = ReadReport()
    found = [parse_row(row, **options) for row in read_files(paths, report, **options)]
    return found, report


def test_packed_files_patterns_and_stdin(tmp_path, monkeypatch):
    rows = [talk("问", f"a{number}") for number in range(700)]
    plain = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    paths = find_inputs([tmp_path / "a.jsonl", str(tmp_path / "*.gz")])
    found, report = values(paths)
    assert found == rows * 3
    assert report.kinds == ["JSONL", "JSONL (gzip)", "JSON list (gzip)"]
    assert report.bytes_read == sum(path.stat().st_size for path in paths)
    with open(plain, "rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert values(find_inputs(["-"]))[0] == rows
    with pytest.raises(DataError, match="no file matches the pattern"):
        find_inputs([tmp_path / "*.nothing"])
    with pytest.raises(DataError, match="nowhere: no such file"):
        find_inputs([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match=r"a\.jsonl: named more than once"):
        find_inputs([plain, str(tmp_path / "a.*")])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(plain.read_bytes())[:-20])
    with pytest.raises(DataError, match="the gzip file is damaged or incomplete"):
        values([tmp_path / "cut.gz"])


def test_what_stands_in_front_of_a_fault_is_read(tmp_path):
    lines = "".join(json.dumps(talk("q", f"a{number}")) + "\n" for number in range(200)).encode()
    packed = gzip.compress(lines)
    files = {"list.json": b'[5,\n{"a": 1},\n{"x" 1}]', "rows.csv": b"a,b\n1,2\n3,4\n5\n", "cut.gz": packed[:-9]}
    for (name, content), count in zip(files.items(), (2, 2, 200), strict=True):
        (tmp_path / name).write_bytes(content)
        found = []
        with pytest.raises(DataError):
            for row in read_files([tmp_path / name], ReadReport()):
                found.append(row.line)
        assert len(found) == count


def test_a_few_long_values_are_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BATCH_BYTES", 1000)
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f"{'x' * 400}\n" for _ in range(10)))
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "x" * 400}] * 10))
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "{"x" * 400}"}}\n' * 10)
    for path in tmp_path.iterdir():
        assert [len(batch) for batch in read_batches([path], ReadReport())] == [3, 3, 3, 1]


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**64, 123456789012345678901234567890])
def test_large_integers_are_exact(tmp_path, number):
    assert parse_row(Row(1, f'{{"n": {number}}}'.encode())) == {"n": number}
    with pytest.raises(RowError, match="limit"):
        parse_row(Row(1, b"[" + b"1" * 9000 + b"]"))
    (tmp_path / "list").write_bytes(b"[" + b"1" * 9000 + b"]")
    with pytest.raises(DataError, match=r"list:1: .*limit"):
        values([tmp_path / "list"])
    call = {"type": "function", "function": {"name": "f", "arguments": {"n": number}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]
    source = write_rows(tmp_path / "rows", [talk("q", "a"), {"messages": turns}])
    template = "{% for m in messages %}{{ m.role + m.content + (m.tool_calls | tojson if m.tool_calls else '') }}"
    folder = write_tokenizer(tmp_path / "t", template + "{{ '<|im_end|>' }}{% endfor %}")
    build(source, tmp_path / "out", tokenizer=folder)
    text = load_tokenizer(folder).encoder.decode(open_dataset(tmp_path / "out").tokens(1))
    assert f'"n": {number}' in text


def test_parquet_and_zstd(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [talk("q", f"a{number}") for number in range(30)] + [{"messages": talk("q", "b")["messages"], "system": "S"}]
    parquet.write_table(arrow.Table.from_pylist(rows[::-1]), tmp_path / "rows.any")
    found, report = values([tmp_path / "rows.any"])
    assert found == rows[::-1] and report.kind == "Parquet"
    with arrow.CompressedOutputStream(str(tmp_path / "rows.zst"), "zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    found, report = values([tmp_path / "rows.zst"])
    assert found == rows and report.kind == "JSONL (zstd)"
    (tmp_path / "bad").write_bytes((tmp_path / "rows.any").read_bytes()[:-30])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        values([tmp_path / "bad"])


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('instruction,output,system\n"a, ""b""\nc",d,\ne,f,S\n')
    found, report = values([path])
    assert found == [{"instruction": 'a, "b"\nc', "output": "d"}, {"instruction": "e", "output": "f", "system": "S"}]
    assert report.kind == "CSV"
    assert [row.line for row in read_files([path], ReadReport())] == [2, 4]
    for content, said in (
        ("a,b\n1\n", "rows.csv:2: 1 values for 2 columns; quote values"),
        ("a,a\n1,2\n", "a name stands twice"),
        ('a,b\n"1" 2,3\n', "rows.csv:2: not CSV"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=said):
            values([path])
    path.write_bytes("a,b\n你,好\n".encode("gbk"))
    with pytest.raises(DataError, match="try --encoding gb18030"):
        values([path])
    assert values([path], encoding="gbk")[0] == [{"a": "你", "b": "好"}]


def test_a_bad_row_is_found_in_its_file(tmp_path, tokenizer):
    good = write_rows(tmp_path / "good.jsonl", [talk("q", "a")] * 3)
    bad = write_rows(tmp_path / "bad.jsonl", [talk("q", "a"), {"x": 1}])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no known layout"):
        build([good, bad], tmp_path / "out", tokenizer=tokenizer)
    options = BuildOptions(on_bad_row="skip", max_bad=0.5)
    manifest = build([good, bad], tmp_path / "out", tokenizer=tokenizer, options=options)
    assert manifest["input"]["name"] == "good.jsonl, bad.jsonl"
    [reject] = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert (reject["file"], reject["line"]) == (str(bad), 2)


def test_which_answers_are_trained(tmp_path):
    folder = write_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    row = talk("q", "one", "q", "two", "q", "three")
    row["messages"][1]["loss"] = False
    row["messages"][3]["weight"] = 1
    source = write_rows(tmp_path / "rows", [row])
    expected = {"all": "two<|im_end|>three<|im_end|>", "last": "three<|im_end|>", "marked": "two<|im_end|>"}
    for train_on, trained in expected.items():
        options = BuildOptions(train_on=train_on)
        build(source, tmp_path / train_on, tokenizer=folder, options=options)
        assert trained_of(open_dataset(tmp_path / train_on), folder, 0) == trained
    with pytest.raises(DataError, match="rows:1: no token of this row is trained"):
        unmarked = write_rows(tmp_path / "rows", [talk("q", "a")])
        build(unmarked, tmp_path / "none", tokenizer=folder, options=BuildOptions(train_on="marked"))
    with pytest.raises(UsageError, match="--train-on last is for conversations; preference pairs have their own rule"):
        pairs = write_rows(tmp_path / "pairs", PAIRS)
        build(pairs, tmp_path / "none", tokenizer=folder, options=BuildOptions(train_on="last"))


def test_marks_that_cannot_be_told_apart_are_an_error(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content[:1] }}{% endgeneration %}"
        "{% generation %}{{ m.content[1:] + '</s>' }}{% endgeneration %}{% else %}{{ m.content + '</s>' }}{% endif %}"
        "{% endfor %}"
    )
    folder = write_tokenizer(tmp_path / "t", template)
    source = write_rows(tmp_path / "rows", [talk("q", "one", "q", "two")])
    with pytest.raises(DataError, match="marks 4 spans as generated for 2 answers, which are not all trained alike"):
        build(source, tmp_path / "out", tokenizer=folder, options=BuildOptions(train_on="last"))


def test_stdin_builds(tmp_path, tokenizer):
    import subprocess

    lines = "".join(json.dumps(talk("q", "a")) + "\n" for _ in range(5))
    script = "from toolkits.cli import main; main()"
    words = [sys.executable, "-c", script, "data", "build", "-", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    done = subprocess.run(words, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stdin: JSONL, 5 rows" in done.stdout
