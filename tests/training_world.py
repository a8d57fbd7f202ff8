"""Helpers of the training tests: a tiny model and dataset, and ranks that run a list of cases.

Run as a script this file is one rank: `RANK=.. WORLD_SIZE=.. python training_world.py CASES.json`.
"""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from toolkits.cards.sample import (  # noqa: F401 - some are here for the tests
    VOCABULARY,
    write_dataset,
    write_judged,
    write_pairs,
    write_tokenizer,
)

ROOT = Path(__file__).resolve().parents[1]
# Pairwise distinct sizes, so that no missing transpose goes unseen.
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}

# What two ranks can share, each by itself.
LAYOUTS = {
    "tp2": {"tensor_parallel": 2, "sequence_parallel": False},
    "tp2-sp": {"tensor_parallel": 2},
    "tp2-plain": {"tensor_parallel": 2, "distributed_optimizer": False},
    "pp2": {"pipeline_parallel": 2},
    "pp2-virtual": {"pipeline_parallel": 2, "virtual_stage_layers": 1},
    "cp2": {"context_parallel": 2},
    "dp2": {},
}


def write_model(folder, *, tied=True, seed=11, **changes):
    """Write a random HuggingFace checkpoint whose every weight, norms and biases too, says something."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**(TINY | changes), tie_word_embeddings=tied, dtype="float32"))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.mul_(3.0)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def flags(**values):
    """Turn settings into the flags of a rank."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    return words


def mostly_full(names, quick):
    """Parameters of a test: those that are not `quick` are with the long tests."""
    import pytest

    return [name if name in quick else pytest.param(name, marks=pytest.mark.full) for name in names]


def selected(request, parameter):
    """The values of a parameter that tests of this module will run with: what its fixtures have to make."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    calls = [item.callspec.params for item in items]
    return {call[parameter] for call in calls if parameter in call}


def run_cases(folder, ranks, cases, *, script=__file__, objective="sft"):
    """Run each case (a list of flags) of an objective on `ranks` ranks, one after the other.

    Returns the histories by name. A history is a list of step figures as dicts. A case that fails fails the whole
    world. `script` is what a rank runs: it calls `rank_main` in the end.
    """
    folder.mkdir(exist_ok=True)
    ports = free_ports(len(cases))
    plan = [
        {"name": name, "port": port, "flags": case, "objective": objective}
        for (name, case), port in zip(cases.items(), ports, strict=True)
    ]
    (folder / "cases.json").write_text(json.dumps(plan))
    run_ranks([script, folder / "cases.json"], ranks, logs=folder)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


def run_ranks(words, ranks, *, logs):
    """Run the script and arguments `words` on `ranks` ranks; one that fails fails the test with what all said."""
    world = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    processes = []
    for rank in range(ranks):
        env = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(logs / f"rank-{rank}.log", "wb") as log:
            command = [sys.executable, "-W", "ignore", *map(str, words)]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * ranks, "\n".join((logs / f"rank-{rank}.log").read_text() for rank in range(ranks))


def wait(processes, seconds=400):
    """Return the exit codes; when one rank fails, the others would wait for it."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    return [process.poll() for process in processes]


def start(words, *, ranks=1, objective="sft", **variables):
    """Start `temper train sft` with the flags `words`, or the settings in a dict, in a process of its own."""
    words = flags(**words) if isinstance(words, dict) else words
    command = [sys.executable, "-m", "toolkits.cli", "train", objective, *map(str, words), "--ranks", str(ranks)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    """Wait for a process; return its exit code and what it said on stdout and stderr."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def free_ports(count):
    """Ports below those that the kernel hands out: nothing that the ranks open meanwhile can take them.

    A trainer to compare with may have seeded `random`, in every process of the suite alike: the system draws.
    """
    ports = iter(random.SystemRandom().sample(range(15000, 32000), 1000))
    return [next(filter(is_free, ports)) for _ in range(count)]


def is_free(port):
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def rank_main(cases):
    from toolkits.training.objectives import OBJECTIVES
    from toolkits.training.options import parse_flags
    from toolkits.training.run import run

    for case in json.loads(cases.read_text()):
        os.environ["MASTER_PORT"] = str(case["port"])
        history = run(parse_flags(case["flags"]), OBJECTIVES[case["objective"]])
        if os.environ["RANK"] == "0":
            figures = [dataclasses.asdict(step) for step in history]
            (cases.parent / f"{case['name']}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    rank_main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as a real rank leaves
