"""`temper data check`: each thing that it finds is found where it is, counted and located, and not where it is not."""

import json
import random

import pytest
from audit_world import checker, clean_pairs, clean_rows, lines_of, only, prose
from click.testing import CliRunner
from data_world import talk, write_rows, write_tokenizer

from data_preprocessing.audit.findings import HARMFUL, WARNINGS
from data_preprocessing.audit.run import AuditOptions, audit
from data_preprocessing.build import build
from data_preprocessing.chunks import BuildOptions
from toolkits.commands.data_check import check
from toolkits.foundation.errors import DataError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def found(tmp_path, tokenizer):
    """What checks rows and returns the report; see `checker`."""
    return checker(tmp_path, tokenizer)


# ---------------------------------------------------------------------------------------- silence and facts


@pytest.mark.parametrize("built", [False, True])
def test_nothing_is_found_in_good_rows(found, built):
    report = found(clean_rows(), valid=[talk(prose(900), prose(901))], built=built, seq_lens=(4096,))
    assert report.findings == () and report.harmful == []
    assert report.facts["rows"] == 30 and report.valid["rows"] == 1


@pytest.mark.parametrize("built", [False, True])
def test_nothing_is_found_in_good_pairs(found, built):
    assert found(clean_pairs(), built=built).findings == ()


def test_files_and_the_dataset_built_of_them_have_the_same_facts(found):
    rows = [talk("hello", "你好，世界。今天天气很好", "a cat", "the mat"), *clean_rows(8)]
    files, built = found(rows).facts, found(rows, built=True).facts
    for key in ("rows", "tokens", "trained_tokens", "lengths", "seq_lens", "answers_end_with", "formats"):
        assert files[key] == built[key], key
    assert files["formats"] == {"messages": 9} and files["answers_end_with"][0]["answers"] == 10


def test_formats_and_languages_are_counted(found):
    rows = [
        talk("What is the name of the river in this town?", "It is the Rhine, and it is very long."),
        {"instruction": "今天天气怎么样？", "output": "今天天气很好，我们去公园吧。"},
        {"instruction": "你叫什么名字？", "output": "我的名字是小明，很高兴认识你。"},
    ]
    facts = found(rows).facts
    assert facts["formats"] == {"alpaca": 2, "messages": 1} and facts["languages"] == {"zh": 2, "en": 1}


def test_every_code_is_listed_once():
    assert len({*HARMFUL, *WARNINGS}) == len(HARMFUL) + len(WARNINGS)


# ---------------------------------------------------------------------------------------- bad rows


def test_bad_rows_are_counted_by_reason_with_the_first_places(found):
    rows = clean_rows(5)
    rows[2] = {"messages": [{"role": "robot", "content": "x"}]}
    rows[4] = {"nothing": 1}
    finding = only(found(rows), "bad_rows")
    assert finding.count == 2 and finding.more == {"reasons": {"role": 1, "layout": 1}} and finding.is_harmful
    assert lines_of(finding) == [3, 5] and "known roles" in finding.places[0]


def test_a_file_without_a_good_row(found):
    report = found([{"nothing": 1}] * 3)
    assert [finding.code for finding in report.findings] == ["bad_rows", "empty"]
    assert report.facts["rows"] == 3


def test_equal_sides_of_a_pair_are_named(found):
    rows = clean_pairs(4)
    rows[1]["rejected"] = rows[1]["chosen"]
    finding = only(found(rows), "same_answers")
    assert finding.count == 1 and lines_of(finding) == [2] and finding.is_harmful


# ---------------------------------------------------------------------------------------- copies, answers, labels (76)


@pytest.mark.parametrize("built", [False, True])
def test_copies_and_rows_that_are_nearly_equal(found, built):
    rows = clean_rows(20)
    rows[7] = rows[3]
    rows[9] = rows[3]
    near = prose(11, 60)
    rows[12], rows[15] = talk("say it", near), talk("say it", near.replace(near.split()[30], "changed"))
    codes = {finding.code: finding for finding in found(rows, built=built).findings}
    assert set(codes) == {"exact_duplicates", "near_duplicates"}
    assert codes["exact_duplicates"].count == 2 and codes["near_duplicates"].count == 1
    if not built:
        assert lines_of(codes["exact_duplicates"]) == [8, 10] and lines_of(codes["near_duplicates"]) == [16]
        assert codes["near_duplicates"].places[0].endswith(":16 like line 13")
    else:
        assert codes["near_duplicates"].places[0].endswith(" row 15 like row 12")


def test_a_system_turn_makes_no_near_duplicates(found):
    system = prose(999, 40)
    rows = [talk(f"number {number * 7919}?", f"it is {number * 104729}.", system=system) for number in range(9)]
    assert found(rows).findings == () and found(rows, built=True).findings == ()


@pytest.mark.parametrize("built", [False, True])
def test_what_of_the_validation_set_is_trained_on(found, built):
    rows, near = clean_rows(20), prose(11, 60)
    rows[12] = talk("say it", near)
    valid = [talk("new", prose(801)), rows[4], talk("say it", near.replace(near.split()[30], "changed"))]
    codes = {finding.code: finding for finding in found(rows, valid=valid, built=built).findings}
    assert set(codes) == {"valid_overlap", "valid_near_overlap"}
    assert codes["valid_overlap"].count == 1 and codes["valid_near_overlap"].count == 1
    assert "valid.jsonl:2 like " in codes["valid_overlap"].places[0]
    assert "valid.jsonl:3 like " in codes["valid_near_overlap"].places[0]
    assert not any(finding.is_harmful for finding in codes.values())


