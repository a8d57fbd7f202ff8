"""Bit by bit comparison of two checkpoints, of either kind, as HuggingFace tensors."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from toolkits.foundation.errors import CheckpointError, raise_all
from toolkits.foundation.progress import Progress

from .hf_as_mcore import HfAsMcore
from .layout import name_of, same_bits
from .mcore_as_hf import McoreAsHf
from .mcore_checkpoint import is_mcore_directory
from .plan import Plan, Step

THREADS = 2


class HfTensors(Protocol):
    """What can be read as HuggingFace tensors."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its HuggingFace name; called from several threads."""


def verify(a: Path, b: Path) -> int:
    """Compare two directories, HuggingFace or Megatron-core; return the number of tensors, all equal.

    Raises CheckpointError that lists every difference.
    """
    (plan, first), (other_plan, second) = _open(a), _open(b)
    problems = [f"{name}: only in {a}" for name in plan.hf_tensors if name not in other_plan.hf_tensors]
    problems += [f"{name}: only in {b}" for name in other_plan.hf_tensors if name not in plan.hf_tensors]
    shared = [step for step in plan.steps if all(part.name in other_plan.hf_tensors for part in step.parts)]
    problems += _differences(shared, first, second, None)
    raise_all(CheckpointError, f"{a} and {b} differ", problems)
    return len(plan.hf_tensors)


def require_equal(plan: Plan, original: HfTensors, written: HfTensors, *, cast: torch.dtype | None) -> None:
    """Raise CheckpointError when what was written, read again, is not the (cast) original bit for bit."""
    problems = _differences(plan.steps, original, written, cast)
    raise_all(CheckpointError, "what was written differs from its source; nothing was published", problems)


def _open(directory: Path) -> tuple[Plan, HfTensors]:
    if is_mcore_directory(directory):
        mcore = McoreAsHf(directory)
        return mcore.plan, mcore
    hf = HfAsMcore(directory)
    return hf.plan, hf.source


def _differences(steps: Sequence[Step], a: HfTensors, b: HfTensors, cast: torch.dtype | None) -> list[str]:
    def compare(step: Step) -> list[str]:
        problems = []
        for part in step.parts:
            first, second = a.read(part.name), b.read(part.name)
            if cast is not None:
                first = first.to(cast)
            if not same_bits(first, second):
                problems.append(f"{part.name}: {_describe(first, second)}")
        return problems

    problems = []
    with (
        Progress("comparing", sum(len(step.parts) for step in steps), unit="tensors") as progress,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for step, found in zip(steps, pool.map(compare, steps), strict=True):
            problems += found
            progress.advance(len(step.parts))
    return problems


def _describe(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name_of(a.dtype)} {list(a.shape)} against {name_of(b.dtype)} {list(b.shape)}"
    # Equal values of other bits are NaNs and signed zeros.
    places = (a != b).nonzero()
    if not len(places):
        return "signs of zeros or NaN payloads differ"
    return f"{len(places):,} of {a.numel():,} elements differ (first at {places[0].tolist()})"
