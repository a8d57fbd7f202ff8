"""Bit by bit comparison of two checkpoints, of either kind, as HuggingFace tensors."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from toolkits.foundation.errors import CheckpointError, UsageError
from toolkits.foundation.progress import Progress

from .hf_as_mcore import HfAsMcore
from .layout import name_of, same_bits
from .mcore_as_hf import McoreAsHf
from .mcore_checkpoint import is_mcore_directory
from .plan import Plan, Step
from .recorded import MANIFEST_FILE, check_recorded
from .report import REPORT_FILE

THREADS = 2
SHOWN = 10  # differences that are described; the others are counted


class HfTensors(Protocol):
    """What can be read as HuggingFace tensors."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its HuggingFace name; called from several threads."""


def verify(a: Path, b: Path) -> int:
    """Compare two directories, HuggingFace or Megatron-core; return the number of tensors, all equal.

    Raises CheckpointError that counts the differences and describes the first of them.
    """
    (plan, first), (other_plan, second) = _open(a), _open(b)
    problems = [f"{name}: only in {a}" for name in plan.hf_tensors if name not in other_plan.hf_tensors]
    problems += [f"{name}: only in {b}" for name in other_plan.hf_tensors if name not in plan.hf_tensors]
    shared = [step for step in plan.steps if all(part.name in other_plan.hf_tensors for part in step.parts)]
    different = _differences(shared, first, second)
    if not problems and not different:
        return len(plan.hf_tensors)
    counted = f"{len(different)} of {sum(len(step.parts) for step in shared)} tensors differ"
    if problems:
        counted += f", {len(problems)} are only in one"
    rest = len(problems) + len(different) - SHOWN
    shown = [*problems, *different][:SHOWN] + [f"and {rest} more"] * (rest > 0)
    raise CheckpointError("\n".join([f"{a} and {b} differ: {counted}", *(f"  - {line}" for line in shown)]))


def verify_record(directory: Path) -> str:
    """Hold a directory against the record of how it was made, hash by hash; return what was held.

    Raises CheckpointError for each difference, and UsageError when there is no record.
    """
    plan, opened = _open(directory)
    step = opened.checkpoint.step if isinstance(opened, McoreAsHf) else Path(directory)
    held = check_recorded(step, plan, everything=True)
    if held is None:
        raise UsageError(
            f"{directory} has no {REPORT_FILE} or {MANIFEST_FILE} with hashes: name a directory to compare it with"
        )
    return held


def _open(directory: Path) -> tuple[Plan, HfTensors]:
    if is_mcore_directory(directory):
        mcore = McoreAsHf(directory)
        return mcore.plan, mcore
    hf = HfAsMcore(directory)
    return hf.plan, hf.source


def _differences(steps: Sequence[Step], a: HfTensors, b: HfTensors) -> list[str]:
    def compare(step: Step) -> list[str]:
        problems = []
        for part in step.parts:
            first, second = a.read(part.name), b.read(part.name)
            if not same_bits(first, second):
                problems.append(f"{part.name}: {describe_difference(first, second)}")
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


def describe_difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """Say how two tensors differ, in no more memory than a byte for each element."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name_of(a.dtype)} {list(a.shape)} against {name_of(b.dtype)} {list(b.shape)}"
    different = (a != b).logical_and_(~(a.isnan() & b.isnan()))
    count = int(different.sum())
    if not count:  # equal values of other bits
        return "signs of zeros or NaN payloads differ"
    first = torch.unravel_index(different.view(-1).view(torch.uint8).argmax(), different.shape)
    return f"{count:,} of {a.numel():,} elements differ (first at {[int(axis) for axis in first]})"
