"""The only door through which the pickles of a checkpoint come in. Nothing in them ever runs.

A torch_dist directory is executable content: torch reads `.metadata` with bare `pickle.load`, and byte
objects and `common.pt` in ways that an environment variable can make as trusting. Here a pickle may name
only what is on an exact list, and even that is never imported: a `Record` stands in for every object.
`scan_directory` does the same for a directory that Megatron-core or torch will open afterwards.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from toolkits.foundation.errors import CheckpointError

from .mapped_file import MappedFile, MappedFolder

METADATA_FILE = ".metadata"

_DCP = "torch.distributed.checkpoint."
_MCORE = "megatron.core."
_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {*_STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2}

# Harmless values that come in as themselves; the two modules are Python 3's builtins and pickle's old name for it.
_VALUES: dict[str, object] = {
    "torch.Size": tuple,
    "collections.OrderedDict": dict,
    **{str(dtype): dtype for dtype in _DTYPES},
    **{
        f"{module}.{kind.__name__}": kind
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, bytes, bytearray, complex, slice, range)
    },
}

# Everything else that the metadata, common.pt and byte objects of torch and Megatron-core name.
_RECORDS = frozenset(
    [_DCP + "metadata." + name for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "StorageMeta")]
    + [_DCP + "metadata." + name for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")]
    + [_DCP + "metadata._MEM_FORMAT_ENCODING", _DCP + "filesystem._StorageInfo"]
    + [_DCP + "planner." + name for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")]
    + ["torch.serialization._get_layout", "torch.device", "torch._utils._rebuild_tensor_v2"]
    + ["torch._utils._rebuild_parameter", "torch.storage.UntypedStorage", *(f"torch.{name}" for name in _STORAGES)]
    + [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
    + ["numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType", "_codecs.encode", "_io.BytesIO"]
    + [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")]
    + ["argparse.Namespace", "types.SimpleNamespace", "signal.Signals"]
    + [_MCORE + "enums.ModelType", _MCORE + "optimizer.optimizer_config.OptimizerConfig"]
    + [_MCORE + "transformer.enums." + name for name in ("AttnBackend", "AttnMaskType", "CudaGraphScope")]
    + [_MCORE + "rerun_state_machine." + name for name in ("RerunDiagnostic", "RerunMode", "RerunState")]
    + [_MCORE + "dist_checkpointing.strategies.torch." + name for name in ("MCoreMetadata", "MCoreSavePlan")]
)


class Record:
    """Stands in for an object of a pickle: what made it (`name`), with which `args`, and its `state`."""

    name: ClassVar[str] = ""

    def __new__(cls, *args: object) -> "Record":
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __init__(self, *args: object) -> None:
        self.args: tuple
        self.state: object

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, field_name: str) -> object:
        """Return a field of a record whose state is a dict; raise CheckpointError when it is not there."""
        if not isinstance(self.state, dict) or field_name not in self.state:
            raise CheckpointError(f"checkpoint metadata: {self.name} without {field_name}")
        return self.state[field_name]


class _Refused(Exception):
    """What a pickle asked for in vain."""


class _Buffer(Record):
    """An io.BytesIO, which must be empty: Transformer Engine would unpickle what is in it."""

    name = "_io.BytesIO"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and state and state[0]:
            raise _Refused("an embedded file")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._kinds: dict[str, type[Record]] = {_Buffer.name: _Buffer}

    def find_class(self, module: str, name: str) -> object:
        asked = f"{module}.{name}"
        if asked in _VALUES and "." not in name:
            return _VALUES[asked]
        if asked not in _RECORDS or "." in name:
            # Pickle names os.system by the module that implements it.
            raise _Refused(f"os.{name}" if module in ("posix", "nt") else asked)
        if asked not in self._kinds:
            self._kinds[asked] = type(name, (Record,), {"name": asked})
        return self._kinds[asked]

    def persistent_load(self, identity: object) -> object:
        return identity


def loads(raw: bytes, source: str) -> object:
    """Return what a pickle describes, with records for objects; `source` names it in errors.

    Raises CheckpointError when it asks for anything that is not on the list, or is no pickle.
    """
    try:
        return _Unpickler(io.BytesIO(raw)).load()
    except _Refused as refused:
        raise CheckpointError(f"refusing executable content in {source}: it asks for {refused}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{source} is damaged: not a readable pickle ({error})") from None


class Archive:
    """One `torch.save` archive inside a file, opened with the parser that torch.load itself uses."""

    def __init__(self, content: MappedFile, start: int, length: int, *, source: str) -> None:
        self.start, self.source, self._content, self._length = start, source, content, length
        if content.bytes(start, 4) != b"PK\x03\x04":
            loads(content.bytes(start, length), source)
            raise CheckpointError(f"{source} is not a torch.save archive (zip format of torch 1.6 or later)")
        try:
            self._reader = torch._C.PyTorchFileReader(_RangeReader(content, start, length))  # type: ignore[call-overload]
            self._records = self._reader.get_all_records()
        except RuntimeError as error:
            raise CheckpointError(f"{source} is damaged: {str(error).splitlines()[0]}") from None

    def load(self) -> object:
        """Return what the archive describes, with records for objects."""
        if "constants.pkl" in self._records:
            raise CheckpointError(f"refusing executable content in {self.source}: it is a TorchScript program")
        if "data.pkl" not in self._records or len(set(self._records)) != len(self._records):
            raise CheckpointError(f"{self.source} is damaged: not one data.pkl")
        return loads(self._reader.get_record("data.pkl"), self.source)

    def storages(self) -> Iterator[bytes]:
        """Yield the bytes of every tensor storage."""
        for record in self._records:
            if record.startswith("data/"):
                yield self._reader.get_record(record)

    def tensor(self) -> torch.Tensor:
        """Return the one tensor that the archive holds, as a view of the file where alignment allows it."""
        record = self.load()
        if not isinstance(record, Record) or record.name != "torch._utils._rebuild_tensor_v2":
            raise CheckpointError(f"{self.source} does not hold a plain tensor")
        try:
            (_, kind, key, _, count), offset, size, stride = record.args[:4]
            dtype = _STORAGES[kind.name.removeprefix("torch.")]
            place = self._reader.get_record_offset(f"data/{key}")
            if place + count * dtype.itemsize > self._length:
                raise ValueError("storage beyond its end")
            storage = self._content.tensor(dtype, (count,), self.start + place)
            return storage.as_strided(size, stride, offset)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.source} is damaged: {error}") from None


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
        count = max(0, min(len(buffer), self._length - self._at))
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
    try:
        return _parse(loads(path.read_bytes(), str(path)))
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from None


def _parse(metadata: object) -> StepMetadata:
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, StoredChunk] = {}
    chunk_sizes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for key, entry in metadata.get("state_dict_metadata").items():  # type: ignore[attr-defined]
        if not entry.name.endswith(".TensorStorageMetadata"):
            continue
        tensors[key] = StoredTensor(entry.get("properties").state[0], tuple(entry.get("size")))
        for chunk in entry.get("chunks"):
            chunk_sizes[key, tuple(chunk.get("offsets"))] = tuple(chunk.get("sizes"))
    for index, info in metadata.get("storage_data").items():  # type: ignore[attr-defined]
        key, offsets = index.get("fqn"), tuple(index.state.get("offset") or ())
        file = _plain_name(info.get("relative_path"))
        if info.state.get("transform_descriptors"):
            raise CheckpointError(f"{file}: transformed (compressed or encrypted) entries are not supported")
        sizes = chunk_sizes[key, offsets] if key in tensors else ()
        chunk = StoredChunk(offsets, sizes, file, int(info.get("offset")), int(info.get("length")))
        if key in tensors:
            tensors[key].chunks.append(chunk)
        else:
            objects[key] = chunk
    return StepMetadata(tensors, objects)


def _plain_name(path: str) -> str:
    if not path or path != Path(path).name or path == "..":
        raise CheckpointError(f"unsafe path in checkpoint metadata: {path!r}")
    return path


def scan_directory(step: Path) -> None:
    """Refuse a step folder in which anything asks for code.

    Looks at `.metadata`, at `common.pt` and every other .pt file, and at each tensor and byte object of the
    .distcp files. Call it before anything of torch or Megatron-core opens the folder. Raises CheckpointError
    ("refusing executable content in FILE: it asks for os.system"); nothing has run by then.
    """
    step = Path(step)
    metadata = read_metadata(step)
    for path in sorted(step.rglob("*.pt")):
        content = MappedFile(path)
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
