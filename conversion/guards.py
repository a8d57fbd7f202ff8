"""Checks that both directions of a conversion make."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch

from toolkits.foundation.errors import CheckpointError, UsageError

from .layout import describe_nonfinite, is_finite, name_of


def refuse_overlap(source: Path, target: Path) -> None:
    """Raise UsageError when one folder is, or lies inside, the other."""
    a, b = Path(source).resolve(), Path(target).resolve()
    if a == b:
        raise UsageError(f"input and output are the same folder: {a}")
    if a in b.parents or b in a.parents:
        raise UsageError(f"one of input {a} and output {b} lies inside the other; choose an output elsewhere")


def explain_nonfinite(name: str, stored: torch.Tensor, dtype: torch.dtype) -> NoReturn:
    """Raise CheckpointError that says why `stored`, cast to `dtype`, has NaN or Inf in it."""
    if is_finite(stored):
        raise CheckpointError(f"{name} does not fit {name_of(dtype)}; choose another --dtype")
    raise CheckpointError(f"{describe_nonfinite(stored)} in {name}; --allow-nonfinite converts it all the same")


def note_dtype(said: str | None, dtypes: Iterable[torch.dtype]) -> list[str]:
    """Say so when config.json names another type than the tensors have, and return what was said."""
    kinds = sorted({name_of(dtype) for dtype in dtypes})
    if said is None or kinds == [said]:
        return []
    note = f"config.json says {said}, the tensors are {', '.join(kinds)}: kept as they are"
    print(f"note: {note}", file=sys.stderr)
    return [note]
