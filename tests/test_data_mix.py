"""Mixing files by weight: which row stands where, how often inputs repeat, and what is refused."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from data_world import talk, write_rows

from data_preprocessing.blend import Part
from data_preprocessing.curate.mix import mix_rows, parse_parts
from data_preprocessing.curate.survey import ReadOptions
from toolkits.commands.data import data
from toolkits.foundation.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[1]


def write_set(folder, name, count):
    return write_rows(folder / f"{name}.jsonl", [talk(f"{name} {number}", "a") for number in range(count)])


def mixed(folder, *parts, **how):
    """Mix files and return the report, and (set, number) of each row of the output."""
    report = mix_rows(parse_parts([f"{path}={weight}" for path, weight in parts]), folder / "out.jsonl", **how)
    said = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row["messages"][0]["content"].split() for row in said]
    return report, [(name, int(number)) for name, number in rows]


def test_no_beginning_is_off_its_weights_by_a_row(tmp_path):
    a, b, c = (write_set(tmp_path, name, count) for name, count in (("a", 300), ("b", 90), ("c", 50)))
    report, rows = mixed(tmp_path, (a, 0.7), (b, 0.2), (c, 0.1))
    given = Counter()
    for place, (name, number) in enumerate(rows, start=1):
        assert number == given[name], "each set gives its rows in the order of its file"
        given[name] += 1
        for other, weight in (("a", Fraction(7, 10)), ("b", Fraction(2, 10)), ("c", Fraction(1, 10))):
            assert abs(weight * place - given[other]) < 1
    # As long as no set repeats: the next row would be the 301st of a.
    assert given["a"] == 300
    assert len(rows) == report["rows"] < 431
    more, _ = mixed(tmp_path, (a, 0.7), (b, 0.2), (c, 0.1), rows=len(rows) + 1, overwrite=True)
    assert max(part["times"] for part in more["parts"]) > 1 >= max(part["times"] for part in report["parts"])
    assert [part["used_up_after"] for part in report["parts"]] == [1 + rows.index(("a", 299)), None, None]


def test_a_set_that_is_used_up_starts_again_and_that_is_told(tmp_path):
    a, b = write_set(tmp_path, "a", 40), write_set(tmp_path, "b", 3)
    report, rows = mixed(tmp_path, (a, 0.75), (b, 0.25), rows=40)
    assert [number for name, number in rows if name == "b"] == [0, 1, 2] * 3 + [0]
    assert [number for name, number in rows if name == "a"] == list(range(30))
    one, other = report["parts"]
    assert one == {"input": str(a), "weight": "0.75", "rows": 40, "given": 30, "times": 0.75, "used_up_after": None}
    assert other["given"] == 10 and other["times"] == 3.3333
    assert rows[: other["used_up_after"]][-1] == ("b", 2) and other["used_up_after"] == 1 + rows.index(("b", 2))
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text()) == report


def test_a_seed_shuffles_every_pass_anew(tmp_path):
    a, b = write_set(tmp_path, "a", 12), write_set(tmp_path, "b", 5)
    _, plain = mixed(tmp_path, (a, 1), (b, 1), rows=48)
    drawn = [mixed(tmp_path, (a, 1), (b, 1), rows=48, seed=seed, overwrite=True)[1] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # The sets come in the same places; each pass over one has all of its rows, in an order of its own.
    assert [name for name, _ in drawn[0]] == [name for name, _ in plain]
    of_a = [number for name, number in drawn[0] if name == "a"]
    passes = [of_a[:12], of_a[12:]]
    assert [sorted(one) for one in passes] == [list(range(12))] * 2
    assert passes[0] != passes[1] and list(range(12)) not in passes


def test_rows_are_copied_as_they_are_from_any_format(tmp_path):
    row = '{"instruction":"问 1",  "output":"caf\\u00e9 1.50"}'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n{row}".encode())
    value = json.loads(row)
    (tmp_path / "b.json").write_text(json.dumps([value, value], indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(f"{row}\n{row}\n".encode()))
    for number in (1, 2):
        (tmp_path / f"d{number}.jsonl").write_text(row + "\n")
    words = [f"{tmp_path / name}=1" for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d?.jsonl")]
    mix_rows(parse_parts(words), tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines.count(row) == 6 and [json.loads(line) for line in lines] == [value] * 8
    (tmp_path / "e.jsonl").write_bytes(f"{row}\n".encode("gb18030"))
    mix_rows(
        parse_parts([f"{tmp_path / 'e.jsonl'}=1"]),
        tmp_path / "g.jsonl",
        options=ReadOptions(encoding="gb18030"),
        rows=2,
    )
    assert (tmp_path / "g.jsonl").read_text(encoding="utf-8") == f"{row}\n" * 2
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "."]


def test_bad_rows_stop_or_are_skipped(tmp_path):
    a, b = write_set(tmp_path, "a", 9), write_rows(tmp_path / "b.jsonl", [talk("b 0", "a"), {"x": 1}, talk("b 1", "a")])
    with pytest.raises(DataError, match=rf"{b}:2: no known layout"):
        mixed(tmp_path, (a, 1), (b, 1))
    skip = ReadOptions(on_bad_row="skip", max_bad=0.1)
    report, rows = mixed(tmp_path, (a, 1), (b, 1), options=skip)
    assert [number for name, number in rows if name == "b"] == [0, 1] and report["bad_rows"] == {"layout": 1}
    (entry,) = [json.loads(line) for line in (tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines()]
    assert (entry["file"], entry["line"], entry["reason"], entry["row"]) == (str(b), 2, "layout", '{"x": 1}')
    strict = ReadOptions(on_bad_row="skip", max_bad=0.05)
    with pytest.raises(DataError, match=r"1 of 12 rows are bad \(8.33%, --max-bad allows 5.00%\)"):
        mixed(tmp_path, (a, 1), (b, 1), options=strict, overwrite=True)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl: no good row to mix"):
        mixed(tmp_path, (a, 1), (tmp_path / "empty.jsonl", 1), overwrite=True)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(rows), "the old output is still there"


def test_rows_of_several_kinds_are_not_mixed(tmp_path):
    a, b = write_set(tmp_path, "a", 2), write_rows(tmp_path / "b.jsonl", [{"text": "t"}])
    with pytest.raises(DataError, match=r"rows of one kind.*a.jsonl: conversations; .*b.jsonl: plain texts"):
        mixed(tmp_path, (a, 1), (b, 1))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["a.jsonl"], r"'a.jsonl' is not IN=WEIGHT with a weight above 0, as in chats.jsonl=0.7"),
        (["a=0", "b=-1", "c=x", "=1"], "4 problems"),
        (["a=0.7000001", "b=0.3"], "repeat after 10,000,001 rows, 100,000 at most"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(words, complaint):
    with pytest.raises(UsageError, match=complaint):
        parse_parts(words)


def test_inputs_are_named_once_and_not_written_over(tmp_path):
    a = write_set(tmp_path, "a", 2)
    assert parse_parts(["x=y=0.5"]) == (Part(Path("x=y"), Fraction(1, 2)),)
    with pytest.raises(UsageError, match="named more than once"):
        mixed(tmp_path, (a, 1), (a, 2))
    with pytest.raises(UsageError, match="the input would be written over"):
        mix_rows(parse_parts([f"{a}=1"]), a, overwrite=True)
    mixed(tmp_path, (a, 1))
    with pytest.raises(UsageError, match="output exists already"):
        mixed(tmp_path, (a, 1))


def test_the_command_tells_what_it_gave_and_gives_the_same_bytes(tmp_path):
    a, b = write_set(tmp_path, "a", 70), write_set(tmp_path, "b", 10)
    words = ["mix", f"{a}=0.7", f"{b}=0.3", str(tmp_path / "out.jsonl"), "--rows", "100", "--seed", "3"]
    done = CliRunner().invoke(data, words, catch_exceptions=False)
    assert f"input     {a}: weight 0.7, 70 rows, gave 70 (each 1.00 times), used up after row" in done.output
    assert f"input     {b}: weight 0.3, 10 rows, gave 30 (each 3.00 times), used up after row" in done.output
    assert f"written   {tmp_path / 'out.jsonl'}: 100 rows" in done.output
    before = (tmp_path / "out.jsonl").read_bytes()
    script = "from toolkits.cli import main; main()"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    again = [sys.executable, "-c", script, "data", *words, "--overwrite"]
    assert subprocess.run(again, cwd=ROOT, env=environment, capture_output=True).returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before
