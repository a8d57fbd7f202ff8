"""The scripts: syntax, which Python runs, folders with spaces, arity, exit codes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_world import talk, write_rows, write_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((REPOSITORY / "run_scripts").glob("*.sh"))
DOORS = [path for path in SCRIPTS if not path.name.startswith("_")]
FAKE_PYTHON = '#!/bin/sh\necho "$0"\nfor word; do echo "[$word]"; done\necho "$PYTHONPATH"\n'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose path has a space, with the scripts in it and nothing else."""
    folder = tmp_path / "a clone"
    (folder / "run_scripts").mkdir(parents=True)
    for script in SCRIPTS:
        (folder / "run_scripts" / script.name).write_text(script.read_text())
    return folder


def fake_python(path: Path, text: str = FAKE_PYTHON) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def sh(script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VIRTUAL_ENV", "PYTHONPATH")}
    return subprocess.run(
        ["sh", str(script), *words], env=keep | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", [*SCRIPTS, REPOSITORY / ".ci" / "run"], ids=lambda path: path.name)
def test_syntax_and_size(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)
    text = script.read_text()
    assert text.startswith("#!/bin/sh\n# ") or (script.name.startswith("_") and text.startswith("# Sourced"))
    assert "num_layers" not in text and "hidden" not in text.lower()
    if script.name.startswith("run_"):
        assert len(text.splitlines()) <= 10


def test_ci_runs_the_tests_script() -> None:
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)
    assert "run_scripts/test.sh" in (REPOSITORY / ".ci" / "run").read_text()


def test_python_is_the_one_said_else_the_active_else_the_clones(clone: Path, tmp_path: Path) -> None:
    script = clone / "run_scripts" / "run_mcore_qwen.sh"
    said, active = fake_python(tmp_path / "said python"), fake_python(tmp_path / "act ive" / "bin" / "python")
    own = fake_python(clone / ".venv" / "bin" / "python")
    path = fake_python(tmp_path / "bin" / "python3")

    def used(**environment: str) -> str:
        return sh(script, **environment).stdout.splitlines()[0]

    active_home, search = str(active.parents[1]), f"{path.parent}:{os.environ['PATH']}"
    assert used(PYTHON=str(said), VIRTUAL_ENV=active_home) == str(said)
    assert used(VIRTUAL_ENV=active_home) == str(active)
    assert used(VIRTUAL_ENV="/gone") == str(own)
    own.unlink()
    assert used(PATH=search) == str(path)


def test_words_arrive_whole_from_any_folder(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = str(fake_python(tmp_path / "python"))
    monkeypatch.chdir(clone / "run_scripts")
    for script in (Path("run_mcore_qwen.sh"), clone / "run_scripts" / "run_mcore_qwen.sh"):
        lines = sh(script, "a b", "$x", "", PYTHON=python, PYTHONPATH="/other").stdout.splitlines()
        assert lines[1:] == ["[-m]", "[toolkits.launch]", "[qwen]", "[a b]", "[$x]", "[]", f"{clone}:/other"]
    link = tmp_path / "link.sh"
    link.symlink_to(clone / "run_scripts" / "convert_hf2mcore.sh")
    lines = sh(link, "A", "B C", PYTHON=python).stdout.splitlines()
    assert lines[1:] == ["[-m]", "[toolkits.cli]", "[convert]", "[hf2mcore]", "[A]", "[B C]", str(clone)]


def test_build_sft_data_takes_three_or_four_words_and_flags(clone: Path, tmp_path: Path) -> None:
    script, python = clone / "run_scripts" / "build_sft_data.sh", str(fake_python(tmp_path / "python"))
    build = ["-m", "toolkits.cli", "data", "build", "in put", "out", "--tokenizer", "tok"]
    check = ["-m", "toolkits.cli", "data", "check", "out", "--tokenizer", "tok", "--seq-len", "4096"]

    def called(*words: str) -> list[str]:
        lines = sh(script, *words, PYTHON=python).stdout.splitlines()
        return [line for line in lines if line.startswith("[")]

    def bracketed(*words: str) -> list[str]:
        return [f"[{word}]" for word in words]

    assert called("in put", "tok", "out") == bracketed(*build)
    assert called("in put", "tok", "out", "--columns", "a b") == bracketed(*build, "--columns", "a b")
    both = bracketed(*build, "--overwrite", *check, "--allow", "too_long")
    assert called("in put", "tok", "out", "4096", "--overwrite") == both
    assert called("-", "tok", "out")[4] == "[-]"  # stdin
    for words, said in {
        (): "0 arguments given",
        ("in", "tok"): "2 arguments given",
        ("in", "tok", "out", "4096", "5"): "5 arguments given",
        ("in", "tok", "out", "4k"): "SEQ_LEN is a number, not 4k",
        ("--overwrite", "in", "tok", "out"): "--overwrite stands where a path is expected",
    }.items():
        done = sh(script, *words, PYTHON=python)
        assert done.returncode == 2 and f"OUTPUT_PREFIX [SEQ_LEN] [FLAGS]; {said}" in done.stderr, words
        assert done.stdout == ""


def test_build_sft_data_ends_as_its_commands_do(clone: Path, tmp_path: Path) -> None:
    script = clone / "run_scripts" / "build_sft_data.sh"
    text = '#!/bin/sh\ncase "$*" in *" {} "*) exit 3 ;; *) echo "$4" ;; esac\n'
    fails = {name: str(fake_python(tmp_path / name, text.format(name))) for name in ("build", "check")}
    done = sh(script, "in", "tok", "out", "64", PYTHON=fails["build"])
    assert (done.returncode, done.stdout) == (3, "")  # nothing is checked that was not built
    done = sh(script, "in", "tok", "out", "64", PYTHON=fails["check"])
    assert (done.returncode, done.stdout) == (3, "build\n")
    assert sh(script, "in", "tok", "out", PYTHON=fails["check"]).returncode == 0


def test_build_sft_data_says_what_of_the_set_fits(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tiny")
    rows = [talk("q", "7" * length) for length in (3, 4, 90)]  # a token for each digit
    source = write_rows(tmp_path / "rows.jsonl", rows)
    script = REPOSITORY / "run_scripts" / "build_sft_data.sh"
    done = sh(script, str(source), str(tokenizer), str(tmp_path / "out"), "64", PYTHON=sys.executable)
    assert "tokens    " in done.stdout and re.search(r"too_long: 1 \D.*\n.* row 2\n", done.stdout), done.stdout
    assert done.returncode == 0  # such rows are cut when training starts: no reason to fail


@pytest.mark.parametrize("name", ["convert_hf2mcore.sh", "convert_mcore2hf.sh"])
def test_the_converters_check_their_arity(name: str) -> None:
    script = REPOSITORY / "run_scripts" / name
    for words in ([], ["a"], ["a", "b", "c"]):
        done = sh(script, *words, PYTHON=sys.executable)
        assert done.returncode == 2 and "Usage:" in done.stderr
    assert sh(script, "--help", PYTHON=sys.executable).returncode == 0


def test_the_launcher_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toolkits").mkdir()
    (tmp_path / "toolkits" / "__init__.py").write_text("raise ImportError('the wrong clone')")
    script = REPOSITORY / "run_scripts" / "run_mcore_qwen.sh"
    assert sh(script, "--help", PYTHON=sys.executable).returncode == 0
    done = sh(script, *["x"] * 25, PYTHON=sys.executable)
    assert done.returncode == 2 and "no checkpoint at x" in done.stderr and "ENV (position 1)" in done.stderr
    assert sh(script, PYTHON=sys.executable).returncode == 2


def test_a_signal_reaches_the_launcher_through_the_script(tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python", "#!/bin/sh\ntrap 'exit 75' TERM\necho up\nwhile :; do sleep 0.1; done\n")
    command = ["sh", str(REPOSITORY / "run_scripts" / "run_mcore_qwen.sh")]
    with subprocess.Popen(command, env=os.environ | {"PYTHON": str(python)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75


class TestEnvironment:
    """How test.sh and quickstart.sh prepare .venv, with a fake Python that notes what it is asked for."""

    PYTHON3 = """#!/bin/sh
echo "$0 $*" >>"$CALLS"
case "$1 ${2:-}" in
"-c "*) exit 0 ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m ensurepip") exit 1 ;;
esac
"""

    def run(
        self, clone: Path, tmp_path: Path, script: str, *words: str, python3: str = PYTHON3
    ) -> tuple[int, list[str], str]:
        for name in ("setup.py", "constraints.txt"):
            if not (clone / name).exists():
                (clone / name).write_text(name)
        for version in ("python3.12", "python3.11", "python3"):
            fake_python(tmp_path / "bin" / version, python3)
        calls = tmp_path / "calls"
        calls.write_text("")
        search = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        done = sh(clone / "run_scripts" / script, *words, PATH=search, CALLS=str(calls))
        return done.returncode, calls.read_text().splitlines(), done.stderr

    def test_the_first_call_installs_and_the_second_does_not(self, clone: Path, tmp_path: Path) -> None:
        code, calls, _ = self.run(clone, tmp_path, "test.sh", "-k", "a b")
        own = clone / ".venv" / "bin" / "python"
        install = f"{own} -m pip install --disable-pip-version-check -c constraints.txt -e .[dev]"
        run = [f"{own} -m ruff check .", f"{own} -m pytest -k a b"]
        assert code == 0 and calls[1] == f"{tmp_path}/bin/python3.12 -m venv {clone}/.venv"
        assert calls[2:] == [install, *run]
        assert self.run(clone, tmp_path, "test.sh", "-k", "a b")[1] == run
        (clone / "constraints.txt").write_text("changed")
        assert install in self.run(clone, tmp_path, "test.sh")[1]
        calls = self.run(clone, tmp_path, "quickstart.sh", "M", "D")[1]
        assert calls[-2:] == [install.removesuffix("[dev]"), f"{own} -m toolkits.quickstart M D"]

    def test_no_python_ends_with_5_and_says_what_to_install(self, clone: Path, tmp_path: Path) -> None:
        code, _, said = self.run(clone, tmp_path, "test.sh", python3="#!/bin/sh\nexit 127\n")
        assert code == 5 and "Python 3.11 or 3.12 is needed" in said

    def test_a_failed_install_ends_with_5_and_is_tried_again(self, clone: Path, tmp_path: Path) -> None:
        broken = self.PYTHON3.replace("esac", '"-m pip") [ "$3" != install ] ;;\nesac')
        for _ in range(2):
            code, calls, said = self.run(clone, tmp_path, "quickstart.sh", python3=broken)
            assert code == 5 and "could not be installed" in said
            assert "pip install" in calls[-1]


def test_a_launcher_killed_early_says_75(tmp_path: Path) -> None:
    code = (
        "from toolkits.launch.elastic import start_ranks\nprint('up', flush=True)\n"
        "start_ranks([], ranks=1, module='time')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        time.sleep(0.2)  # torch is being imported
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75
