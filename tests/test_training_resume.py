"""A run that was interrupted goes on as if it had not been: the same bits, or a refusal that says why."""

import json
import os
import random
import re
import shutil
import time

import pytest
from training_world import finished, flags, mostly_full, run_cases, selected, start, write_dataset, write_model

from conversion.verify import verify
from toolkits.foundation.errors import CheckpointError, UsageError
from toolkits.training.checkpointing import Position, Saved, check_step, newest_step, require_loadable
from toolkits.training.config import TrainConfig
from toolkits.training.layout import Grid, Layout
from toolkits.training.run import _start
from toolkits.training.run_folder import claimed
from toolkits.training.sources import find_model

STEPS, HALF = 8, 4
LAST = f"iter_{STEPS:07d}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    model = write_model(folder / "model")
    return {"model": model, "data": write_dataset(folder / "data", model, rows=60)}


def settings(inputs, output, **changes):
    return {
        "checkpoint": inputs["model"],
        "data": inputs["data"],
        "output": output,
        "seq_len": 129,
        "micro_batch_size": 2,
        "global_batch_size": 8,  # 21 rows: the interruption falls into the second epoch
        "train_iters": STEPS,
        "save_interval": HALF,
        "warmup_iters": 2,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "precision": "fp32",
    } | changes


CASES = {
    "tp2-bf16": {"tensor_parallel": 2, "precision": "bf16"},
    "tp2-plain": {"tensor_parallel": 2, "distributed_optimizer": False},
    "pp2": {"pipeline_parallel": 2},
    "pp2-virtual": {"pipeline_parallel": 2, "virtual_stage_layers": 1, "background_save": True},
    "cp2": {"context_parallel": 2},
    "dp2-bf16": {"precision": "bf16"},
    "dp2": {},
    "tp2-reshardable": {"tensor_parallel": 2, "reshardable_optimizer": True},
}


QUICK = ["tp2-bf16", "tp2-plain", "pp2-virtual", "dp2", "tp2-reshardable"]


@pytest.fixture(scope="module")
def names(request):
    return sorted(selected(request, "name") & set(CASES) | {"dp2", "tp2-reshardable"})


@pytest.fixture(scope="module")
def whole(inputs, names, tmp_path_factory):
    """Uninterrupted runs on two ranks: (folder, histories)."""
    folder = tmp_path_factory.mktemp("whole")
    cases = {name: flags(**settings(inputs, folder / name, **CASES[name])) for name in names}
    return folder, run_cases(folder / "world", 2, cases)


def interrupted(folder, name, target):
    """Copy a run as it was after HALF of its steps."""
    shutil.copytree(folder / name, target)
    shutil.rmtree(target / "checkpoint" / "sft" / LAST)
    return target


@pytest.fixture(scope="module")
def resumed(inputs, whole, names, tmp_path_factory):
    """The same runs, interrupted and gone on with in new processes; also in other layouts."""
    folder, target = whole[0], tmp_path_factory.mktemp("resumed")
    outs = {name: interrupted(folder, name, target / name) for name in names}
    cases = {name: flags(**settings(inputs, outs[name], **CASES[name])) for name in names}
    other = interrupted(folder, "tp2-reshardable", target / "tp2-to-pp2")
    cases["tp2-to-pp2"] = flags(**settings(inputs, other, pipeline_parallel=2, reshardable_optimizer=True))
    cases["dp2-to-cp2"] = flags(
        **settings(inputs, interrupted(folder, "dp2", target / "dp2-to-cp2"), context_parallel=2)
    )
    histories = run_cases(target / "two", 2, cases)
    alone = {
        "dp2-to-dp1": settings(inputs, interrupted(folder, "dp2", target / "dp2-to-dp1")),
        "tp2-to-tp1": settings(inputs, interrupted(folder, "tp2-reshardable", target / "tp2-to-tp1")),
    }
    histories |= run_cases(target / "one", 1, {name: flags(**each) for name, each in alone.items()})
    return target, histories


def figures(history):
    return [(step["step"], step["loss"], step["grad_norm"], step["learning_rate"]) for step in history]


@pytest.mark.parametrize("name", mostly_full(CASES, QUICK))
def test_the_same_layout_goes_on_bit_for_bit(whole, resumed, name):
    assert figures(resumed[1][name]) == figures(whole[1][name])[HALF:]
    verify(*(folder / name / "checkpoint" / "sft" for folder in (whole[0], resumed[0])))


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("dp2-to-dp1", "dp2"),
        ("dp2-to-cp2", "dp2"),
        ("tp2-to-pp2", "tp2-reshardable"),
        ("tp2-to-tp1", "tp2-reshardable"),
    ],
)
def test_another_layout_goes_on_with_the_same_losses(whole, resumed, name, origin):
    losses = [step["loss"] for step in resumed[1][name]]
    assert losses == pytest.approx([step["loss"] for step in whole[1][origin]][HALF:], abs=1e-4)
    (log,) = [path for path in (resumed[0] / name / "log").iterdir() if "going on from" in path.read_text()]
    assert re.search(
        r"layout TP\d PP\d DP\d -> TP\d PP\d( CP\d)? DP\d: optimizer resharded, step 5, data from row 32",
        log.read_text(),
    )


