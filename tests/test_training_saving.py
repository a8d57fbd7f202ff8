"""Saving while training goes on, saves that fail, losses that are not finite, a time limit: one rank in a process."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from training_world import ROOT, flags, free_ports, write_dataset, write_model

from conversion.verify import verify

PRELUDE = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
from toolkits.foundation.errors import TemperError
from toolkits.training import loop, saving
from toolkits.training.objectives import OBJECTIVES, cross_entropy
from toolkits.training.options import parse_flags
from toolkits.training.run import run

def start(flags):
    os.environ["MASTER_PORT"] = str(ports.pop())
    try:
        history = run(parse_flags(flags), OBJECTIVES["sft"])
        return {"losses": [step.loss for step in history]}
    except TemperError as error:
        torch.distributed.destroy_process_group()
        return {"code": error.exit_code, "said": str(error)}

cases, ports = map(json.loads, sys.argv[1:])
write = saving.FileSystemWriterAsync.write_preloaded_data
answers = {}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    model = write_model(folder / "model", num_hidden_layers=2)
    return {"checkpoint": model, "data": write_dataset(folder / "data", model, rows=40)}


def in_own_process(inputs, folder, script, **cases):
    """Run `script`, which fills `answers` from the flags of `cases`; return those and what was printed."""
    common = {"seq_len": 129, "global_batch_size": 4, "train_iters": 6, "save_interval": 2, "precision": "fp32"}
    words = {
        name: flags(**(inputs | common | {"output": folder / name, "keep_last": 9} | changes))
        for name, changes in cases.items()
    }
    env = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    code = PRELUDE + textwrap.dedent(script) + "\nprint('ANSWERS', json.dumps(answers), flush=True)\nos._exit(0)"
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(words), json.dumps(free_ports(4))]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "ANSWERS " in done.stdout, done.stdout + done.stderr
    printed, _, answers = done.stdout.rpartition("ANSWERS ")
    return json.loads(answers), printed


def steps(out, name):
    return sorted(path.name for path in (out / name / "checkpoint" / "sft").glob("iter_*"))


@pytest.fixture(scope="module")
def saved(inputs, tmp_path_factory):
    """The same run with saves before the next step, behind it, and with a disk that is slow."""
    out = tmp_path_factory.mktemp("saves")
    script = """
        answers["before"] = start(cases["before"])
        def slowly(*args, **kwargs):
            time.sleep(0.5)
            return write(*args, **kwargs)
        saving.FileSystemWriterAsync.write_preloaded_data = staticmethod(slowly)
        saving.REMINDER = 0.2
        print("SLOW")
        answers["behind"] = start(cases["behind"])
    """
    return out, *in_own_process(inputs, out, script, before={}, behind={"background_save": True})


def test_a_save_in_the_background_holds_the_state_of_its_step(saved):
    out, answers, _ = saved
    assert answers["behind"]["losses"] == answers["before"]["losses"]
    assert steps(out, "behind") == steps(out, "before") == [f"iter_{step:07d}" for step in (2, 4, 6)]
    for step in steps(out, "before"):
        verify(*(out / name / "checkpoint" / "sft" / step for name in ("before", "behind")))


def test_training_goes_on_while_a_step_is_written(saved):
    lines = saved[2].split("SLOW")[1].splitlines()
    places = {
        what: next(i for i, line in enumerate(lines) if what in line) for what in ("in the background", "step 3/6")
    }
    whole = next(i for i, line in enumerate(lines) if line.startswith("saved ") and line.endswith("iter_0000002"))
    assert places["in the background"] < places["step 3/6"] < whole
    waited = [line for line in lines if line.startswith("waiting for ")]
    assert waited and all("to be on disk" in line for line in waited), "the last save is waited for, and that is said"
    assert not any("iter_0000006 in the background" in line for line in lines), "nothing is left to train meanwhile"


def test_the_third_failed_save_in_a_row_ends_the_run(inputs, tmp_path):
    script = """
        failing = {"left": 2}
        def broken(transforms, number, bucket, said, count, use_fsync):
            if not failing["left"]:
                return write(transforms, number, bucket, said, count, use_fsync)
            failing["left"] -= 1
            said.put((number, OSError(28, "No space left on device")))
        saving.FileSystemWriterAsync.write_preloaded_data = staticmethod(broken)
        answers["twice"] = start(cases["twice"])
        failing["left"] = 3
        answers["thrice"] = start(cases["thrice"])
        failing["left"] = 1
        answers["at once"] = start(cases["at once"])
    """
    background = {"background_save": True, "save_interval": 1}
    cases = {"twice": background, "thrice": background, "at once": {}}
    answers, printed = in_own_process(inputs, tmp_path, script, **cases)
    assert len(answers["twice"]["losses"]) == 6
    assert steps(tmp_path, "twice") == [f"iter_{step:07d}" for step in (3, 4, 5, 6)]
    assert "No space left on device; earlier steps are whole. Training goes on (failure 2 of 3)" in printed
    assert answers["thrice"]["code"] == 6 and "failure 3 in a row: the run ends" in answers["thrice"]["said"]
    assert "iter_0000003 failed" in answers["thrice"]["said"] and steps(tmp_path, "thrice") == []
    assert answers["at once"]["code"] == 6 and "iter_0000002 failed: [Errno 28]" in answers["at once"]["said"]
    assert not list(tmp_path.rglob(".tmp-*")), "nothing half-written is left"


def test_a_loss_that_is_not_finite_is_written_down_and_ends_the_run_or_skips_the_step(inputs, tmp_path):
    script = """
        honest, poisoned, seen = cross_entropy.CrossEntropy.__call__, {3}, {"step": 0}
        def loss(self, losses, *, batch):
            seen["step"] += torch.is_grad_enabled()  # one micro batch a step
            return honest(self, losses * float("nan") if seen["step"] in poisoned else losses, batch=batch)
        cross_entropy.CrossEntropy.__call__ = loss
        answers["ends"] = start(cases["ends"])
        seen["step"] = 0
        answers["skips"] = start(cases["skips"])
    """
    one = {"micro_batch_size": 4, "lr": 1e-3, "eval_interval": 100, "save_interval": 0}
    cases = {"ends": one | {"save_interval": 2}, "skips": one | {"max_nonfinite": 2}}
    answers, printed = in_own_process(inputs, tmp_path, script, **cases)
    run = tmp_path / "ends" / "checkpoint" / "sft"
    assert answers["ends"]["code"] == 7
    assert "step 3: the loss is nan" in answers["ends"]["said"]
    assert f"The last good checkpoint is {run / 'iter_0000002'}" in answers["ends"]["said"]
    dump = json.loads((run / "not-finite-step-3.json").read_text())
    assert [row["row"] for row in dump["rows"]] and dump["loss"] == "nan"
    assert all(segment["tokens"] for row in dump["rows"] for segment in row["segments"])
    losses = answers["skips"]["losses"]
    assert len(losses) == 6 and losses[2] != losses[2] and losses[5] < losses[0]
    assert "The step is skipped (1 of 2 before the run ends)" in printed and "| not finite, step skipped |" in printed
    lines = (tmp_path / "skips" / "checkpoint" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines if '"loss"' in line].count(None) == 1, "JSON has no NaN"


def test_a_run_stops_before_its_time_limit_and_goes_on(inputs, tmp_path):
    script = """
        answers["first"] = start(cases["out"])
        answers["then"] = start([*cases["out"], "--stop-after", "0"])
    """
    answers, printed = in_own_process(inputs, tmp_path, script, out={"stop_after": 1e-6})
    assert answers["first"]["code"] == 75 and "stopped after step 1 of 6" in answers["first"]["said"]
    assert len(answers["then"]["losses"]) == 5 and "going on from" in printed
