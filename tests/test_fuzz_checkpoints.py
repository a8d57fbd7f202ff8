"""benchmarks/fuzz_checkpoints.py on a few hundred cases, and that it finds what it looks for."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FUZZER = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_checkpoints.py"


@pytest.fixture(scope="module")
def fuzzer():
    spec = importlib.util.spec_from_file_location("fuzz_checkpoints", FUZZER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources(fuzzer, tmp_path_factory):
    return fuzzer._make_sources(tmp_path_factory.mktemp("sources"))


def test_two_hundred_changed_checkpoints_are_refused_or_convert_to_the_same_bytes():
    arguments = [sys.executable, "-W", "ignore", str(FUZZER), "--count", "200", "--seed", "3"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'refused': 1" in done.stdout and "'equal': " in done.stdout  # 100 to 199, and some


def outcome(fuzzer, sources, tmp_path, number=0):
    return fuzzer._Case(3, number, tmp_path, sources).outcome()


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError("deep"), MemoryError(), RuntimeError("torch")])
def test_another_error_is_a_failed_case(fuzzer, sources, tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(fuzzer.hf_to_mcore, "convert", broken)
    monkeypatch.setattr(fuzzer.mcore_to_hf, "convert", broken)
    monkeypatch.setattr(fuzzer, "scan_directory", lambda _: None)
    assert outcome(fuzzer, sources, tmp_path).startswith(f"FAILED: {type(error).__name__}")


def test_other_bytes_are_a_failed_case(fuzzer, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzer._Case, "_change", lambda *_: None)
    assert {outcome(fuzzer, sources, tmp_path, number) for number in range(6)} == {"equal"}
    monkeypatch.setattr(fuzzer, "sha256_of", lambda tensor: str(id(tensor)))
    assert "tensors whose bytes are none of the source's" in outcome(fuzzer, sources, tmp_path)


def test_memory_beyond_the_bound_is_a_failed_case(fuzzer, sources, tmp_path, monkeypatch):
    peaks = iter([3 << 20, 4 << 20])  # KiB; the process's own peak depends on the tests before
    monkeypatch.setattr(fuzzer.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=next(peaks)))
    monkeypatch.setattr(fuzzer._Case, "run", lambda _: "refused")
    assert outcome(fuzzer, sources, tmp_path) == "FAILED: it took 1,073,741,824 bytes of memory (refused)"


def test_a_case_that_hangs_or_dies_is_a_failed_case_and_the_others_go_on(fuzzer, monkeypatch, capfd):
    script = """
import sys, time
for number in range(int(sys.argv[-1]), 6):
    number == 2 and time.sleep(60)
    number == 4 and sys.exit(3)
    print(number, "equal", flush=True)
"""
    monkeypatch.setattr(fuzzer, "TIMEOUT", 2.0)
    honest = fuzzer.subprocess.Popen
    monkeypatch.setattr(
        fuzzer.subprocess,
        "Popen",
        lambda arguments, **rest: honest([sys.executable, "-c", script, arguments[-1]], **rest),
    )
    assert fuzzer._supervise(1, 6) == 1
    said = capfd.readouterr().out
    assert "case 2: FAILED: it hangs, or ended its process (exit code -9)" in said
    assert "case 4: FAILED: it hangs, or ended its process (exit code 3)" in said
    assert "6 cases, seed 1: {'equal': 4, 'FAILED': 2}" in said
