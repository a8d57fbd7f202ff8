"""What is told of a run to those who watch it: its record and its lineage, from the plan of its start."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from data_preprocessing.dataset import Dataset

from ..monitoring.lineage import Lineage, manifest_hash, origin_of
from ..monitoring.record import RunRecord, recorded
from ..monitoring.trackers import Tracker, open_trackers
from .run_folder import FINGERPRINT
from .sources import DataSource, ModelSource

if TYPE_CHECKING:
    from .run import RunPlan

PACKAGES = ("temper-mcore", "torch", "megatron-core", "transformers")
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Watch:
    """What rank 0 writes for those who watch its run."""

    record: RunRecord
    lineage: Lineage


@contextlib.contextmanager
def watched(plan: "RunPlan") -> Iterator[Watch]:
    """Keep run.json and lineage.json of `plan` while the block runs; only rank 0 calls it, in a claimed folder."""
    about = _about(plan)
    with recorded(plan.folder, about={"steps": plan.steps, **about}, measure=_use) as record:
        start = {
            "started": record.started,
            "line": record.line,
            **about,
            "settings": _settings(plan),
            "data": _datasets(plan.data),
        }
        yield Watch(record, Lineage(record, base=_base(plan), start=start))


def trackers_of(plan: "RunPlan", start: str) -> list[Tracker]:
    """Open the trackers that a run reports to; `start` names this start of it."""
    output = plan.config.output
    return open_trackers(output.tracker, output=output.output, run=start, group=output.name, settings=_settings(plan))


def _about(plan: "RunPlan") -> dict[str, Any]:
    """Return what stays as it is during a start."""
    return {
        "layout": {**asdict(plan.layout.grid), "text": str(plan.layout.grid), "ranks": plan.layout.world},
        "precision": plan.config.compute.precision,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {**{name: metadata.version(name) for name in PACKAGES}, "python": platform.python_version()},
        "commit": _commit(),
    }


def _settings(plan: "RunPlan") -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in plan.config.values().items()}


def _base(plan: "RunPlan") -> dict[str, Any]:
    """Describe what the weights, the config and the tokenizer come from."""
    source, same = plan.source, json.loads((plan.folder / FINGERPRINT).read_text(encoding="utf-8"))["same"]
    kind, folder = _weights(source)
    return {
        "kind": kind,
        "path": str(folder.absolute()),
        "digest": same["base checkpoint"],
        "manifest": manifest_hash(folder),
        "config": same["model"],
        "tokenizer": same["tokenizer"],
        "origin": origin_of(source.hf_files) if kind != "random" else None,
    }


def _weights(source: ModelSource) -> tuple[str, Path]:
    if source.hf_weights is not None:
        return "huggingface", source.hf_weights
    if source.mcore_weights is not None:
        return "megatron-core", source.mcore_weights
    return "random", source.hf_files


def _datasets(data: DataSource) -> list[dict[str, Any]]:
    """Describe every dataset once, with what it is used for."""
    found: dict[Path, dict[str, Any]] = {}
    for use, rows in (("training", data.training), ("validation", data.validation)):
        for part in rows.parts:
            found.setdefault(part.dataset.path, {**_dataset(part.dataset), "uses": []})["uses"].append(use)
    return list(found.values())


def _dataset(dataset: Dataset) -> dict[str, Any]:
    """Describe a dataset; `manifest` is None where its builder left none."""
    return {
        "path": str(dataset.path.absolute()),
        "rows": len(dataset),
        "tokens": int(dataset.lengths.sum()),
        "trained_tokens": dataset.num_trained_tokens,
        "manifest": dataset.manifest,
    }


def _commit() -> str | None:
    """Return the commit of the checkout that runs, `-dirty` when it was changed; None when it is no checkout."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY:  # installed inside another project
            return None
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _use() -> Mapping[str, Any]:
    """Return what rank 0 and its machine use at this moment; the first percentages are 0."""
    process, memory = psutil.Process(), psutil.virtual_memory()
    return {
        "rank_bytes": process.memory_info().rss,
        "machine_bytes": memory.total - memory.available,
        "machine_total_bytes": memory.total,
        "cpu_percent": psutil.cpu_percent(),
        **_gpu_use(),
    }


def _gpu_use() -> dict[str, Any]:
    """Return the use of rank 0's GPU, nothing before training has opened it: a look must not open it first."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    device = int(os.environ.get("LOCAL_RANK", 0))  # a thread has a current device of its own
    use: dict[str, Any] = {}
    with contextlib.suppress(ImportError, RuntimeError):  # a broken device, or no Python package of its driver
        free, total = torch.cuda.mem_get_info(device)
        use |= {"gpu_bytes": total - free, "gpu_total_bytes": total}
        use["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        use["gpu_percent"] = torch.cuda.utilization(device)
    return use
