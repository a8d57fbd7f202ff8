"""Comparing a tensor with its source while both are still in memory, a run of rows at a time."""

from collections.abc import Callable, Mapping

import torch

from .filling import row_runs
from .layout import same_bits, tops_of
from .plan import Step
from .verify import describe_difference


def differences(
    step: Step, parts: Mapping[int, torch.Tensor], rows: Callable[[int, int], torch.Tensor], dtype: torch.dtype
) -> list[str]:
    """Return what differs between parts of a step, by number, and its fused tensor, of which `rows` gives rows.

    Each side is what the layout makes of the other; both are compared as `dtype`.
    """
    different = set()
    for top, block in tops_of(step.blocks):
        if block.part in parts and block.part not in different:
            for start, stop in row_runs((block.rows, *step.shape[1:]), dtype.itemsize):
                part = parts[block.part][block.start + start : block.start + stop]
                if not same_bits(part.to(dtype), rows(top + start, top + stop).to(dtype)):
                    different.add(block.part)
                    break
    problems = []
    for number in sorted(different):
        source, written = parts[number].to(dtype), _part(step, number, rows).to(dtype)
        problems.append(f"{step.parts[number].name}: {describe_difference(source, written)}")
    return problems


def _part(step: Step, number: int, rows: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    placed = [(block.start, top, block.rows) for top, block in tops_of(step.blocks) if block.part == number]
    return torch.cat([rows(top, top + count) for _, top, count in sorted(placed)])