def test_the_figures_of_all_starts_are_kept_once(resumed):
    lines = (resumed[0] / "dp2" / "checkpoint" / "sft" / "metrics.jsonl").read_text().splitlines()
    steps = [figures["step"] for figures in map(json.loads, lines) if "loss" in figures]
    assert steps == list(range(1, STEPS + 1))


def test_a_finished_run_says_so_and_ends_well(inputs, whole):
    code, out, err = finished(start(settings(inputs, whole[0] / "dp2"), ranks=2))
    assert code == 0, err
    assert "all 8 steps are done" in out and "step 8/8 |" not in out


def kill_and_restart(inputs, out, times, steps):
    """Kill a two-rank run `times` times at random moments of its training, then let it finish."""
    words, rng = settings(inputs, out, save_interval=1, train_iters=steps), random.Random(times)
    for _ in range(times):
        process = start(words, ranks=2)
        steps_left = rng.randint(1, 3)
        for line in process.stdout:
            steps_left -= line.startswith("step ")
            if not steps_left:
                break
        time.sleep(rng.uniform(0, 0.6))  # a step takes about half of that, its save a quarter
        process.kill()  # the kernel takes its ranks along
        process.communicate()
    code, said, err = finished(start(words, ranks=2))
    assert code == 0, err
    assert "going on from" in said or "steps are done" in said


@pytest.mark.parametrize(("times", "steps"), [(2, 8), pytest.param(30, 24, marks=pytest.mark.full)])
def test_a_run_survives_being_killed_at_any_moment(inputs, tmp_path, times, steps):
    whole = settings(inputs, tmp_path / "whole", train_iters=steps, save_interval=steps)
    assert finished(start(whole, ranks=2))[0] == 0
    kill_and_restart(inputs, tmp_path / "killed", times, steps)
    metrics = [
        (tmp_path / name / "checkpoint" / "sft" / "metrics.jsonl").read_text().splitlines()
        for name in ("whole", "killed")
    ]
    losses = [{f["step"]: f["loss"] for f in map(json.loads, lines) if "loss" in f} for lines in metrics]
    assert losses[0] == losses[1]
    verify(*(tmp_path / name / "checkpoint" / "sft" for name in ("whole", "killed")))


def test_a_run_goes_on_past_a_damaged_step(inputs, whole, resumed, tmp_path):
    """The step that is damaged is trained again, under the same name."""
    shutil.copytree(whole[0] / "dp2", tmp_path / "out")
    steps = tmp_path / "out" / "checkpoint" / "sft"
    os.truncate(steps / LAST / "common.pt", 10)
    code, out, err = finished(start(settings(inputs, tmp_path / "out"), ranks=2))
    assert code == 0, err
    assert f"set aside as damaged-{LAST}" in out
    verify(steps, whole[0] / "dp2" / "checkpoint" / "sft")


def damaged(whole, tmp_path, damage):
    """A copy of a run's folder whose newest step was damaged."""
    copy = tmp_path / "sft"
    shutil.copytree(whole[0] / "dp2" / "checkpoint" / "sft", copy)
    damage(copy / LAST)
    return copy


def test_a_truncated_step_is_passed_over_and_said(whole, tmp_path):
    copy = damaged(whole, tmp_path, lambda step: os.truncate(step / "__0_0.distcp", 100))
    found, remarks = newest_step(copy)
    assert (found.position.step, found.position.rows) == (HALF, HALF * 8)
    assert len(remarks) == 1 and re.search(r"__0_0.distcp is not what was saved.*ignored", remarks[0])


