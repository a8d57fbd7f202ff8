"""A HuggingFace directory: lazy reader, and the files of a new one.

Several files come with an index (`model.safetensors.index.json`, `pytorch_model.bin.index.json`), whose
`weight_map` says which tensor lies in which file.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError, raise_all

from . import bin_file, block_fp8, safetensors_file
from .filling import File, Span
from .mapped_file import MappedFolder
from .safe_files import is_plain_name, read_json, stays_inside
from .safetensors_file import DTYPES, StoredTensor

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
    "temper_lineage.json",  # what a run leaves in its exports
)
CONVERTED = ("F32", "F16", "BF16")  # as headers call them; any other type is refused by its name


@dataclass(frozen=True)
class Kind:
    """A way to keep weights: in one file, or in several with an index."""

    index: str
    single: str
    read_header: Callable[[Path], dict[str, StoredTensor]]


# Where both are there, safetensors are read.
KINDS = (
    Kind(INDEX_FILE, SINGLE_FILE, safetensors_file.read_header),
    Kind("pytorch_model.bin.index.json", "pytorch_model.bin", bin_file.read_header),
)


class HfCheckpoint:
    """The tensors of a HuggingFace directory by name, read when they are asked for.

    Opening it reads config.json and the headers, and checks them against each other, against the index
    and against the sizes of the files. FP8 weights are refused unless `dequantize`: then they are bfloat16, and
    `config` is that of a model which never was quantized. Raises CheckpointError that lists everything wrong.
    """

    def __init__(self, directory: Path, *, dequantize: bool = False) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self._files = MappedFolder(self.directory)
        self.tensors: dict[str, StoredTensor] = read_headers(self.directory)
        self._scales: dict[str, StoredTensor] = {}
        if not dequantize:
            block_fp8.require_plain(self.directory, self.config, self.tensors)
            return
        self._block = block_fp8.block_of(self.directory, self.config)
        scales = block_fp8.scales_of(self.directory, self.tensors, self._block)
        self._scales = {name: self.tensors.pop(scale) for name, scale in scales.items()}
        self.config = block_fp8.plain_config(self.config)

    @property
    def files(self) -> list[Path]:
        """config.json and the files that the tensors lie in."""
        stored = [*self.tensors.values(), *self._scales.values()]
        return [self.directory / name for name in (CONFIG_FILE, *sorted({tensor.file for tensor in stored}))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor; raise CheckpointError when it is not one of the float types."""
        if name in self._scales:
            return block_fp8.DTYPE
        stored = self.tensors[name].dtype
        if stored not in CONVERTED:
            raise CheckpointError(f"{name} is {stored}; only {', '.join(CONVERTED)} are converted")
        return DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, as a view of its file unless it is dequantized: copy it before changing it."""
        stored = self._stored(self.tensors[name])
        if name not in self._scales:
            return stored
        return block_fp8.dequantized(stored, self._stored(self._scales[name]), self._block)

    def _stored(self, tensor: StoredTensor) -> torch.Tensor:
        file = self._files.file(tensor.file)
        return file.tensor(DTYPES[tensor.dtype], tensor.shape, tensor.start, stride=tensor.stride)


def read_config(directory: Path) -> dict:
    """Return config.json as a dict; raise CheckpointError when it is missing or no JSON object."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {directory} is not a HuggingFace checkpoint")
    return read_json(path)


def is_hf_directory(directory: Path) -> bool:
    """Whether `directory` holds config.json and weights."""
    directory = Path(directory)
    weights = (path for kind in KINDS for path in (directory / kind.index, directory / kind.single))
    return (directory / CONFIG_FILE).is_file() and any(path.is_file() for path in weights)


def copy_sidecar_files(source: Path, target: Path) -> None:
    """Copy config.json, the generation config and every tokenizer file, byte for byte, links resolved.

    Raises CheckpointError for a link that leads out of `source`: what it points to is nobody's to hand on.
    """
    for pattern in SIDECAR_FILES:
        for path in sorted(Path(source).glob(pattern)):
            if not stays_inside(Path(source), path):
                raise CheckpointError(f"unsafe link {path}: it leads out of its folder; put the file itself there")
            if path.is_file():
                copy = Path(target) / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def safetensors_files(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    span: Callable[[str, StoredTensor], Span],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[list[File], dict | None]:
    """Return the files that hold `tensors`, type and shape of each in their order, and their index if several.

    `span` is asked for what fills the place of a tensor.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    shards = _cut(sizes, shard_bytes)
    files, weight_map = [], {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, places = safetensors_file.lay_out(file, {name: tensors[name] for name in names})
        size = len(header) + sum(sizes[name] for name in names)
        files.append(File(file, size, [(0, header)], [span(name, place) for name, place in places.items()]))
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return files, index if len(shards) > 1 else None


def _cut(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Cut names, in their order, into runs of at most `shard_bytes`, or of one that is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Return what lies where in a directory; raise CheckpointError when files, index and headers disagree.

    Pickles come in through the restricted unpickler.
    """
    kind = next(
        (kind for kind in KINDS if any((directory / name).exists() for name in (kind.index, kind.single))), None
    )
    if kind is None:
        others = sorted(
            path.name for suffix in ("safetensors", "bin", "gguf") for path in directory.glob(f"*.{suffix}")
        )
        found = f"; found {', '.join(others[:5])}" if others else ""
        wanted = " nor ".join(name for kind in KINDS for name in (kind.single, kind.index))
        raise CheckpointError(f"{directory} has neither {wanted}{found}")
    weight_map = _read_index(directory / kind.index)
    names = [kind.single] if weight_map is None else sorted(set(weight_map.values()))
    _check_files(directory, names)
    headers = {name: kind.read_header(directory / name) for name in names}
    if weight_map is not None:
        _check_index(directory / kind.index, weight_map, headers)
    return {name: stored for header in headers.values() for name, stored in header.items()}


def _read_index(path: Path) -> dict[str, str] | None:
    if not path.is_file():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of names to files")
    return weight_map


def _check_files(directory: Path, names: Sequence[str]) -> None:
    unsafe = [
        f"unsafe shard path {name!r}"
        for name in names
        if not is_plain_name(name) or not stays_inside(directory, directory / name)
    ]
    raise_all(CheckpointError, str(directory), unsafe)
    missing = [f"shard {name} is missing" for name in names if not (directory / name).is_file()]
    raise_all(CheckpointError, f"{directory} is incomplete", missing)


def _check_index(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, dict]) -> None:
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
    raise_all(CheckpointError, f"{index.parent}: {index.name} and the shards disagree", problems)