def test_one_answer_to_many_questions(found):
    rows = clean_rows(40)
    for number in (5, 8, *range(20, 30)):
        rows[number] = talk(prose(2 * number), "I cannot help with that.")
    finding = only(found(rows), "equal_answers")
    assert finding.count == 12 and lines_of(finding) == [6, 9, 21] and "'I cannot help with that.'" in finding.message
    copies = [talk("the same question", "the same answer")] * 12 + clean_rows(20)
    assert only(found(copies), "exact_duplicates").count == 11


@pytest.mark.parametrize("built", [False, True])
def test_labels_of_one_class(found, built):
    rows = [{**row, "label": True} for row in clean_rows(12)]
    finding = only(found(rows, built=built), "one_class")
    assert finding.count == 12 and finding.is_harmful and "labelled good" in finding.message
    rows[3]["label"] = False
    report = found(rows, built=built)
    assert report.findings == () and report.facts["labels"] == {"good": 11, "bad": 1}


# ---------------------------------------------------------------------------------------- preference shortcuts


@pytest.mark.parametrize("built", [False, True])
def test_a_phrase_that_alone_tells_the_sides_apart(found, built):
    rows = clean_pairs(100)
    for row in rows[:61]:
        row["rejected"] = "As an AI I cannot. " + " ".join(row["rejected"].split()[3:])
    finding = only(found(rows, built=built), "phrase_shortcut")
    assert finding.more["rejected"] == 61 and finding.more["chosen"] == 0
    assert "'As an AI I cannot.'" in finding.message
    assert "stands in 61% of rejected and 0% of chosen" in finding.message
    assert finding.message.endswith("tells them apart in 80% of pairs")


def test_words_that_both_sides_use_are_no_shortcut(found):
    rows = clean_pairs(100)
    for row in rows:
        row["chosen"], row["rejected"] = "As an AI " + row["chosen"], "As an AI " + row["rejected"]
    assert found(rows).findings == ()


def test_words_that_one_side_uses_somewhat_more_are_no_shortcut(found):
    # Found in 90% of one side and 55% of the other: as any word is when one side is longer.
    draw, rows = random.Random(1), clean_pairs(200)
    for row in rows:
        for side, chance in (("chosen", 0.9), ("rejected", 0.55)):
            row[side] += " However" * (draw.random() < chance)
    assert found(rows).findings == ()


def test_length_as_a_shortcut(found):
    rows = clean_pairs(50)
    for number, row in enumerate(rows):
        sizes = (20, 10) if number < 45 else (10, 20)
        row["chosen"], row["rejected"] = (prose(1000 + 2 * number + at, size) for at, size in enumerate(sizes))
    finding = only(found(rows), "length_shortcut")
    assert finding.message.startswith("chosen is longer in 90% of pairs") and finding.count == 45


# ---------------------------------------------------------------------------------------- the command


def run_command(*words):
    return CliRunner().invoke(check, [str(word) for word in words])


def test_the_command_prints_and_ends_by_what_was_found(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", clean_rows())
    done = run_command(path, "--tokenizer", tokenizer, "--seq-len", 512)
    assert done.exit_code == 0 and "nothing found" in done.stdout and "30 rows" in done.stdout
    done = run_command(path, "--tokenizer", tokenizer, "--seq-len", 100)
    assert isinstance(done.exception, DataError) and done.exception.exit_code == 3
    assert "too_long: training cuts these rows" in str(done.exception) and "HARM" in done.stdout
    done = run_command(path, "--tokenizer", tokenizer, "--seq-len", 100, "--allow", "too_long")
    assert isinstance(done.exception, DataError) and "all_masked" in str(done.exception)
    done = run_command(path, "--tokenizer", tokenizer, "--seq-len", 100, "--allow", "too_long", "--allow", "all_masked")
    assert done.exit_code == 0 and "warning too_long" in done.stdout
    assert isinstance(run_command(path, "--tokenizer", tokenizer, "--allow", "luck").exception, UsageError)


def test_json_is_all_that_stdout_gets(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [*clean_rows(), {"nothing": 1}])
    done = run_command(path, "--tokenizer", tokenizer, "--json", "--png", tmp_path / "lengths.png")
    said = json.loads(done.stdout)
    assert said["harmful"] is True and said["rows"] == 31 and said["findings"][0]["code"] == "bad_rows"
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_what_bad_rows_hold_cannot_steer_a_terminal(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"messages": \x1b[2J\n' + b"".join(json.dumps(row).encode() + b"\n" for row in clean_rows(3)))
    done = run_command(path, "--tokenizer", tokenizer)
    assert "\x1b" not in done.stdout and "bad_rows" in done.stdout


def test_a_dataset_of_another_tokenizer_is_refused(tmp_path, tokenizer):
    build(write_rows(tmp_path / "rows.jsonl", clean_rows(3)), tmp_path / "set", tokenizer=tokenizer)
    other = write_tokenizer(tmp_path / "other", kind="prepending")
    with pytest.raises(DataError, match="is another one"):
        audit([str(tmp_path / "set")], tokenizer=other)
    with pytest.raises(UsageError, match="check it alone"):
        audit([str(tmp_path / "set"), str(tmp_path / "rows.jsonl")], tokenizer=tokenizer)


def test_the_report_does_not_depend_on_chunks(tmp_path, tokenizer):
    rows = clean_rows(40) + [clean_rows(1)[0]] * 3 + clean_pairs(0)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    reports = [
        audit([str(path)], tokenizer=tokenizer, options=AuditOptions(build=BuildOptions(chunk_rows=size))).as_json()
        for size in (1, 7, 512)
    ]
    assert reports[0] == reports[1] == reports[2]
