"""What torch.save writes for one tensor, without its data: a zip archive whose parts are stored as they are.

In bytes: for each record a local header, padding that aligns what follows to 64 bytes, and the record; then the
central directory, which names them again, and its end. Sizes that take more than 32 bits stand in a zip64 field
(APPNOTE.TXT 4.3-4.5 of the zip format). The checksum of the data stays 0, as under
`torch.serialization.skip_data`: no reader of torch's asks for it, and so the data can be written in any order.
"""

import io
import math
import pickle
import struct
from collections import OrderedDict
from dataclasses import dataclass
from zlib import crc32

import torch
from torch._utils import _rebuild_tensor_v2

ALIGNMENT = 64  # bytes; an archive has to start at a multiple of it for its data to be aligned

_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage,
}
_LOCAL, _CENTRAL, _END64, _LOCATOR64, _END = 0x04034B50, 0x02014B50, 0x06064B50, 0x07064B50, 0x06054B50
_ZIP64, _PADDING = 0x0001, 0x4246  # kinds of extra fields; torch pads with the second
_MANY = 0xFFFFFFFF


@dataclass(frozen=True)
class ArchiveLayout:
    """The bytes before and behind the data of an archive of one tensor."""

    head: bytes
    data_bytes: int
    tail: bytes

    @property
    def num_bytes(self) -> int:
        """Size of the whole archive."""
        return len(self.head) + self.data_bytes + len(self.tail)


def archive_of(dtype: torch.dtype, shape: tuple[int, ...]) -> ArchiveLayout:
    """Return the archive of a contiguous tensor; `torch.load` reads it with `weights_only=True`."""
    data_bytes = math.prod(shape) * dtype.itemsize
    zipped = _Zip()
    zipped.add("data.pkl", _description(dtype, shape))
    zipped.add("byteorder", b"little")
    zipped.reserve("data/0", data_bytes)
    head = zipped.take()
    zipped.add("version", b"3\n")
    zipped.end()
    return ArchiveLayout(head, data_bytes, zipped.take())


class _Storage:
    """Stands in for the storage of a tensor that is not in memory."""


class _Rebuilt:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple:
        strides = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return _rebuild_tensor_v2, (_Storage(), 0, self.shape, strides, False, OrderedDict())


def _description(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> object:
            return ("storage", _STORAGES[dtype], "0", "cpu", math.prod(shape)) if isinstance(thing, _Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(_Rebuilt(tuple(shape)))
    return buffer.getvalue()


class _Zip:
    """Writes records one behind the other; `take` gives what was written since the last time."""

    def __init__(self) -> None:
        self._at, self._fresh, self._directory, self._count = 0, bytearray(), bytearray(), 0

    def add(self, name: str, content: bytes) -> None:
        self._header(name, len(content), crc32(content))
        self._write(content)

    def reserve(self, name: str, size: int) -> None:
        """Add a record whose content is written by somebody else."""
        self._header(name, size, 0)
        self._at += size

    def end(self) -> None:
        start, size, count = self._at, len(self._directory), self._count
        self._write(self._directory)
        self._write(struct.pack("<IQHHIIQQQQ", _END64, 44, 45, 45, 0, 0, count, count, size, start))
        self._write(struct.pack("<IIQI", _LOCATOR64, 0, start + size, 1))
        self._write(struct.pack("<IHHHHIIH", _END, 0, 0, count, count, size, min(start, _MANY), 0))

    def take(self) -> bytes:
        fresh, self._fresh = bytes(self._fresh), bytearray()
        return fresh

    def _header(self, name: str, size: int, checksum: int) -> None:
        encoded, start, small = f"archive/{name}".encode(), self._at, min(size, _MANY)
        wide = struct.pack("<HHQQ", _ZIP64, 16, size, size) if size >= _MANY else b""
        used = start + 30 + len(encoded) + len(wide) + 4
        padding = -used % ALIGNMENT
        extra = wide + struct.pack("<HH", _PADDING, padding) + b"Z" * padding
        # Version 4.5, names in UTF-8, stored, no time.
        common = struct.pack("<HHHHHIIIH", 45, 0x0800, 0, 0, 0, checksum, small, small, len(encoded))
        self._write(struct.pack("<I", _LOCAL) + common + struct.pack("<H", len(extra)) + encoded + extra)
        far = [size, size] * (size >= _MANY) + [start] * (start >= _MANY)
        places = struct.pack(f"<HH{len(far)}Q", _ZIP64, 8 * len(far), *far) if far else b""
        self._directory += struct.pack("<IH", _CENTRAL, 45) + common
        self._directory += struct.pack("<HHHHII", len(places), 0, 0, 0, 0, min(start, _MANY)) + encoded + places
        self._count += 1

    def _write(self, content: bytes | bytearray) -> None:
        self._fresh += content
        self._at += len(content)
