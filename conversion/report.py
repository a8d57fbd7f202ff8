"""`conversion_report.json`: what a conversion made of what, and the hash of every tensor and file that it wrote.

    {"version": 2, "temper": "0.1.0", "made": "hf2mcore", "source": DIR, "family": "qwen2", "parameters": 113936,
     "cast": null, "notes": [...], "verdict": "read again and equal bit for bit",
     "tensors": [{"source": [NAME, ...], "target": NAME, "shape": [...], "dtype": "bfloat16", "sha256": HEX}, ...],
     "left_out": [NAME, ...], "files": {PATH: [bytes, sha256], ...}}

A Megatron-core tensor is called by its key and its place on the merged axes: `decoder.layers.mlp.linear_fc2.weight[3]`.
Hashes are those of HuggingFace tensors, of the elements in their order, little endian: a tensor has the same hash in
whatever directory it lies, and one that is converted is hashed once. Of a Megatron-core directory `sha256` is therefore
a list, with the hash of each of `source`. It is null when nothing was verified. `left_out` names tensors of the source
that are no weights or repeat another. `files` has every other file of the output.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from .filling import row_runs
from .hf_checkpoint import HfCheckpoint
from .journal import JOURNAL_FILE
from .layout import name_of, split
from .mcore_checkpoint import McoreCheckpoint
from .mcore_directory import is_mcore_directory
from .plan import Plan, Step

REPORT_FILE = "conversion_report.json"
VERSION = 2
VERIFIED, NOT_VERIFIED = "read again and equal bit for bit", "not verified"
THREADS = 2

_WEIGHTS = (".safetensors", ".distcp")


@dataclass(frozen=True)
class Story:
    """What only the conversion itself knows: its direction and source, and what is worth noting about it."""

    made: str
    source: Path
    verified: bool
    cast: str | None = None
    notes: Sequence[str] = ()
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class Target:
    """A HuggingFace tensor where it lies: what it is called there, in which file, and how to read it."""

    called: str
    file: str
    read: Callable[[], torch.Tensor]


def write_report(folder: Path, plan: Plan, story: Story, *, hashes: Mapping[str, str]) -> None:
    """Write the report of a complete output; tensors of one that is not verified have no hashes."""
    if story.verified:
        assert (names := targets_of(folder, plan).keys()) <= hashes.keys(), sorted(names - hashes.keys())
    report = {
        "version": VERSION,
        "temper": version("temper-mcore"),
        "made": story.made,
        "source": str(story.source),
        "family": plan.family.name,
        "parameters": plan.num_parameters,
        "cast": story.cast,
        "notes": list(story.notes),
        "verdict": VERIFIED if story.verified else NOT_VERIFIED,
        "tensors": list(_entries(folder, plan, hashes)),
        "left_out": sorted(story.left_out),
        "files": {path.relative_to(folder).as_posix(): describe(path) for path in _other_files(folder)},
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def place_of(step: Step) -> str:
    """Return what a report calls the Megatron-core tensor of a step: `KEY[layer, expert]`."""
    return f"{step.key}[{', '.join(map(str, step.index))}]" if step.index else step.key


def targets_of(folder: Path, plan: Plan) -> dict[str, Target]:
    """Return the HuggingFace tensors that a directory of either kind, written by this project, holds."""
    if is_mcore_directory(folder):
        mcore = McoreCheckpoint(folder)
        return {
            part.name: Target(_called(part.name, step), _file_of(mcore, step), partial(_part, mcore, step, number))
            for step in plan.steps
            for number, part in enumerate(step.parts)
        }
    hf = HfCheckpoint(folder)
    return {name: Target(name, hf.tensors[name].file, partial(hf.read, name)) for name in plan.hf_tensors}


def hashed(targets: Mapping[str, Target]) -> Iterator[tuple[str, str]]:
    """Yield name and sha256 of each tensor, in their order."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from zip(targets, pool.map(lambda target: sha256_of(target.read()), targets.values()), strict=True)


def sha256_of(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """Return the sha256 of a tensor's elements, cast to `dtype`."""
    digest = hashlib.sha256()
    for start, stop in row_runs(tensor.shape, tensor.element_size()):
        rows = tensor[start:stop].to(dtype or tensor.dtype)
        digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(path: Path) -> list[int | str]:
    """Return size and sha256 of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _entries(folder: Path, plan: Plan, hashes: Mapping[str, str]) -> Iterator[dict[str, object]]:
    if not is_mcore_directory(folder):
        hf = HfCheckpoint(folder)
        for name, (step, number) in plan.hf_tensors.items():
            yield _entry([place_of(step)], name, step.parts[number].shape, hf.read(name), hashes.get(name))
        return
    mcore = McoreCheckpoint(folder)
    for step in plan.steps:
        names = [part.name for part in step.parts]
        found = [hashes[name] for name in names if name in hashes] or None
        yield _entry(names, place_of(step), step.shape, _read(mcore, step), found)


def _entry(
    source: list[str], target: str, shape: tuple[int, ...], tensor: torch.Tensor, sha256: str | list[str] | None
) -> dict[str, object]:
    assert tensor.shape == shape, (target, tensor.shape, shape)
    dtype = name_of(tensor.dtype)
    return {"source": source, "target": target, "shape": list(shape), "dtype": dtype, "sha256": sha256}


def _called(name: str, step: Step) -> str:
    return place_of(step) if len(step.parts) == 1 else f"{place_of(step)} ({name})"


def _part(mcore: McoreCheckpoint, step: Step, number: int) -> torch.Tensor:
    return split(_read(mcore, step), step.blocks, number)


def _read(mcore: McoreCheckpoint, step: Step) -> torch.Tensor:
    shape = (1,) * len(step.index) + step.shape
    return mcore.read(step.key, step.index + (0,) * len(step.shape), shape).reshape(step.shape)


def _file_of(mcore: McoreCheckpoint, step: Step) -> str:
    chunks = mcore.tensors[step.key].chunks
    return next(chunk.file for chunk in chunks if chunk.offsets[: len(step.index)] == step.index)


def _other_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in _WEIGHTS)
    return [path for path in found if path not in (folder / REPORT_FILE, folder / JOURNAL_FILE)]
