"""The only door through which the pickles of a checkpoint come in. Nothing in them ever runs.

A torch_dist directory is executable content: torch unpickles `.metadata` and does what it says, and byte
objects and `common.pt` in ways that an environment variable can make as trusting. Here a pickle may name
only what is on an exact list (`unpickler.py`), and even that is never imported.
`scan_directory` does the same for a directory that Megatron-core or torch will open afterwards.
"""

import functools
import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError

from .mapped_file import MappedFile, MappedFolder
from .safe_files import is_plain_name, shown, sizes, stays_inside
from .unpickler import STORAGES, Record, loads

METADATA_FILE = ".metadata"
MAX_PICKLE = 1 << 28  # bytes; the metadata of the largest checkpoints takes some 10 MB
_DESCRIBED = 1 << 3  # the flag of a part of a zip archive behind whose data a descriptor lies


@dataclass(frozen=True)
class ArchivedTensor:
    """A tensor of an archive: a view with `offset` and `stride` of `count` elements from byte `start` of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    start: int
    count: int


class Archive:
    """One `torch.save` archive inside a file, opened with the parser that torch.load itself uses."""

    def __init__(self, content: MappedFile, start: int, length: int, *, source: str) -> None:
        self.start, self.source, self._content, self._length = start, source, content, length
        if start < 0 or length < 0 or start + length > len(content):
            raise CheckpointError(
                f"{source} is cut short: .metadata promises {start + length:,} bytes or more, "
                f"the file has {len(content):,}; copy the checkpoint again"
            )
        if content.bytes(start, 4) != b"PK\x03\x04":
            loads(content.bytes(start, min(length, MAX_PICKLE)), source)
            raise CheckpointError(f"{source} is not a torch.save archive (zip format of torch 1.6 or later)")
        try:
            self._reader = torch._C.PyTorchFileReader(_RangeReader(content, start, length))  # type: ignore[call-overload]
            self._records = self._reader.get_all_records()
        except Exception as error:  # of a damaged archive torch raises nearly anything
            raise self._damaged(error) from None

    def load(self) -> object:
        """Return what the archive describes, with records for objects."""
        if "constants.pkl" in self._records:
            raise CheckpointError(f"refusing executable content in {self.source}: it is a TorchScript program")
        if "data.pkl" not in self._records or len(set(self._records)) != len(self._records):
            raise CheckpointError(f"{self.source} is damaged: not one data.pkl")
        if "byteorder" in self._records and self._record("byteorder") != b"little":
            raise CheckpointError(f"{self.source} was saved on a big-endian machine, which is not read")
        return loads(self._record("data.pkl"), self.source)

    def storages(self) -> Iterator[bytes]:
        """Yield the bytes of every tensor storage."""
        for record in self._records:
            if record.startswith("data/"):
                yield self._record(record)

    def tensor(self) -> torch.Tensor:
        """Return the one tensor that the archive holds, as a view of the file where alignment allows it."""
        return self.read(self._described(self.load(), "it"))

    def tensors(self) -> dict[str, ArchivedTensor]:
        """Return the tensors of a state dict by name; raise CheckpointError when it is anything else."""
        described = self.load()
        if not isinstance(described, dict) or not all(isinstance(name, str) for name in described):
            raise CheckpointError(f"{self.source} does not hold tensors by name")
        return {name: self._described(record, name) for name, record in described.items()}

    def read(self, tensor: ArchivedTensor) -> torch.Tensor:
        """Return a tensor of this archive, as a view of the file where alignment allows it."""
        try:
            storage = self._content.tensor(tensor.dtype, (tensor.count,), tensor.start)
            return storage.as_strided(tensor.shape, tensor.stride, tensor.offset)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(error) from None

    def _described(self, record: object, name: str) -> ArchivedTensor:
        if isinstance(record, Record) and record.name == "torch._utils._rebuild_parameter" and record.args:
            record = record.args[0]
        if not isinstance(record, Record) or record.name != "torch._utils._rebuild_tensor_v2":
            raise CheckpointError(f"{self.source}: {name} is not a plain tensor")
        try:
            (_, kind, key, _, count), offset, shape, stride = record.args[:4]
            dtype = STORAGES[kind.name.removeprefix("torch.")]
            place, size = self._reader.get_record_offset(f"data/{key}"), self._reader.get_record_size(f"data/{key}")
            if not all(type(each) is int and each >= 0 for each in (count, offset, *shape, *stride)):
                raise ValueError("sizes that cannot be")
            last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
            if count * dtype.itemsize > size or last >= max(1, count) or math.prod(shape) > count:
                raise ValueError("storage beyond its end")
            self._require_place(f"data/{key}", place + size)
        except Exception as error:
            raise self._damaged(error) from None
        return ArchivedTensor(dtype, tuple(shape), tuple(stride), offset, self.start + place, count)

    def _require_place(self, record: str, end: int) -> None:
        """Raise ValueError unless the data of a record ends where the archive's next part begins.

        A local header leads to the data, and a damaged one leads elsewhere. torch asks the checksum; the central
        directory is as sure, and free.
        """
        described, following = self._ends[record]
        follows = self._content.bytes(self.start + end, 4) if end <= self._length - 4 else b""
        if end > following or follows not in ((b"PK\x07\x08",) if described else (b"PK\x03\x04", b"PK\x01\x02")):
            raise ValueError("its parts do not lie one behind the other")

    @functools.cached_property
    def _ends(self) -> dict[str, tuple[bool, int]]:
        """Of each record whether a descriptor lies behind its data, and where the next part of the archive begins."""
        with zipfile.ZipFile(_RangeReader(self._content, self.start, self._length)) as parts:
            infos = sorted(parts.infolist(), key=lambda info: info.header_offset)
            starts = [info.header_offset for info in infos] + [parts.start_dir]
        return {
            info.filename.split("/", 1)[-1]: (bool(info.flag_bits & _DESCRIBED), following)
            for info, following in zip(infos, starts[1:], strict=True)
        }

    def _record(self, name: str) -> bytes:
        try:
            # A record that is compressed may grow beyond all bounds.
            if self._reader.get_record_size(name) > min(self._length, MAX_PICKLE):
                raise CheckpointError(f"{self.source} is damaged: {name} in it is larger than can be")
            return self._reader.get_record(name)
        except CheckpointError:
            raise
        except Exception as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.source} is damaged: {(str(error).splitlines() or ['unreadable'])[0]}")


class _RangeReader(io.RawIOBase):
    """The bytes `start` to `start + length` of a mapped file, as the file object that torch asks for."""

    def __init__(self, content: MappedFile, start: int, length: int) -> None:
        self._content, self._start, self._length, self._at = content, start, length, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._length - self._at)) if self._at >= 0 else 0
        buffer[:count] = self._content.view(self._start + self._at, count)
        self._at += count
        return count


@dataclass(frozen=True)
class StoredChunk:
    """Where a part of a tensor, or a whole byte object, lies: `length` bytes from `start` of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a step folder, merged layer axis included, and the chunks that cover it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[StoredChunk] = field(default_factory=list)


