"""Reading a pickle without running anything: records stand in for objects, and only listed names are let in.

Every pickle of a checkpoint comes through `loads`. Python's own unpickler in C trusts what it reads: it makes
room for as many objects as a few bytes ask for, and hashes nested tuples for hours. So the one in Python is
used, and what costs time or memory out of proportion is refused too.
"""

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

from toolkits.foundation.errors import CheckpointError

MAX_READS = 20_000_000  # about 90 for each chunk of a checkpoint; DeepSeek-V3's weights take 8 million

_DCP = "torch.distributed.checkpoint."
_MCORE = "megatron.core."
STORAGES = {
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
_DTYPES = {*STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2}

# Everything but plain values that the metadata, common.pt and byte objects of torch and Megatron-core name.
_RECORDS = frozenset(
    [_DCP + "metadata." + name for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "StorageMeta")]
    + [_DCP + "metadata." + name for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")]
    + [_DCP + "metadata._MEM_FORMAT_ENCODING", _DCP + "filesystem._StorageInfo"]
    + [_DCP + "planner." + name for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")]
    + ["torch.serialization._get_layout", "torch.device", "torch._utils._rebuild_tensor_v2"]
    + ["torch._utils._rebuild_parameter", "torch.storage.UntypedStorage", *(f"torch.{name}" for name in STORAGES)]
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


class OrderedRecord(dict):
    """Stands in for a collections.OrderedDict; what a state dict notes beside its tensors is left out."""

    def __init__(self, pairs: Iterable = ()) -> None:
        super().__init__()
        for key, value in _listed(pairs):
            self[_key(key)] = value

    def __setstate__(self, state: object) -> None:
        pass


class _Refused(Exception):
    """What a pickle asked for in vain."""


class _Buffer(Record):
    """An io.BytesIO, which must be empty: Transformer Engine would unpickle what is in it."""

    name = "_io.BytesIO"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and state and state[0]:
            raise _Refused("an embedded file")


def loads(raw: bytes, source: str) -> object:
    """Return what a pickle describes, with records for objects; `source` names it in errors.

    Raises CheckpointError when it asks for anything that is not on the list, or is no pickle.
    """
    try:
        return _Unpickler(_CountedReads(raw)).load()
    except _Refused as refused:
        raise CheckpointError(f"refusing executable content in {source}: it asks for {refused}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{source} is damaged: not a readable pickle ({type(error).__name__}: {error})") from None


class _CountedReads(io.BytesIO):
    """A pickle that ends early when it takes more steps than that of any checkpoint."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise pickle.UnpicklingError("it describes more objects than a checkpoint has")
        return super().read(size)


_InPython: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_InPython):
    dispatch: ClassVar[dict[int, Callable]] = dict(_InPython.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._kinds: dict[str, type[Record]] = {_Buffer.name: _Buffer}

    def find_class(self, module: str, name: str) -> object:
        asked = f"{module}.{name}"
        if asked in _VALUES and "." not in name:
            return _VALUES[asked]
        if asked not in _RECORDS or "." in name:
            # Pickle names a function of os by the module that implements it; users know it as one of os.
            raise _Refused(f"os.{name}" if module in ("posix", "nt") else asked)
        if asked not in self._kinds:
            self._kinds[asked] = type(name, (Record,), {"name": asked})
        return self._kinds[asked]

    def persistent_load(self, identity: object) -> object:
        return identity

    def load_frame(self) -> None:
        self.read(8)  # how far to read ahead: it does not matter here, and its reads would go uncounted

    def load_put(self) -> None:
        super().load_put()
        self._check_memo()

    def load_long_binput(self) -> None:
        super().load_long_binput()
        self._check_memo()

    def _check_memo(self) -> None:
        # The unpickler in C, which others read the same file with, makes room for as many.
        if next(reversed(self.memo)) > MAX_READS:
            raise pickle.UnpicklingError("a memo of a size that cannot be")

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record | OrderedRecord):
            raise pickle.UnpicklingError(f"a state for a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    def load_setitem(self) -> None:
        _key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        _keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        _keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        _keys(self.stack)
        super().load_frozenset()

    for _opcode, _method in (
        (pickle.FRAME, load_frame),
        (pickle.PUT, load_put),
        (pickle.LONG_BINPUT, load_long_binput),
        (pickle.BUILD, load_build),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
    ):
        dispatch[_opcode[0]] = _method


def _key(key: object) -> object:
    """Return a key of a dict or set; tuples of tuples are refused, since hashing them can take for ever."""
    for each in key if type(key) is tuple else (key,):
        if type(each) is tuple:
            raise pickle.UnpicklingError("a nested tuple as a key")
    return key


def _keys(keys: Iterable) -> None:
    for key in keys:
        _key(key)


def _listed(items: object) -> Iterable:
    if not isinstance(items, list | tuple):
        raise pickle.UnpicklingError(f"a collection made of a {type(items).__name__}")
    return items


def _collection(kind: type) -> Callable:
    def make(items: object = ()) -> object:
        _keys(_listed(items))
        return kind(items)

    return make


def _plain_bytes(kind: type) -> Callable:
    def make(content: object = b"", encoding: str = "latin-1") -> object:
        if isinstance(content, str) and encoding in ("latin-1", "latin1"):
            return kind(content, encoding)
        if isinstance(content, bytes):
            return kind(content)
        raise pickle.UnpicklingError(f"bytes made of a {type(content).__name__}")

    return make


# Harmless values that come in as themselves; the two modules are Python 3's builtins and pickle's old name for it.
_VALUES: dict[str, object] = {
    "torch.Size": lambda sizes=(): tuple(_listed(sizes)),
    "collections.OrderedDict": OrderedRecord,
    **{str(dtype): dtype for dtype in _DTYPES},
    **{
        f"{module}.{name}": kind
        for module in ("builtins", "__builtin__")
        for name, kind in {
            "set": _collection(set),
            "frozenset": _collection(frozenset),
            "bytes": _plain_bytes(bytes),
            "bytearray": _plain_bytes(bytearray),
            "complex": complex,
            "slice": slice,
            "range": range,
        }.items()
    },
}
