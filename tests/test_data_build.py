"""The whole build, from a file to a dataset and back to the screen, and what can go wrong on the way."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from data_world import NO_SHARED, SHARED, fuzzed_rows, talk, write_rows, write_tokenizer

from data_preprocessing.build import BuildOptions, build
from data_preprocessing.dataset import FILE_SUFFIXES, open_dataset
from data_preprocessing.inspect import show
from data_preprocessing.tokenizer import tokenizer_fingerprint
from toolkits.commands.data import data
from toolkits.foundation.errors import DataError, UsageError, exit_code_of
from toolkits.foundation.lock import locked

ROOT = Path(__file__).resolve().parents[1]
SKIP = BuildOptions(on_bad_row="skip", max_bad=0.9)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def files_of(prefix):
    return {suffix: Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in FILE_SUFFIXES}


def command(*words):
    """Run `temper data ...` as a process; return (exit code, stdout, stderr)."""
    script = "from toolkits.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "data", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_a_build_can_be_opened_and_says_what_it_is(tmp_path, tokenizer):
    rows = [*fuzzed_rows(20), {"instruction": "q", "output": "a"}, talk("<|im_end|>", "b")]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    manifest = build(source, tmp_path / "out", tokenizer=tokenizer)
    dataset = open_dataset(tmp_path / "out")
    dataset.verify()
    assert dataset.manifest == manifest
    assert len(dataset) == len(rows)
    assert dataset.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert dataset.num_trained_tokens == sum(int(dataset.mask(row).sum()) for row in range(len(dataset)))
    assert dataset.max_token_id == max(int(dataset.tokens(row).max()) for row in range(len(dataset)))
    assert manifest["input"]["layouts"] == {"alpaca": 1, "messages": 21}
    assert manifest["control_text"] == {"texts": 1, "rows": 1}
    assert manifest["chat_template"]["source"] == "chat_template.jinja"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["rows.jsonl", *(f"out_text_document{suffix}" for suffix in FILE_SUFFIXES)]
    )


def test_the_result_does_not_depend_on_chunks_nor_on_the_file_kind(tmp_path, tokenizer):
    rows = [*fuzzed_rows(60), talk("<|im_end|>", "b"), {"bad": 1}, *fuzzed_rows(5, seed=3)]
    source = write_rows(tmp_path / "rows", rows)
    built = []
    for chunk_rows in (1, 7, 1024):
        options = BuildOptions(on_bad_row="skip", max_bad=0.9, chunk_rows=chunk_rows)
        build(source, tmp_path / "out", tokenizer=tokenizer, overwrite=True, options=options)
        built.append({**files_of(tmp_path / "out"), "rejects": (tmp_path / "out.rejects.jsonl").read_bytes()})
    assert built[0] == built[1] == built[2]
    source.write_text(json.dumps(rows, indent=1))
    build(source, tmp_path / "out", tokenizer=tokenizer, overwrite=True, options=SKIP)
    listed = files_of(tmp_path / "out")
    assert [listed[suffix] for suffix in FILE_SUFFIXES[:3]] == [built[0][suffix] for suffix in FILE_SUFFIXES[:3]]


def test_a_bad_row_stops_the_build_and_leaves_nothing(tmp_path, tokenizer):
    source = write_rows(tmp_path / "train.jsonl", [talk("q", "a"), talk("q", "a"), talk("q", "")])
    said = rf"{source}:3: turn 2 is an empty assistant turn: no trainable token \(mend it, or .*--on-bad-row skip\)"
    with pytest.raises(DataError, match=said) as caught:
        build(source, tmp_path / "out", tokenizer=tokenizer)
    assert exit_code_of(caught.value) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_row_that_the_template_refuses_is_located_too(tmp_path):
    folder = write_tokenizer(tmp_path / "strict", "{{ raise_exception('not like this') }}")
    source = write_rows(tmp_path / "train.jsonl", [talk("q", "a")])
    with pytest.raises(DataError, match=r"train.jsonl:1: the chat template refuses this conversation: not like this"):
        build(source, tmp_path / "out", tokenizer=folder)


def test_skipped_rows_are_written_down_with_their_reasons(tmp_path, tokenizer):
    source = tmp_path / "train.jsonl"
    good = json.dumps(talk("q", "a")).encode() + b"\n"
    bad = [b'{"messages": }\n', b'{"instruction": "\\ud800", "output": "x"}\n', b'{"text": "\xc4\xe3"}\n']
    source.write_bytes(good + b"".join(bad) + good + b'{"a": 1}')
    manifest = build(source, tmp_path / "out", tokenizer=tokenizer, options=SKIP)
    assert manifest["dropped"] == {"character": 1, "encoding": 1, "layout": 1, "syntax": 1}
    assert (manifest["counts"]["rows"], manifest["input"]["rows"]) == (2, 6)
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in rejects] == [
        (2, "syntax"), (3, "character"), (4, "encoding"), (6, "layout"),
    ]  # fmt: skip
    assert rejects[0]["row"] == '{"messages": }'
    # A later clean build takes the stale list away.
    build(write_rows(source, [talk("q", "a")]), tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert not (tmp_path / "out.rejects.jsonl").exists()


def test_too_many_bad_rows_stop_the_build_and_keep_the_list(tmp_path, tokenizer):
    source = write_rows(tmp_path / "train.jsonl", [talk("q", "a")] * 8 + [{"x": 1}, talk("q", "")])
    allowed = BuildOptions(on_bad_row="skip", max_bad=0.2)
    build(source, tmp_path / "out", tokenizer=tokenizer, options=allowed)
    strict = BuildOptions(on_bad_row="skip", max_bad=0.1)
    said = (
        r"2 of 10 rows are bad \(20.00%, --max-bad allows 10.00%\): layout 1, empty_answer 1; all of them are in .*out2"
    )
    with pytest.raises(DataError, match=said):
        build(source, tmp_path / "out2", tokenizer=tokenizer, options=strict)
    assert len((tmp_path / "out2.rejects.jsonl").read_text().splitlines()) == 2
    with pytest.raises(DataError, match="1 of 1 rows are bad"):
        everything = BuildOptions(on_bad_row="skip", max_bad=1)
        build(write_rows(source, [{"x": 1}]), tmp_path / "out3", tokenizer=tokenizer, options=everything)


def test_files_without_rows_are_refused(tmp_path, tokenizer):
    for content in ("", "[]", "\n\n"):
        (tmp_path / "empty").write_text(content)
        with pytest.raises(DataError, match="the file has no rows"):
            build(tmp_path / "empty", tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        build(tmp_path / "nowhere.json", tmp_path / "out", tokenizer=tokenizer)


def test_an_existing_dataset_is_replaced_only_on_request(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", [talk("q", "a")])
    build(source, tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(UsageError, match=r"output exists already: .*--overwrite"):
        build(source, tmp_path / "out_text_document", tokenizer=tokenizer)
    before = files_of(tmp_path / "out")
    bad = write_rows(tmp_path / "bad.jsonl", [talk("q", "a"), talk("q", "")])
    with pytest.raises(DataError):
        build(bad, tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert files_of(tmp_path / "out") == before


def test_two_builders_on_one_prefix(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", [talk("q", "a")])
    with (
        locked(tmp_path / ".lock-out_text_document", what="out"),
        pytest.raises(UsageError, match=rf"out_text_document is in use by pid {os.getpid()}") as caught,
    ):
        build(source, tmp_path / "out", tokenizer=tokenizer)
    assert exit_code_of(caught.value) == 2


def opened_for_writing(pipe, builder):
    """Open a named pipe once `builder` reads from it, without waiting for a builder that died."""
    while True:
        try:
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert builder.poll() is None
            time.sleep(0.02)
        else:
            os.set_blocking(descriptor, True)
            return open(descriptor, "wb")


def test_a_killed_builder_leaves_the_old_dataset_whole(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", fuzzed_rows(30))
    build(source, tmp_path / "out", tokenizer=tokenizer)
    before = files_of(tmp_path / "out")
    # Its input is a pipe that never ends, so the builder is certainly at work when it is killed.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ["data", "build", str(pipe), str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--overwrite"]
    builder = subprocess.Popen([sys.executable, "-c", "from toolkits.cli import main; main()", *words], cwd=ROOT)
    unfinished = tmp_path / ".tmp-out_text_document" / "out_text_document.bin"
    with opened_for_writing(pipe, builder) as feed:
        feed.write((json.dumps(talk("q", "a")) + "\n").encode() * 60_000)  # more than waits for an encoder
        feed.flush()
        deadline = time.monotonic() + 60
        while not (unfinished.exists() and unfinished.stat().st_size):
            assert time.monotonic() < deadline and builder.poll() is None
            time.sleep(0.02)
        builder.send_signal(signal.SIGKILL)
        assert builder.wait() == -signal.SIGKILL
    assert files_of(tmp_path / "out") == before
    open_dataset(tmp_path / "out").verify()
    build(source, tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert not unfinished.parent.exists()


def test_torch_and_transformers_are_never_imported(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", [talk("q", "a"), talk("<|im_end|>", "a")])
    script = (
        "import sys\n"
        "from data_preprocessing.build import build\n"
        "from data_preprocessing.dataset import open_dataset\n"
        "from data_preprocessing.inspect import show\n"
        "from data_preprocessing.packing import pack\n"
        "build(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3])\n"
        "dataset = open_dataset(sys.argv[2]); show(dataset, 0); pack(dataset.lengths, 64)\n"
        "print(sorted({'torch', 'transformers', 'megatron', 'conversion'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", script, source, tmp_path / "out", tokenizer]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def shown(dataset, row, **options):
    stream = io.StringIO()
    show(dataset, row, stream=stream, **options)
    return stream.getvalue()


def test_show_marks_what_is_trained(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", [talk("你好", "世界 🙂", "esc\x1b[31m", "fine")])
    build(source, tmp_path / "out", tokenizer=tokenizer)
    dataset = open_dataset(tmp_path / "out")
    assert shown(dataset, 0) == (
        f"row 0 of 1: {dataset.lengths[0]} tokens, {dataset.num_trained_tokens} trained\n"
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n⟦世界 🙂<|im_end|>⟧\n"
        "<|im_start|>user\nesc␛[31m<|im_end|>\n<|im_start|>assistant\n⟦fine<|im_end|>⟧\n"
        "\n⟦trained⟧ context\n"
    )


def test_show_colours_a_terminal(tmp_path, tokenizer, monkeypatch):
    build(write_rows(tmp_path / "rows.jsonl", [talk("q", "fine")]), tmp_path / "out", tokenizer=tokenizer)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(open_dataset(tmp_path / "out"), 0)
    assert "\x1b[1;32mfine\x1b[0m" in text
    assert "\x1b[35m<|im_start|>\x1b[0m" in text
    assert "⟦" not in text


def test_show_refuses_what_it_cannot_show(tmp_path, tokenizer):
    folder = write_tokenizer(tmp_path / "gone")
    build(write_rows(tmp_path / "rows.jsonl", [talk("q", "a")]), tmp_path / "out", tokenizer=folder)
    dataset = open_dataset(tmp_path / "out")
    with pytest.raises(UsageError, match=r"row 1: .* has rows 0 to 0"):
        shown(dataset, 1)
    text = (folder / "tokenizer.json").read_text().replace("<|head|>", "<|other|>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"was built with the tokenizer gone \(\w{12}\), .* is another one"):
        shown(dataset, 0)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"tokenizer folder .*gone is gone; give --tokenizer DIR"):
        shown(dataset, 0)
    assert "⟦a<|im_end|>⟧" in shown(dataset, 0, tokenizer=tokenizer)


def test_the_command_reports_and_shows(tmp_path, tokenizer):
    source = tmp_path / "rows.txt"
    lines = [json.dumps(talk("<|im_end|>", "b")), "", *[json.dumps(talk("q", "answer"))] * 30, '{"x": 1}']
    source.write_bytes("\r\n".join(lines).encode())
    words = ["build", source, tmp_path / "out", "--tokenizer", tokenizer, "--on-bad-row", "skip", "--max-bad", "5%"]
    code, out, err = command(*words)
    assert (code, err.split(":")[0]) == (0, "building")
    size = f"{source.stat().st_size / 1000:.1f} kB"
    assert f"building: {size}/{size}, in " in err and " rows/s" in err
    assert "read      rows.txt: JSONL, 32 rows, messages 31\n" in out
    assert "template  chat_template.jinja, conversations\n" in out
    assert "rows      31, the longest has" in out
    assert "accepted  CRLF lines 32, blank lines 1\n" in out
    assert "1 control-token texts in 1 rows: kept as plain text" in out
    assert f"dropped   layout 1; see {tmp_path}/out.rejects.jsonl\n" in out
    assert out.endswith(f"next      temper data show {tmp_path}/out 0\n")
    code, out, _ = command("show", tmp_path / "out", 1)
    assert code == 0
    assert "⟦answer<|im_end|>⟧" in out
    code, _, err = command(*words)
    assert (code, "output exists already" in err) == (2, True)
    code, _, err = command("show", tmp_path / "nothing", 1)
    assert (code, "error: no dataset at" in err, "Traceback" in err) == (3, True, False)


@pytest.mark.parametrize("given", ["2", "-1%", "many", "101%"])
def test_a_wrong_fraction_is_refused(given):
    result = CliRunner().invoke(data, ["build", "in", "out", "--tokenizer", "t", f"--max-bad={given}"])
    assert result.exit_code == 2
    assert "is not a fraction such as 0.001 or 0.1%" in result.output


@pytest.mark.skipif(not SHARED.exists(), reason=NO_SHARED)
@pytest.mark.parametrize(("language", "rows"), [("en", 999), ("zh", 1000)])
def test_the_real_samples_build(tmp_path, language, rows):
    source = SHARED / "samples" / f"alpaca_{language}_demo.json"
    manifest = build(source, tmp_path / "out", tokenizer=SHARED / "qwen2_tokenizer")
    assert manifest["counts"]["rows"] == manifest["input"]["rows"] == rows
    assert manifest["input"]["layouts"] == {"alpaca": rows}
