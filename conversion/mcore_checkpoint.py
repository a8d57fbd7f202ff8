"""Reading a Megatron-core (torch_dist) directory lazily, without Megatron-core."""

import math
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError

from .mapped_file import MappedFolder
from .mcore_directory import find_step, hf_folder, is_mcore_directory
from .safe_pickle import Archive, StoredChunk, StoredTensor, read_metadata

__all__ = ["McoreCheckpoint", "find_step", "hf_folder", "is_mcore_directory"]


class McoreCheckpoint:
    """The tensors of a step folder by key.

    `tensors[key]` has `dtype` and the whole `shape`, merged layer axis included. Every pickle comes in through
    `safe_pickle`.
    """

    def __init__(self, directory: Path) -> None:
        self.step = find_step(directory)
        metadata = read_metadata(self.step)
        self.tensors: dict[str, StoredTensor] = metadata.tensors
        self._files = MappedFolder(self.step)

    def read(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Return the rectangular slice of `shape` that begins at `start`.

        It may be a view of the file: copy it before changing it. Raises CheckpointError when the chunks do
        not cover it or one is damaged.
        """
        stored = self.tensors[key]
        overlaps = [(chunk, _overlap(chunk, start, shape)) for chunk in stored.chunks]
        overlaps = [(chunk, bounds) for chunk, bounds in overlaps if all(low < high for low, high in bounds)]
        if sum(math.prod(high - low for low, high in bounds) for _, bounds in overlaps) != math.prod(shape):
            raise CheckpointError(f"{self.step}: the chunks of {key} do not cover it exactly once; the save is damaged")
        if len(overlaps) == 1:
            chunk, bounds = overlaps[0]
            return self._chunk(key, chunk)[_within(bounds, chunk.offsets)]
        result = torch.empty(shape, dtype=stored.dtype)
        for chunk, bounds in overlaps:
            result[_within(bounds, start)] = self._chunk(key, chunk)[_within(bounds, chunk.offsets)]
        return result

    def _chunk(self, key: str, chunk: StoredChunk) -> torch.Tensor:
        source = f"{self.step / chunk.file} ({key})"
        content = self._files.file(chunk.file)
        if chunk.start + chunk.length > len(content):
            raise CheckpointError(
                f"{source} is cut short: .metadata promises {chunk.start + chunk.length:,} bytes or more, "
                f"the file has {len(content):,}; copy the checkpoint again"
            )
        tensor = Archive(content, chunk.start, chunk.length, source=source).tensor()
        stored = self.tensors[key]
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != stored.dtype:
            raise CheckpointError(
                f"{source} holds {list(tensor.shape)} of {tensor.dtype}, .metadata says {list(chunk.sizes)} "
                f"of {stored.dtype}; the save is damaged"
            )
        return tensor


def _overlap(chunk: StoredChunk, start: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the global bounds, axis by axis, of what a chunk holds of a slice."""
    return [
        (max(offset, first), min(offset + size, first + count))
        for offset, size, first, count in zip(chunk.offsets, chunk.sizes, start, shape, strict=True)
    ]


def _within(bounds: list[tuple[int, int]], origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(low - first, high - first) for (low, high), first in zip(bounds, origin, strict=True))
