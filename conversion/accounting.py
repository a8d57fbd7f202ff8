"""Closed accounting: every tensor of the plan is there in its shape, and nothing else is."""

import re
from collections.abc import Mapping

from toolkits.foundation.errors import CheckpointError, raise_all

from .plan import Part, Plan

_LAYER = re.compile(r"(.*\blayers\.(\d+))\.(.+)")


def account(plan: Plan, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Hold the HuggingFace names and shapes found in `where` against the plan.

    Raises one CheckpointError that lists everything missing, unexpected and of another shape.
    """
    missing = [name for name in plan.hf_tensors if name not in shapes]
    ignored = [re.compile(pattern) for pattern in plan.family.ignored_hf]
    unexpected = [
        name
        for name in sorted(shapes)
        if name not in plan.hf_tensors and not any(pattern.fullmatch(name) for pattern in ignored)
    ]
    problems = [f"missing: {line}" for line in grouped(missing)]
    problems += [f"unexpected: {line}" for line in grouped(unexpected)]
    for name, (step, number) in plan.hf_tensors.items():
        part = step.parts[number]
        if name in shapes and shapes[name] != part.shape:
            problems.append(f"{name}: {compare_shapes(shapes[name], part, plan)}")
    raise_all(CheckpointError, f"{where} is not the model that its config.json describes", problems)


def compare_shapes(found: tuple[int, ...], part: Part, plan: Plan) -> str:
    """Say how a shape differs from the plan's and which fields of config.json to look at."""
    fields = [
        plan.config_fields(axis)
        for axis, size, expected in zip(part.axes, found, part.shape, strict=False)
        if size != expected
    ]
    hint = f": config.json {', '.join(fields)}?" if fields and len(found) == len(part.shape) else ""
    return f"checkpoint {list(found)}, config says {list(part.shape)}{hint}"


def grouped(names: list[str]) -> list[str]:
    """Return lines of names, those of one layer on one line."""
    layers: dict[str, list[str]] = {}
    lines = []
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is None:
            lines.append(name)
        else:
            layers.setdefault(match[1], []).append(match[3])
    return lines + [f"{layer}: {', '.join(rest)}" for layer, rest in layers.items()]
