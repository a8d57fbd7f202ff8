"""Conversion in bounded memory: sparse checkpoints of any size, their output thrown away, anonymous memory watched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = 512_000_000  # bytes of anonymous memory beside twice the largest tensor; torch itself takes a part

# Lays out a directory without its data: what is not written is 0. Then converts it with every write of data thrown
# away, and prints the highest anonymous memory, the bytes of the model and of its largest tensor.
MEASURED = """
import json, sys, threading
from dataclasses import replace
from pathlib import Path
import torch
from conversion import filling, hf_to_mcore, mcore_to_hf, output
from conversion.hf_checkpoint import safetensors_files
from conversion.mcore_writer import Chunk, lay_out
from conversion.plan import plan_for
from tests.conversion_models import UNTIED

direction, layers, vocabulary, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
config = UNTIED | {"num_hidden_layers": layers, "vocab_size": vocabulary, "hidden_size": 4096, "dtype": "bfloat16",
                   "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
plan, source = plan_for(config), folder / "source"
parts = {part.name: (torch.bfloat16, part.shape) for step in plan.steps for part in step.parts}
if direction == "hf2mcore":
    files, index = safetensors_files(parts, lambda name, place: None)
    convert, step = hf_to_mcore.convert, source
else:
    chunks = [Chunk(step.key, plan.tensors[step.key].shape, step.index + (0,) * len(step.shape),
                    (1,) * len(step.index) + step.shape, torch.bfloat16, None) for step in plan.steps]
    layout = lay_out(chunks, [])
    files, index, convert, step = layout.files, None, mcore_to_hf.convert, source / "release"
filling.write_files(step, [replace(file, spans=()) for file in files])
if direction == "mcore2hf":
    layout.finish(step)
(source / "config.json").write_text(json.dumps(config))
if index:
    (source / "model.safetensors.index.json").write_text(json.dumps(index))

honest = filling._write
filling._write = lambda descriptor, content, start: (
    start + len(content) if len(content) > 100_000 else honest(descriptor, content, start))
output.require_space = lambda *_: None
peak, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.01):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak[0] = max(peak[0], *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
watcher = threading.Thread(target=watch)
watcher.start()
convert(source, folder / "out", verify=True, workers=4)
stop.set()
watcher.join()
print(json.dumps({"peak": peak[0], "model": 2 * plan.num_parameters,
                  "largest": 2 * max(torch.Size(step.shape).numel() for step in plan.steps)}))
"""


def measure(direction, layers, vocabulary, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, direction, str(layers), str(vocabulary), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    print(figures)
    return figures


@pytest.mark.parametrize("direction", ["hf2mcore", "mcore2hf"])
def test_memory_stays_below_twice_the_largest_tensor_and_a_half_gigabyte(tmp_path, direction):
    figures = measure(direction, 3, 8_000, tmp_path)
    assert figures["model"] > 1_400_000_000 and figures["peak"] > 50_000_000
    assert figures["peak"] < BASE + 2 * figures["largest"] < figures["model"], figures


@pytest.mark.full
@pytest.mark.parametrize("direction", ["hf2mcore", "mcore2hf"])
def test_memory_of_a_sparse_checkpoint_of_20_gb(tmp_path, direction):
    figures = measure(direction, 42, 128_000, tmp_path)
    assert figures["model"] > 20_000_000_000
    assert figures["peak"] < BASE + 2 * figures["largest"], figures
