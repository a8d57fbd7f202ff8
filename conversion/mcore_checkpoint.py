"""Reading a Megatron-core (torch_dist) directory lazily, without Megatron-core."""

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError

from .mapped_file import MappedFolder
from .mcore_directory import find_step, hf_folder, is_mcore_directory, require_torch_dist
from .safe_pickle import METADATA_FILE, Archive, StoredChunk, StoredTensor, read_metadata
from .split_keys import merged

__all__ = ["McoreCheckpoint", "Region", "find_step", "hf_folder", "is_mcore_directory"]

Bounds = tuple[tuple[int, int], ...]  # first and behind the last, axis by axis


class McoreCheckpoint:
    """The tensors of a step folder by key.

    `tensors[key]` has `dtype` and the whole `shape`, merged layer axis included; experts are merged whatever way
    they were saved in. Every pickle comes in through `safe_pickle`.
    """

    def __init__(self, directory: Path) -> None:
        self.step = find_step(directory)
        require_torch_dist(self.step)
        self.tensors: dict[str, StoredTensor] = merged(read_metadata(self.step).tensors)
        self._files = MappedFolder(self.step)
        self._chunks: dict[StoredChunk, torch.Tensor] = {}

    @property
    def files(self) -> list[Path]:
        """The metadata and the files that the tensors lie in."""
        names = {chunk.file for tensor in self.tensors.values() for chunk in tensor.chunks}
        return [self.step / name for name in (METADATA_FILE, *sorted(names))]

    def read(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Return the rectangular slice of `shape` that begins at `start`.

        It may be a view of the file: copy it before changing it. Raises CheckpointError when the chunks do
        not cover it or one is damaged.
        """
        return _joined(self._pieces(key, start, shape), shape)

    def whole(self, key: str) -> torch.Tensor:
        """Return a tensor; see `read`."""
        shape = self.tensors[key].shape
        return self.read(key, (0,) * len(shape), shape)

    def region(self, key: str, index: tuple[int, ...], shape: tuple[int, ...]) -> "Region":
        """Return what stands at `index` of the leading axes, `shape` without them; raises what `read` does."""
        lead = len(index)
        pieces = self._pieces(key, index + (0,) * len(shape), (1,) * lead + shape)
        return Region(shape, [(bounds[lead:], data[(0,) * lead]) for bounds, data in pieces])

    def _pieces(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[Bounds, torch.Tensor]]:
        """Return the parts of a slice that chunks hold: where each lies in it, and a view of its data."""
        overlaps = [(chunk, _overlap(chunk, start, shape)) for chunk in self.tensors[key].chunks]
        overlaps = [(chunk, bounds) for chunk, bounds in overlaps if all(low < high for low, high in bounds)]
        count = sum(math.prod(high - low for low, high in bounds) for _, bounds in overlaps)
        if count != math.prod(shape) or any(_meet(a, b) for (_, a), (_, b) in combinations(overlaps, 2)):
            raise CheckpointError(f"{self.step}: the chunks of {key} do not cover it exactly once; the save is damaged")
        return [
            (_shifted(bounds, start), self._chunk(key, chunk)[_slices(_shifted(bounds, chunk.offsets))])
            for chunk, bounds in overlaps
        ]

    def _chunk(self, key: str, chunk: StoredChunk) -> torch.Tensor:
        if chunk not in self._chunks:
            source = f"{self.step / chunk.file} ({key})"
            tensor = Archive(self._files.file(chunk.file), chunk.start, chunk.length, source=source).tensor()
            stored = self.tensors[key]
            # A chunk of a tensor that was put together has an axis more than what is stored.
            same = tuple(tensor.shape) == chunk.sizes[-tensor.ndim or len(chunk.sizes) :]
            if not same or tensor.numel() != math.prod(chunk.sizes) or tensor.dtype != stored.dtype:
                raise CheckpointError(
                    f"{source} holds {list(tensor.shape)} of {tensor.dtype}, .metadata says {list(chunk.sizes)} "
                    f"of {stored.dtype}; the save is damaged"
                )
            self._chunks[chunk] = tensor.view(chunk.sizes)
        return self._chunks[chunk]


@dataclass(frozen=True)
class Region:
    """A part of a stored tensor: where the chunks lie in it, and views of their data."""

    shape: tuple[int, ...]
    pieces: list[tuple[Bounds, torch.Tensor]]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop`, as a view of the file where they lie in one chunk."""
        found = []
        for bounds, data in self.pieces:
            low, high = max(start, bounds[0][0]), min(stop, bounds[0][1])
            if low < high:
                first = bounds[0][0]
                found.append((((low - start, high - start), *bounds[1:]), data[low - first : high - first]))
        return _joined(found, (stop - start, *self.shape[1:]))


def _joined(pieces: list[tuple[Bounds, torch.Tensor]], shape: tuple[int, ...]) -> torch.Tensor:
    if len(pieces) == 1:
        return pieces[0][1]
    result = torch.empty(shape, dtype=pieces[0][1].dtype)
    for bounds, data in pieces:
        result[_slices(bounds)] = data
    return result


def _overlap(chunk: StoredChunk, start: tuple[int, ...], shape: tuple[int, ...]) -> Bounds:
    """Return the global bounds, axis by axis, of what a chunk holds of a slice."""
    return tuple(
        (max(offset, first), min(offset + size, first + count))
        for offset, size, first, count in zip(chunk.offsets, chunk.sizes, start, shape, strict=True)
    )


def _meet(a: Bounds, b: Bounds) -> bool:
    return all(max(low, first) < min(high, last) for (low, high), (first, last) in zip(a, b, strict=True))


def _shifted(bounds: Bounds, origin: tuple[int, ...]) -> Bounds:
    return tuple((low - first, high - first) for (low, high), first in zip(bounds, origin, strict=True))


def _slices(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in bounds)
