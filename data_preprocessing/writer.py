"""Writing a dataset; see dataset.py for its bytes.

While it is written, `.lengths` holds each row's length beside the other files: with it and a few numbers another
process can go on where this one stopped.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .dataset import (
    ABOUT_SUFFIX,
    FORMAT,
    FORMAT_VERSION,
    HEADER,
    INDEX_VERSION,
    INT32_CODE,
    MAGIC,
    VERSION_WITHOUT_WEIGHTS,
    sibling,
)

LENGTHS_SUFFIX = ".lengths"
ROWS_AT_ONCE = 1 << 20
BYTES_AT_ONCE = 1 << 24


@dataclass
class Counts:
    """What the manifest counts."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    weighted_tokens: int = 0  # of these: with another weight than 1
    max_token_id: int = -1
    longest: int = 0


class DatasetWriter:
    """Writes rows as they come; memory does not grow with them.

    The files go into `folder` under `name`; `finish` completes the set. Publishing is the caller's. `state` is what
    `save` of another writer returned: this one goes on behind the rows written then.
    """

    def __init__(self, folder: Path, name: str, *, state: Mapping[str, Any] | None = None) -> None:
        self._prefix = folder / name
        self._counts = Counts(**state["counts"]) if state else Counts()
        kept: Mapping[str, int] = state["bytes"] if state else {}
        self._files: dict[str, HashedFile] = {}
        for suffix in (".bin", ".mask", LENGTHS_SUFFIX, ABOUT_SUFFIX):
            if suffix in kept or suffix != ABOUT_SUFFIX:
                self._files[suffix] = HashedFile(sibling(self._prefix, suffix), keep=kept.get(suffix, 0))

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def add(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        """Append a row: `tokens` [n] as int32, `mask` uint8 [n] as dataset.py says."""
        self.add_rows(tokens, mask, np.array([len(tokens)]))

    def add_rows(self, tokens: np.ndarray, mask: np.ndarray, lengths: np.ndarray, about: bytes = b"") -> None:
        """Append rows of `lengths` [rows], laid end to end; `about` holds a line for each where the kind has some."""
        assert len(tokens) == len(mask) == lengths.sum() and (lengths > 0).all()
        if not len(lengths):
            return
        self._files[".bin"].write(np.ascontiguousarray(tokens, "<i4").data)
        self._files[".mask"].write(np.ascontiguousarray(mask, np.uint8).data)
        self._files[LENGTHS_SUFFIX].write(lengths.astype("<i4").data)
        if about:
            if ABOUT_SUFFIX not in self._files:
                self._files[ABOUT_SUFFIX] = HashedFile(sibling(self._prefix, ABOUT_SUFFIX))
            self._files[ABOUT_SUFFIX].write(about)
        counts = self._counts
        counts.rows += len(lengths)
        counts.tokens += len(tokens)
        counts.trained_tokens += int(np.count_nonzero(mask))
        counts.weighted_tokens += int(np.count_nonzero(mask > 1))
        counts.max_token_id = max(counts.max_token_id, int(tokens.max()))
        counts.longest = max(counts.longest, int(lengths.max()))

    def save(self) -> dict[str, Any]:
        """Make what was added durable and return what another writer needs to go on behind it."""
        return {"counts": asdict(self._counts), "bytes": {name: file.sync() for name, file in self._files.items()}}

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Write the index and the manifest, which gets `about` beside counts and checksums; return it."""
        lengths = sibling(self._prefix, LENGTHS_SUFFIX)
        self._files.pop(LENGTHS_SUFFIX).close()
        self._files[".idx"] = index = HashedFile(sibling(self._prefix, ".idx"))
        write_index(index, np.fromfile(lengths, "<i4"))
        lengths.unlink()
        order = [suffix for suffix in (".bin", ".mask", ".idx", ABOUT_SUFFIX) if suffix in self._files]
        manifest = {
            "format": FORMAT,
            # What knows no weights would take hundredths for whole ones.
            "format_version": FORMAT_VERSION if self._counts.weighted_tokens else VERSION_WITHOUT_WEIGHTS,
            "toolkit_version": toolkit_version(),
            **about,
            "counts": asdict(self._counts),
            "files": {suffix: self._files[suffix].close() for suffix in order},
        }
        text = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
        sibling(self._prefix, ".json").write_text(text, encoding="utf-8")
        return manifest


def toolkit_version() -> str:
    """Return the version of this distribution."""
    try:
        return importlib.metadata.version("temper-mcore")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def write_index(index: "HashedFile", lengths: np.ndarray) -> None:
    """Write the .idx of rows of int32 that lie one behind the other, `lengths` int32 [rows]."""
    rows = len(lengths)
    index.write(HEADER.pack(MAGIC, INDEX_VERSION, INT32_CODE, rows, rows + 1))
    index.write(lengths.tobytes())
    start = 0
    for first in range(0, rows, ROWS_AT_ONCE):
        ends = start + 4 * np.cumsum(lengths[first : first + ROWS_AT_ONCE], dtype=np.int64)
        index.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
        start = int(ends[-1])
    for first in range(0, rows + 1, ROWS_AT_ONCE):
        index.write(np.arange(first, min(first + ROWS_AT_ONCE, rows + 1), dtype="<i8").tobytes())


class HashedFile:
    """A file that knows its size and checksum; `keep` bytes that are there already stay, the rest goes."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        self._file = open(path, "r+b" if keep else "wb")  # noqa: SIM115  closed by close()
        self._hash = hashlib.sha256()
        self._bytes = keep
        while keep:
            block = self._file.read(min(keep, BYTES_AT_ONCE))
            assert block  # whoever goes on has compared the sizes
            self._hash.update(block)
            keep -= len(block)
        self._file.truncate(self._bytes)
        self._file.seek(self._bytes)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._hash.update(data)
        self._bytes += memoryview(data).nbytes

    def sync(self) -> int:
        """Make the file durable and return its size."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._bytes

    def close(self) -> dict[str, Any]:
        """Close the file and return its size and checksum."""
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}