def test_a_flipped_bit_is_found(whole, tmp_path):
    def flip(step):
        content = bytearray((step / "__1_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (step / "__1_0.distcp").write_bytes(content)

    copy = damaged(whole, tmp_path, flip)
    assert check_step(copy / LAST, contents=False).position.step == STEPS, "sizes alone do not tell"
    assert newest_step(copy)[0].position.step == HALF
    assert {path.name for path in copy.glob("*iter_*")} == {f"iter_{HALF:07d}", f"damaged-{LAST}"}


@pytest.mark.parametrize("text", ["", "{", '{"version": 1}', "[]"])
def test_a_step_without_a_whole_manifest_is_no_step(whole, tmp_path, text):
    copy = damaged(whole, tmp_path, lambda step: (step / "manifest.json").write_text(text))
    assert newest_step(copy)[0].position.step == HALF


def test_a_step_of_a_newer_version_is_named(whole, tmp_path):
    def age(step):
        manifest = json.loads((step / "manifest.json").read_text())
        (step / "manifest.json").write_text(json.dumps(manifest | {"version": 99, "temper": "9.9"}))

    with pytest.raises(CheckpointError, match=r"written by a newer Temper \(9.9\)"):
        check_step(damaged(whole, tmp_path, age) / LAST, contents=True)


def test_the_tracker_is_only_a_hint(whole, tmp_path):
    copy = damaged(whole, tmp_path, lambda step: None)
    (copy / "latest_checkpointed_iteration.txt").write_text("garbage")
    assert newest_step(copy)[0].position.step == STEPS


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        ({"grid": Grid(2, 1, 1)}, {}, r"saved at TP2 PP1 DP1, this is TP1 PP1 DP2.*--reshardable-optimizer"),
        ({"grid": Grid(1, 1, 2, 3)}, {}, r"saved at TP1 PP1 \(first stage 3 layers\) DP2"),
        ({"precision": "fp32"}, {}, r"was trained in fp32, not bf16"),
        ({"sharding": None}, {}, r"saved without the distributed optimizer \(DO\); go on without it"),
        ({}, {"sharding": None}, r"saved with the distributed optimizer \(DO\); go on with it"),
    ],
)
def test_an_optimizer_that_cannot_follow_is_refused(tmp_path, saved, now, message):
    then = {"grid": Grid(1, 1, 2), "precision": "bf16", "sharding": "dp_reshardable"} | saved
    start = {"precision": "bf16", "sharding": "dp_reshardable"} | now
    with pytest.raises(UsageError, match=message):
        require_loadable(Saved(tmp_path, Position(1, 1), **then), Layout(2, 1, 1, False, 1), **start)


def claim(inputs, folder, **changes):
    config = TrainConfig.from_values(settings(inputs, folder, **changes) | {"checkpoint": str(inputs["model"])})
    with claimed(folder, config, find_model(config.model)) as remarks:
        (folder / "iter_0000001").mkdir(exist_ok=True)
        return remarks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 64}, r"(?s)belongs to another run:\n  seq_len: 129 -> 64"),
        ({"seed": 7, "packing": False}, r"(?s)packing: True -> False\n  seed: 1234 -> 7"),
        ({"resume": False}, "--no-resume was said"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_with_old_and_new(inputs, tmp_path, changes, message):
    claim(inputs, tmp_path / "run")
    with pytest.raises(UsageError, match=message):
        claim(inputs, tmp_path / "run", **changes)


def test_other_data_in_the_same_folder_is_refused_unless_its_restart_is_asked_for(inputs, tmp_path):
    claim(inputs, tmp_path / "run")
    other = write_dataset(tmp_path / "other", inputs["model"], rows=20, seed=9)
    with pytest.raises(UsageError, match=r"(?s)data: \w{16} -> \w{16}.*--data-restart"):
        claim(inputs, tmp_path / "run", data=other)
    claim(inputs, tmp_path / "run", data=other, seq_len=64, data_restart=True)


def test_a_changed_schedule_is_only_said(inputs, tmp_path):
    assert not any("changes" in remark for remark in claim(inputs, tmp_path / "run"))
    remarks = claim(inputs, tmp_path / "run", lr=2e-3, train_iters=12)
    assert remarks == ["lr changes from 0.001 to 0.002", "train_iters changes from 8 to 12"]


def test_a_folder_in_use_is_refused_with_its_owner(inputs, tmp_path):
    from toolkits.foundation.lock import locked

    (tmp_path / "run").mkdir()
    with locked(tmp_path / ".lock-run", what="x"), pytest.raises(UsageError, match=f"in use by pid {os.getpid()} on"):
        claim(inputs, tmp_path / "run")


def test_what_a_killed_writer_left_is_removed(inputs, tmp_path):
    claim(inputs, tmp_path / "run")
    (tmp_path / "run" / ".tmp-iter_0000002").mkdir()
    claim(inputs, tmp_path / "run")
    assert not (tmp_path / "run" / ".tmp-iter_0000002").exists()


def test_other_data_is_read_from_its_beginning_once(tmp_path):
    """The line that says --data-restart goes on where it was when it is started again."""

    def start(position, digest, *, restart):
        return _start(Saved(tmp_path, position, Grid(), "fp32", None), digest, restart=restart)

    assert _start(None, "new", restart=True) == Position(data="new")
    assert start(Position(40, 640, "old"), "old", restart=False) == Position(40, 640, "old")
    assert start(Position(40, 640, "old"), "new", restart=True) == Position(40, 0, "new")
    assert start(Position(44, 64, "new"), "new", restart=True) == Position(44, 64, "new")
    assert start(Position(40, 640), "new", restart=False) == Position(40, 640, "new"), "an older step does not say"
    with pytest.raises(UsageError, match="was trained on other data; --data-restart goes on with this one"):
        start(Position(40, 640, "old"), "new", restart=False)
