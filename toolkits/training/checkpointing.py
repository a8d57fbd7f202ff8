"""A run's state on disk: one folder a step, complete or not there at all.

checkpoint/NAME/iter_0000100/   the torch_dist files of model, optimizer and random states
                manifest.json   step, data position, layout, and every file with its size and hash
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from conversion.mcore_directory import step_folders
from conversion.safe_pickle import read_metadata

from ..foundation.errors import CheckpointError, TemperError, UsageError
from .layout import Grid, Layout
from .optimizer import optimizer_state, restore_optimizer
from .parallel.model import Chunks, sharded_state
from .weights import load_mcore

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Position:
    """How far a run is: optimizer steps taken, and rows consumed over all ranks of the data with digest `data`."""

    step: int = 0
    rows: int = 0
    data: str = ""  # empty in steps that older versions wrote


@dataclass(frozen=True)
class Saved:
    """What a step folder says of itself.

    `sharding` is how the distributed optimizer's state was laid out, None for the plain optimizer.
    """

    folder: Path
    position: Position
    grid: Grid
    precision: str
    sharding: str | None


@dataclass(frozen=True)
class RunState:
    """What is saved and restored of a run on this rank."""

    chunks: Chunks
    optimizer: MegatronOptimizer
    layout: Layout
    precision: str
    sharding: str | None
    complete: Callable[[Path], None] | None = None  # adds to a step's folder what other tools read


def check_step(folder: Path, *, contents: bool) -> Saved:
    """Hold a step folder against its manifest and return what it says; raise CheckpointError when it is damaged.

    Sizes and metadata always; the hashes of all files with `contents`.
    """
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if said["version"] > FORMAT_VERSION:
            raise CheckpointError(f"{folder} was written by a newer Temper ({said['temper']}); use that one")
        for name, described in said["files"].items():
            if describe(folder / name, contents=contents) != (described if contents else described[:1]):
                raise CheckpointError(f"{folder / name} is not what was saved: truncated or changed")
        position, grid = Position(**said["position"]), Grid(**said["layout"])
        saved = Saved(folder, position, grid, said["precision"], said["sharding"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, TemperError):
            raise
        raise CheckpointError(f"{folder} is no complete step: {error}") from error
    read_metadata(folder)
    return saved


def newest_step(folder: Path) -> tuple[Saved | None, list[str]]:
    """Return the newest undamaged step of `folder`, and a sentence for each newer one that is damaged.

    A damaged one is set aside as `damaged-iter_NNNNNNN`. The folders decide; the tracker file is for other
    tools. Only rank 0 calls it.
    """
    remarks: list[str] = []
    for candidate in reversed(step_folders(folder)):
        try:
            return check_step(candidate, contents=True), remarks
        except CheckpointError as error:
            aside = candidate.with_name(f"damaged-{candidate.name}")
            if aside.exists():
                shutil.rmtree(aside)
            candidate.rename(aside)
            remarks.append(f"{error}; it is ignored and set aside as {aside.name}")
    return None, remarks


def require_loadable(saved: Saved, layout: Layout, *, precision: str, sharding: str | None) -> None:
    """Raise UsageError when the saved optimizer cannot go on in this layout."""
    then, now = (replace(grid, data=1, context=1) for grid in (saved.grid, layout.grid))
    if saved.precision != precision:
        raise UsageError(f"{saved.folder} was trained in {saved.precision}, not {precision}; a run keeps its precision")
    if (saved.sharding is None) != (sharding is None):
        was = "without" if saved.sharding is None else "with"
        raise UsageError(f"{saved.folder} was saved {was} the distributed optimizer (DO); go on {was} it")
    if then != now and saved.sharding == "dp_reshardable":
        raise UsageError(
            f"{saved.folder} was saved at {saved.grid}, this is {layout.grid}: its optimizer state follows a change of "
            "DP and CP only. Go on with that layout; a run started with --reshardable-optimizer "
            "can change it"
        )


def load_step(saved: Saved, state: RunState) -> None:
    """Put a saved step into model, optimizer and random states; all ranks call it."""
    load_mcore(state.chunks, saved.folder)  # scans the folder first
    restore_optimizer(state.optimizer, state.chunks, saved.folder, sharding=saved.sharding)
    if saved.grid == state.layout.grid:
        loaded = dist_checkpointing.load({"rng_state": _random_states(state.layout)}, str(saved.folder))
        _set_random_states(loaded["rng_state"])


def sharded_run(state: RunState) -> dict[str, Any]:
    """Return everything that is saved of a run, as this rank's part of it."""
    chunks = sharded_state(state.chunks)
    optimizer = optimizer_state(state.optimizer, chunks, sharding=state.sharding)
    for chunk, tensors in zip(state.chunks, chunks.values(), strict=True):
        _exact_vocabulary(tensors, chunk.real_vocab_size)
    return {**chunks, "optimizer": optimizer, "rng_state": _random_states(state.layout)}


def _exact_vocabulary(state: dict[str, Any], rows: int) -> None:
    """Leave the rows that only pad the vocabulary out of the embedding and the head, in place.

    So a checkpoint has exactly config.vocab_size rows and knows no TP. The optimizer's entries keep the
    padding: they belong to the layout that wrote them.
    """
    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    for name in vocabulary:
        tensor = state.get(name)
        if tensor is None or tensor.key not in vocabulary or tensor.global_shape[0] == rows:
            continue
        kept = max(0, min(tensor.local_shape[0], rows - tensor.global_offset[0]))
        data = tensor.data.detach()[:kept]
        state[name] = replace(
            tensor,
            data=data,
            local_shape=tuple(data.shape),
            global_shape=(rows, *tensor.global_shape[1:]),
            axis_fragmentations=None,  # uneven: the last rank holds fewer rows
        )


def _random_states(layout: Layout) -> ShardedObject:
    states = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    shape = (layout.tensor, layout.pipeline, layout.data * layout.context)
    return ShardedObject("rng_state", states, shape, place)


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def describe(path: Path, *, contents: bool = True) -> list[Any]:
    """Return [size] of a file, or [size, sha256]."""
    size = os.path.getsize(path)
    if not contents:
        return [size]
    with open(path, "rb") as file:
        return [size, hashlib.file_digest(file, "sha256").hexdigest()]


def manifest(state: RunState, position: Position, files: dict[str, list[Any]]) -> dict[str, Any]:
    """Return what a step folder says of itself, with the size and hash of each of its `files`."""
    from importlib.metadata import version

    return {
        "version": FORMAT_VERSION,
        "temper": version("temper-mcore"),
        "position": asdict(position),
        "layout": asdict(state.layout.grid),
        "precision": state.precision,
        "sharding": state.sharding,
        "files": files,
    }