@dataclass(frozen=True)
class StepMetadata:
    """What `.metadata` says of a step folder."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredChunk]


def read_metadata(step: Path) -> StepMetadata:
    """Read `.metadata` of a step folder; raise CheckpointError when it is unsafe, damaged or missing."""
    path = step / METADATA_FILE
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {step}: it has no {METADATA_FILE}")
    if path.stat().st_size > MAX_PICKLE:
        raise CheckpointError(f"{path} is larger than the metadata of a checkpoint can be")
    described = loads(path.read_bytes(), str(path))
    try:
        metadata = _parse(described)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from None
    chunks = [*metadata.objects.values(), *(chunk for tensor in metadata.tensors.values() for chunk in tensor.chunks)]
    for file in sorted({chunk.file for chunk in chunks}):
        if not stays_inside(step, step / file):
            raise CheckpointError(f"unsafe link {step / file}: it leads out of its folder; put the file itself there")
    return metadata


def _parse(metadata: object) -> StepMetadata:
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, StoredChunk] = {}
    chunk_shapes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for key, entry in metadata.get("state_dict_metadata").items():  # type: ignore[attr-defined]
        if not entry.name.endswith(".TensorStorageMetadata"):
            continue
        dtype = entry.get("properties").state[0]
        if not isinstance(key, str) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{shown(key)} of type {shown(dtype)}")
        tensors[key] = StoredTensor(dtype, sizes(entry.get("size")))
        for chunk in entry.get("chunks"):
            chunk_shapes[key, sizes(chunk.get("offsets"))] = sizes(chunk.get("sizes"))
    for index, info in metadata.get("storage_data").items():  # type: ignore[attr-defined]
        key, offsets = index.get("fqn"), sizes(index.state.get("offset") or ())
        file = info.get("relative_path")
        if not isinstance(key, str):
            raise ValueError(f"an entry of {shown(key)}")
        if not is_plain_name(file):
            raise CheckpointError(f"unsafe path in checkpoint metadata: {shown(file)}")
        if info.state.get("transform_descriptors"):
            raise CheckpointError(f"{file}: transformed (compressed or encrypted) entries are not supported")
        start, length = sizes((info.get("offset"), info.get("length")))
        shape = chunk_shapes[key, offsets] if key in tensors else ()
        chunk = StoredChunk(offsets, shape, file, start, length)
        if key not in tensors:
            objects[key] = chunk
        elif len(offsets) == len(shape) == len(tensors[key].shape):
            tensors[key].chunks.append(chunk)
        else:
            raise ValueError(f"a chunk of {key} with other axes")
    return StepMetadata(tensors, objects)


def scan_directory(step: Path) -> None:
    """Refuse a step folder in which anything asks for code.

    Looks at `.metadata`, at `common.pt` and every other .pt file, and at each tensor and byte object of the
    .distcp files. Call it before anything of torch or Megatron-core opens the folder. Raises CheckpointError
    ("refusing executable content in FILE: it asks for NAME"); nothing has run by then.
    """
    step = Path(step)
    metadata = read_metadata(step)
    for path in sorted(step.rglob("*.pt")):
        content = MappedFolder(path.parent).file(path.name)
        _scan(Archive(content, 0, len(content), source=str(path)), may_nest=False)
    files = MappedFolder(step)
    for key, chunk in metadata.objects.items():
        source = f"{step / chunk.file} ({key})"
        archive = Archive(files.file(chunk.file), chunk.start, chunk.length, source=source)
        _scan(archive, may_nest="_extra_state" in key)
    for key, tensor in metadata.tensors.items():
        for chunk in tensor.chunks:
            source = f"{step / chunk.file} ({key})"
            _scan(Archive(files.file(chunk.file), chunk.start, chunk.length, source=source), may_nest=False)


def _scan(archive: Archive, *, may_nest: bool) -> None:
    archive.load()
    # Transformer Engine unpickles what its extra states carry as bytes.
    for raw in archive.storages() if may_nest else ():
        if raw:
            loads(raw, archive.source)
