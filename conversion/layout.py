"""Tensor arithmetic between the HuggingFace and the Megatron-core layout, in inverse pairs.

A fused tensor is a list of row blocks (`plan.RowBlock`): which rows of which part lie under each other.
Fusing gathers them, splitting takes them apart; so one description serves every way of fusing, in both
directions, and a slice of a fused tensor touches only the rows that it is made of.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from toolkits.foundation.errors import UsageError

from .plan import RowBlock

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return the dtype of a `--dtype` value, None for None; raise UsageError for another name."""
    if name is None:
        return None
    full = _SHORT_NAMES.get(name, name)
    if full not in DTYPES:
        raise UsageError(f"--dtype {name}: choose one of {', '.join([*DTYPES, *_SHORT_NAMES])}")
    return DTYPES[full]


def name_of(dtype: torch.dtype) -> str:
    """Return `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def fuse(
    parts: Sequence[torch.Tensor], blocks: Sequence[RowBlock], *, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Return rows `start` to `stop` of the fused tensor `[rows, ...]`; a single block comes back as a view."""
    pieces, top = [], 0
    for block in blocks:
        first = max(start, top)
        last = top + block.rows if stop is None else min(stop, top + block.rows)
        if first < last:
            shift = block.start - top
            pieces.append(parts[block.part][first + shift : last + shift])
        top += block.rows
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def split(fused: torch.Tensor, blocks: Sequence[RowBlock], part: int) -> torch.Tensor:
    """Return part number `part` `[rows, ...]` of a fused tensor; a single block comes back as a view."""
    pieces, top = [], 0
    for block in blocks:
        if block.part == part:
            pieces.append((block.start, fused[top : top + block.rows]))
        top += block.rows
    pieces.sort(key=lambda piece: piece[0])
    return pieces[0][1] if len(pieces) == 1 else torch.cat([rows for _, rows in pieces])


def tops_of(blocks: Iterable[RowBlock]) -> Iterator[tuple[int, RowBlock]]:
    """Yield each block with its first row in the fused tensor."""
    top = 0
    for block in blocks:
        yield top, block
        top += block.rows


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. Its extremes tell, without a temporary tensor of its size."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def describe_nonfinite(tensor: torch.Tensor) -> str:
    """Say how many elements are not finite and where the first is: `3 NaN or Inf (first at [0, 7])`."""
    found = (~torch.isfinite(tensor)).nonzero()
    return f"{len(found)} NaN or Inf (first at {found[0].tolist()})"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit are equal; NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = _integers(a), _integers(b)
    if first.dtype != second.dtype:
        first, second = _integers(a.clone()), _integers(b.clone())
    return torch.equal(first, second)


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits as the largest integers that they make up: those are compared five times as fast."""
    size, offset = tensor.numel() * tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    if tensor.is_contiguous() and size % 8 == offset % 8 == 0:
        return tensor.view(-1).view(torch.int64)
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
