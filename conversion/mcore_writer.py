"""A step folder as megatron-core 0.16.1 would write it: where everything lies is known before it is written.

Chunks lie one behind the other as `torch.save` writes each; `.metadata` says where.
"""

import io
import json
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .archive_layout import ALIGNMENT, archive_of
from .filling import File, Span, write_files

FILE_BYTES = 2_000_000_000
LEAST_FILES = 2  # the kernel lets one thread write into a file at a time
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """`shape` elements at `offsets` of the tensor `key` of `whole_shape`.

    `slices` yields them when their turn comes, some rows at a time; `check` is told where they were written, reads
    them there and returns what is wrong.
    """

    key: str
    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: Callable[[], Iterable[torch.Tensor]]
    check: Callable[["Place"], list[str]] | None = None
    hashes: Callable[[], dict[str, str]] | None = None  # what is to be said of it

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """An archive: `length` bytes from `start` of `file`."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StepLayout:
    """The files of a step folder, and `.metadata`, which makes them one."""

    files: list[File]
    metadata: bytes

    def finish(self, folder: Path) -> None:
        """Write what makes a step complete, when its files are."""
        torch.save({}, folder / "common.pt")
        (folder / ".metadata").write_bytes(self.metadata)
        (folder / "metadata.json").write_text(json.dumps(BACKEND))


def lay_out(chunks: Sequence[Chunk], object_keys: Iterable[str]) -> StepLayout:
    """Give every chunk and every byte object its place in the files of a step folder."""
    object_keys = list(object_keys)
    shares = _shares(chunks)
    files, places = [], dict[MetadataIndex, Place]()
    for number, share in enumerate(shares):
        keys = object_keys[number :: len(shares)]
        files.append(_file(f"__0_{number}.distcp", share, keys, places))
    storage = {index: _StorageInfo(place.file, place.start, place.length) for index, place in places.items()}
    metadata = Metadata(_describe(chunks, object_keys), storage_data=storage, storage_meta=StorageMeta())
    return StepLayout(files, pickle.dumps(metadata))


def write_step(folder: Path, chunks: Sequence[Chunk], object_keys: Iterable[str]) -> None:
    """Write a step folder at once."""
    layout = lay_out(chunks, object_keys)
    write_files(folder, layout.files)
    layout.finish(folder)


def _shares(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Deal the chunks out evenly by bytes, in order, so that each file is made of neighbours."""
    total = sum(chunk.num_bytes for chunk in chunks)
    shares: list[list[Chunk]] = [[] for _ in range(max(LEAST_FILES, math.ceil(total / FILE_BYTES)))]
    end = 0
    for chunk in chunks:
        shares[min(len(shares) - 1, end * len(shares) // max(1, total))].append(chunk)
        end += chunk.num_bytes
    return shares


def _file(name: str, chunks: Sequence[Chunk], object_keys: Sequence[str], places: dict[MetadataIndex, Place]) -> File:
    """Lay out one file and note its places."""
    fixed: list[tuple[int, bytes]] = []
    spans: list[Span] = []
    end, payload = 0, _empty_object()
    for key in object_keys:
        places[MetadataIndex(key)] = Place(name, end, len(payload))
        fixed.append((end, payload))
        end += len(payload)
    for chunk in chunks:
        archive = archive_of(chunk.dtype, chunk.shape)
        start = end + -end % ALIGNMENT  # a reader maps the file: aligned data needs no copy
        place = places[MetadataIndex(chunk.key, chunk.offsets)] = Place(name, start, archive.num_bytes)
        data = start + len(archive.head)
        end = start + archive.num_bytes
        fixed += [(start, archive.head), (data + archive.data_bytes, archive.tail)]
        check = None if chunk.check is None else partial(chunk.check, place)
        spans.append(Span(chunk.key, data, archive.data_bytes, chunk.slices, check, chunk.hashes))
    return File(name, end, fixed, spans)


def _empty_object() -> bytes:
    """What Megatron-core saves for an extra state that says nothing."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


def _describe(
    chunks: Sequence[Chunk], object_keys: Iterable[str]
) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        key: BytesStorageMetadata() for key in object_keys
    }
    for chunk in chunks:
        whole = TensorStorageMetadata(TensorProperties(chunk.dtype), torch.Size(chunk.whole_shape), [])
        entry = described.setdefault(chunk.key, whole)
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)))
    return described
