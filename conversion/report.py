"""`conversion_report.json`: what a conversion made of what, and the hash of every tensor and file that it wrote.

    {"version": 1, "temper": "0.1.0", "made": "hf2mcore", "source": DIR, "family": "qwen2", "parameters": 113936,
     "cast": null, "notes": [...], "verdict": "read again and equal bit for bit",
     "tensors": [{"source": [NAME, ...], "target": NAME, "shape": [...], "dtype": "bfloat16", "sha256": HEX}, ...],
     "left_out": [NAME, ...], "files": {PATH: [bytes, sha256], ...}}

A Megatron-core tensor is called by its key and its place on the merged axes: `decoder.layers.mlp.linear_fc2.weight[3]`.
Its hash is that of the elements in their order, little endian; null when nothing was verified. `left_out` names tensors
of the source that are no weights or repeat another. `files` has every other file of the output.
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

from .hf_checkpoint import HfCheckpoint
from .journal import JOURNAL_FILE
from .layout import name_of
from .mcore_checkpoint import McoreCheckpoint
from .mcore_directory import is_mcore_directory
from .plan import Plan, Step

REPORT_FILE = "conversion_report.json"
VERSION = 1
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
    """A tensor as it was written: what it was made of, the file that it lies in, and how to read it."""

    sources: tuple[str, ...]
    file: str
    read: Callable[[], torch.Tensor]


def write_report(folder: Path, plan: Plan, story: Story, *, hashes: Mapping[str, str]) -> None:
    """Write the report of a complete output; tensors of one that is not verified have no hashes."""
    targets = targets_of(folder, plan)
    assert not story.verified or targets.keys() <= hashes.keys(), sorted(targets.keys() - hashes.keys())
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
        "tensors": [_entry(name, target, hashes.get(name)) for name, target in targets.items()],
        "left_out": sorted(story.left_out),
        "files": {path.relative_to(folder).as_posix(): describe(path) for path in _other_files(folder)},
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def place_of(step: Step) -> str:
    """Return what a report calls the Megatron-core tensor of a step: `KEY[layer, expert]`."""
    return f"{step.key}[{', '.join(map(str, step.index))}]" if step.index else step.key


def targets_of(folder: Path, plan: Plan) -> dict[str, Target]:
    """Return the tensors of a directory that this project wrote, by the names that a report gives them."""
    if is_mcore_directory(folder):
        mcore = McoreCheckpoint(folder)
        return {
            place_of(step): Target(
                tuple(part.name for part in step.parts), _file_of(mcore, step), partial(_read, mcore, step)
            )
            for step in plan.steps
        }
    hf = HfCheckpoint(folder)
    return {
        name: Target((place_of(step),), hf.tensors[name].file, partial(hf.read, name))
        for name, (step, _) in plan.hf_tensors.items()
    }


def hashed(targets: Mapping[str, Target]) -> Iterator[tuple[str, str]]:
    """Yield name and sha256 of each tensor, in their order."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from zip(targets, pool.map(lambda target: sha256_of(target.read()), targets.values()), strict=True)


def sha256_of(*pieces: torch.Tensor) -> str:
    """Return the sha256 of the elements of tensors, one behind the other."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(path: Path) -> list[int | str]:
    """Return size and sha256 of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _entry(name: str, target: Target, sha256: str | None) -> dict[str, object]:
    tensor = target.read()
    return {
        "source": list(target.sources),
        "target": name,
        "shape": list(tensor.shape),
        "dtype": name_of(tensor.dtype),
        "sha256": sha256,
    }


def _read(mcore: McoreCheckpoint, step: Step) -> torch.Tensor:
    shape = (1,) * len(step.index) + step.shape
    return mcore.read(step.key, step.index + (0,) * len(step.shape), shape).reshape(step.shape)


def _file_of(mcore: McoreCheckpoint, step: Step) -> str:
    chunks = mcore.tensors[step.key].chunks
    return next(chunk.file for chunk in chunks if chunk.offsets[: len(step.index)] == step.index)


def _other_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in _WEIGHTS)
    return [path for path in found if path not in (folder / REPORT_FILE, folder / JOURNAL_FILE)]
