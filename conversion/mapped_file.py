"""A file mapped into memory, and tensors that are views of it."""

import math
import mmap
import sys
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python 3.13 is the first to have the name


class MappedFile:
    """Read tensors of a file without copying it: the kernel brings in the pages that are touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            # Private and writable: nothing reaches the file, and torch does not warn of a read-only buffer. Without
            # a reserve, for the kernel refuses to promise more memory than there is, and none is ever written.
            flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            self._map = mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)

    def __len__(self) -> int:
        return len(self._map)

    def bytes(self, start: int, length: int) -> bytes:
        """Return a copy of `length` bytes."""
        return self._map[start : start + length]

    def view(self, start: int, length: int) -> memoryview:
        """Return `length` bytes without copying them."""
        return memoryview(self._map)[start : start + length]

    def tensor(
        self, dtype: torch.dtype, shape: tuple[int, ...], start: int, *, stride: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Return the tensor that begins at byte `start`, as a view (a copy if it is not aligned).

        Without a `stride` it is contiguous.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if stride is not None:
            count = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
            return self.tensor(dtype, (count,), start).as_strided(shape, stride)
        if start % dtype.itemsize == 0:
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
        return raw.clone().view(dtype).view(shape)


class MappedFolder:
    """The files of a folder by name, each mapped once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, MappedFile] = {}

    def file(self, name: str) -> MappedFile:
        """Return the mapped file; raise CheckpointError when it is missing or empty."""
        if name not in self._files:
            path = self.folder / name
            if not path.is_file() or path.stat().st_size == 0:
                raise CheckpointError(f"{path} is missing or empty; copy the checkpoint again")
            self._files[name] = MappedFile(path)
        return self._files[name]
