"""Writing a step folder as megatron-core 0.16.1 would, without Megatron-core and never whole in memory.

torch's own FileSystemWriter loses an error that one of its threads meets, so the files are written here:
chunks saved one behind the other by `torch.save`, and `.metadata` that says where each lies.
"""

import io
import json
import math
import pickle
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
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

WRITER_THREADS = 2
ALIGNMENT = 64  # bytes; what torch.save aligns its data to, counted from where it starts
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """`shape` elements at `offsets` of the tensor `key` of `whole_shape`; `read` makes them when their turn comes."""

    key: str
    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_step(
    folder: Path, chunks: Sequence[Chunk], object_keys: Iterable[str], *, advance: Callable[[int], None]
) -> None:
    """Write a step folder: the chunks, empty byte objects, `common.pt`, `metadata.json` and `.metadata`.

    `advance` is told the bytes of each chunk once it is written. Raises what a chunk's `read` raises.
    """
    folder.mkdir(parents=True)
    team = _Team(advance)
    with ThreadPoolExecutor(WRITER_THREADS) as pool:
        futures = [
            pool.submit(_write_file, folder / f"__0_{number}.distcp", share, keys, team)
            for number, (share, keys) in enumerate(_shares(chunks, list(object_keys)))
        ]
        try:
            places = {index: place for future in as_completed(futures) for index, place in future.result().items()}
        finally:
            team.stopped.set()
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(BACKEND))
    metadata = Metadata(_describe(chunks, object_keys), storage_data=places, storage_meta=StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class _Team:
    """What the writer threads share: how to report progress, and that one of them has failed."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.stopped = threading.Event()
        self._advance, self._lock = advance, threading.Lock()

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._advance(num_bytes)


def _shares(chunks: Sequence[Chunk], object_keys: list[str]) -> list[tuple[list[Chunk], list[str]]]:
    """Deal the chunks out evenly by bytes; in order, so that each thread reads its sources forwards."""
    shares: list[list[Chunk]] = [[] for _ in range(WRITER_THREADS)]
    sizes = [0] * WRITER_THREADS
    for chunk in chunks:
        smallest = sizes.index(min(sizes))
        shares[smallest].append(chunk)
        sizes[smallest] += chunk.num_bytes
    return [(share, object_keys[number::WRITER_THREADS]) for number, share in enumerate(shares)]


def _write_file(
    path: Path, chunks: Sequence[Chunk], object_keys: Sequence[str], team: _Team
) -> dict[MetadataIndex, _StorageInfo]:
    places = {}
    payload = _empty_object()
    with open(path, "wb") as file:
        for key in object_keys:
            places[MetadataIndex(key)] = _StorageInfo(path.name, file.tell(), len(payload))
            file.write(payload)
        for chunk in chunks:
            if team.stopped.is_set():
                break
            # A reader maps the file: aligned data needs no copy.
            start = file.seek(-file.tell() % ALIGNMENT, io.SEEK_CUR)
            data = chunk.read().view(chunk.shape)
            # A view would take its whole storage with it.
            torch.save(data if data.untyped_storage().nbytes() == chunk.num_bytes else data.clone(), file)
            places[MetadataIndex(chunk.key, chunk.offsets)] = _StorageInfo(path.name, start, file.tell() - start)
            team.advance(chunk.num_bytes)
    return places


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
