"""A HuggingFace directory: lazy reader and streaming writer of safetensors.

A safetensors file, in bytes: `u64` little endian header length N; N bytes of JSON that map each name to
{"dtype": "BF16", "shape": [...], "data_offsets": [start, stop]}; then the data, offsets counted from its
first byte. Several files come with `model.safetensors.index.json`, whose `weight_map` says which tensor
lies in which file.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError, raise_all
from toolkits.foundation.progress import human_bytes

from .mapped_file import MappedFolder

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
SIDECAR_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.*",
    "additional_chat_templates/*",
    "*.tiktoken",
)

# What config.json and the headers call the types that are read; any other is refused by its name.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: `start` is its first byte, `dtype` as the header calls it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class HfCheckpoint:
    """The tensors of a HuggingFace directory by name, read when they are asked for.

    Opening it reads config.json and the headers, and checks them against each other, against the index
    and against the sizes of the files. Raises CheckpointError that lists everything that is wrong.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self._files = MappedFolder(self.directory)
        weight_map = _read_index(self.directory)
        names = sorted(set(weight_map.values())) if weight_map is not None else [_single_file(self.directory)]
        _check_files(self.directory, names)
        headers = {name: _read_header(self.directory / name) for name in names}
        if weight_map is not None:
            _check_index(self.directory, weight_map, headers)
        self.tensors: dict[str, StoredTensor] = {
            name: stored for header in headers.values() for name, stored in header.items()
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor; raise CheckpointError when it is not one of the float types."""
        stored = self.tensors[name].dtype
        if stored not in _DTYPES:
            raise CheckpointError(f"{name} is {stored}; only {', '.join(_DTYPES)} are converted")
        return _DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of its file: copy it before changing it."""
        stored = self.tensors[name]
        return self._files.file(stored.file).tensor(self.dtype(name), stored.shape, stored.start)


def read_config(directory: Path) -> dict:
    """Return config.json as a dict; raise CheckpointError when it is missing or no JSON object."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {directory} is not a HuggingFace checkpoint")
    return _read_json(path)


def is_hf_directory(directory: Path) -> bool:
    """Whether `directory` holds config.json and safetensors."""
    directory = Path(directory)
    return (directory / CONFIG_FILE).is_file() and any(directory.glob("*.safetensors*"))


def copy_sidecar_files(source: Path, target: Path) -> None:
    """Copy config.json, the generation config and every tokenizer file, byte for byte, links resolved."""
    for pattern in SIDECAR_FILES:
        for path in sorted(Path(source).glob(pattern)):
            if path.is_file():
                copy = Path(target) / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def write_safetensors(
    directory: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
    *,
    advance: Callable[[int], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Stream tensors into `directory`: one model.safetensors, or shards and their index when it takes several.

    `tensors` gives type and shape of each name, in the order to write; `read` gives its data when its turn
    comes; `advance` is told the bytes written.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    shards = _shards(sizes, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(directory / file, {name: tensors[name] for name in names}, read, advance)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
    advance: Callable[[int], None],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (dtype, shape) in tensors.items():
            data = read(name)
            assert data.dtype == dtype and tuple(data.shape) == shape, name
            _write_all(file, data.contiguous().view(-1).view(torch.uint8).numpy().data)
            advance(data.nbytes)


def _write_all(file, data: memoryview) -> None:  # type: ignore[no-untyped-def]
    while data:  # one write takes 2 GiB at most
        data = data[file.write(data) :]


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_FILE
    if not path.is_file():
        return None
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of names to files")
    return weight_map


def _single_file(directory: Path) -> str:
    if (directory / SINGLE_FILE).exists():
        return SINGLE_FILE
    others = sorted(path.name for path in [*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    found = f"; found {', '.join(others[:5])}" if others else ""
    raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{found} (only safetensors are read)")


def _check_files(directory: Path, names: Sequence[str]) -> None:
    unsafe = [f"unsafe shard path {name!r}" for name in names if not _is_safe(directory, name)]
    raise_all(CheckpointError, str(directory), unsafe)
    missing = [f"shard {name} is missing" for name in names if not (directory / name).is_file()]
    raise_all(CheckpointError, f"{directory} is incomplete", missing)


def _is_safe(directory: Path, name: str) -> bool:
    if not name or name != Path(name).name or name == "..":
        return False
    target, home = (directory / name).resolve(), directory.resolve()
    # The hub's cache keeps MODEL/snapshots/COMMIT/NAME as links into MODEL/blobs.
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return target.parent in homes


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    again = "; download or copy it again"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path}: {size:,} bytes are too few for its header, it is cut short{again}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {name: tuple(int(at) for at in entry["data_offsets"]) for name, entry in entries.items()}
        stored = {
            name: StoredTensor(path.name, str(entry["dtype"]), tuple(entry["shape"]), 8 + length + spans[name][0])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error!r}){again}") from None
    promised = 8 + length + max((stop for _, stop in spans.values()), default=0)
    if promised != size:
        raise CheckpointError(
            f"{path}: header promises {human_bytes(promised)} ({promised:,} bytes), "
            f"file has {human_bytes(size)} ({size:,}){again}"
        )
    raise_all(CheckpointError, f"{path} is damaged", list(_span_problems(stored, spans)))
    return stored


def _span_problems(stored: Mapping[str, StoredTensor], spans: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    for name, tensor in stored.items():
        start, stop = spans[name]
        itemsize = _DTYPES[tensor.dtype].itemsize if tensor.dtype in _DTYPES else None
        if start < 0 or stop < start or (itemsize and stop - start != math.prod(tensor.shape) * itemsize):
            yield f"{name}: {stop - start:,} bytes for {tensor.dtype} {list(tensor.shape)}"


def _check_index(directory: Path, weight_map: Mapping[str, str], headers: Mapping[str, dict]) -> None:
    """Hold the index against the headers, both ways."""
    problems = []
    places: dict[str, list[str]] = {}
    for file, header in headers.items():
        for name in header:
            places.setdefault(name, []).append(file)
    for name in sorted(weight_map.keys() | places.keys()):
        found = places.get(name, [])
        if len(found) > 1:
            problems.append(f"{name} is in {' and in '.join(found)}")
        elif name not in weight_map:
            problems.append(f"{name} is in {found[0]}, the index does not name it")
        elif weight_map[name] not in found:
            elsewhere = f", it is in {found[0]}" if found else ""
            problems.append(f"{name} is not in {weight_map[name]} as the index says{elsewhere}")
    raise_all(CheckpointError, f"{directory}: {INDEX_FILE} and the shards disagree", problems)
