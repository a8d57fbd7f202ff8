"""One safetensors file: its header read and checked, and its layout for writing.

In bytes: `u64` little endian header length N; N bytes of JSON that map each name to
{"dtype": "BF16", "shape": [...], "data_offsets": [start, stop]}; then the data, offsets counted from its
first byte.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError, raise_all
from toolkits.foundation.progress import human_bytes

from .safe_files import parse_json, sizes

# What headers call the types that are read; any other is refused by its name.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: `start` is its first byte, `dtype` as a header calls it; no `stride`: contiguous."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stride: tuple[int, ...] | None = None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; raise CheckpointError when its header and its size do not fit."""
    size = path.stat().st_size
    again = "; download or copy it again"
    if _SHA256.fullmatch(blob := path.resolve().name):  # the hub's cache calls files by their hash
        again += f" (sha256 of the original is {blob})"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path}: {size:,} bytes are too few for its header, it is cut short{again}")
        raw = file.read(length)
    try:
        header = parse_json(raw, "it")
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {name: _span(entry["data_offsets"]) for name, entry in entries.items()}
        stored = {
            name: StoredTensor(path.name, str(entry["dtype"]), sizes(entry["shape"]), 8 + length + spans[name][0])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({type(error).__name__}: {error}){again}") from None
    promised = 8 + length + max((stop for _, stop in spans.values()), default=0)
    if promised != size:
        raise CheckpointError(
            f"{path}: header promises {human_bytes(promised)} ({promised:,} bytes), "
            f"file has {human_bytes(size)} ({size:,}){again}"
        )
    raise_all(CheckpointError, f"{path} is damaged", list(_span_problems(stored, spans)))
    return stored


def lay_out(
    file: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return what a file begins with and where its tensors lie, given type and shape of each in their order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    begin = len(encoded).to_bytes(8, "little") + encoded
    return begin, {
        name: StoredTensor(file, NAMES[dtype], shape, len(begin) + starts[name])
        for name, (dtype, shape) in tensors.items()
    }


def _span_problems(stored: Mapping[str, StoredTensor], spans: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    for name, tensor in stored.items():
        start, stop = spans[name]
        itemsize = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else None
        if stop < start or (itemsize and stop - start != math.prod(tensor.shape) * itemsize):
            yield f"{name}: {stop - start:,} bytes for {tensor.dtype} {list(tensor.shape)}"
    end = 0
    for (start, stop), name in sorted((span, name) for name, span in spans.items()):
        if start != end:
            yield f"{name}: its bytes begin at {start:,}, those before it end at {end:,}"
        end = stop


def _span(values: object) -> tuple[int, ...]:
    start, stop = sizes(values)
    return start, stop
