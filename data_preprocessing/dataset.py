"""The dataset on disk, in bytes. All numbers are little-endian.

    PREFIX_text_document.bin    the tokens of all rows, one behind the other: int32 each
    PREFIX_text_document.mask   one byte per token, in the same order: 0 = context, 1 = trained on, any other = trained
                                on with a weight of so many hundredths
    PREFIX_text_document.idx    bytes 0-8    "MMIDIDX" and two zero bytes
                                9-16         uint64 version, 1
                                17           uint8 code of the token type, 4 = int32
                                18-25        uint64 number of rows, n
                                26-33        uint64 number of document bounds, n + 1
                                34-          int32 x n: each row's length in tokens
                                             int64 x n: each row's first byte in .bin
                                             int64 x (n + 1): 0, 1, ..., n (every row is a document)
    PREFIX_text_document.about  for some kinds: one line of JSON for each row, in the same order
    PREFIX_text_document.json   the manifest: versions, tokenizer, chat template, counts, checksums

.bin and .idx are a standard Megatron indexed dataset. A row is one conversation or one document, unpadded and
unpacked. The manifest is renamed into place last: a set without it is not whole. Its `kind` says what rows are:

    conversations   trained where the mask says so
    text            documents, every token trained
    preferences     two rows for each pair: row 2i is the better answer to its prompt, row 2i + 1 the worse one; the
                    mask is 1 in the answers alone, and both rows are equal up to where the answers part
    labelled        conversations, and whether the answer is good in .about: {"label": true}
    prompts         prompts that a model will answer, mask 0, and what their rows say beside in .about:
                    {"answer": "42", ...}
"""

import hashlib
import json
import struct
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from toolkits.foundation.errors import DataError

DOCUMENT_SUFFIX = "_text_document"
FILE_SUFFIXES = (".bin", ".mask", ".idx", ".json")  # of every kind; the order of publishing
ABOUT_SUFFIX = ".about"
FORMAT = "temper-dataset"
FORMAT_VERSION, VERSION_WITHOUT_WEIGHTS = 2, 1

MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
INT32_CODE = 4
HEAD = 1 << 16  # bytes of tokens that tell a dataset without a manifest from another
TOKENS_AT_ONCE = 1 << 26  # tokens that a scan holds in memory
LEAST_WEIGHT, MOST_WEIGHT = 0.02, 2.55  # beside 0 and 1
WEIGHT_OF = np.where(np.arange(256) == 1, 1, np.arange(256) / 100).astype(np.float32)  # [byte of .mask]

Kind = Literal["conversations", "text", "preferences", "labelled", "prompts"]
KINDS_WITH_ABOUT = ("labelled", "prompts")


def file_suffixes(kind: Kind) -> tuple[str, ...]:
    """Return the suffixes of a dataset's files in the order of publishing: the manifest commits the set."""
    return (*FILE_SUFFIXES[:-1], *([ABOUT_SUFFIX] if kind in KINDS_WITH_ABOUT else []), FILE_SUFFIXES[-1])


def mask_byte(weight: float) -> int:
    """Return what .mask holds for tokens of a weight."""
    return 1 if weight == 1 else round(100 * weight)


class Dataset(Protocol):
    """Rows of tokens with their loss masks.

    `lengths` is an integer array [rows]; `manifest` and `tokenizer_fingerprint` are None where nobody recorded
    them; `taken_for` says what a set without a manifest was recognised as; `built_seq_len` is the row length
    that the data was cut to when it was built, None when it was not.
    """

    path: Path

    @property
    def kind(self) -> Kind: ...
    @property
    def taken_for(self) -> str | None: ...
    @property
    def manifest(self) -> dict[str, Any] | None: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def max_token_id(self) -> int: ...
    @property
    def tokenizer_fingerprint(self) -> str | None: ...
    @property
    def num_trained_tokens(self) -> int: ...
    @property
    def built_seq_len(self) -> int | None: ...
    def __len__(self) -> int: ...

    def trained_targets(self) -> np.ndarray:
        """Return how many tokens of each row are trained, int64 [rows], without its first: nothing predicts that."""

    def tokens(self, row: int) -> np.ndarray:
        """Return the row's tokens, integers [length]."""

    def mask(self, row: int) -> np.ndarray:
        """Return the row's loss mask, uint8 [length]: 1 where the token is a training target."""

    def weights(self, row: int) -> np.ndarray:
        """Return how much each token of the row counts as a training target, fp32 [length]; mostly the mask."""


def document_prefix(path: Path) -> Path:
    """Return the path without suffix of the dataset `P`, `P_text_document` or `P_text_document.bin`."""
    text = str(path)
    for suffix in (*FILE_SUFFIXES, ABOUT_SUFFIX):
        text = text.removesuffix(suffix)
    return Path(text if text.endswith(DOCUMENT_SUFFIX) else text + DOCUMENT_SUFFIX)


def dataset_fingerprint(prefix: Path) -> str:
    """Return a short digest of the manifest, which has the hashes of its files, else of the index and first tokens.

    The doubled layout has the same index for all data: every document is of one length.
    """
    base = document_prefix(prefix)
    manifest = sibling(base, ".json")
    if manifest.exists():
        told = json.dumps(json.loads(manifest.read_bytes())["files"], sort_keys=True).encode()
    else:
        with open(sibling(base, ".idx"), "rb") as index, open(sibling(base, ".bin"), "rb") as tokens:
            told = hashlib.file_digest(index, "sha256").digest() + tokens.read(HEAD)
    return hashlib.sha256(told).hexdigest()[:16]


def open_dataset(path: Path | str) -> Dataset:
    """Open a dataset given as `P`, `P_text_document` or `P_text_document.bin`.

    Sizes and headers are checked in constant time, contents are not (see `IndexedDataset.verify`). Without a
    manifest the doubled `[tokens | labels]` layout and plain tokens are told apart and read as rows like any
    other. Raises DataError for what is missing, damaged or of another kind.
    """
    prefix = document_prefix(Path(path))
    index = Index(prefix)
    if sibling(prefix, ".json").exists():
        return IndexedDataset(prefix, index)
    if sibling(prefix, ".mask").exists():
        raise DataError(f"{sibling(prefix, '.json')} is missing, {prefix}.mask is there{_unfinished(prefix)}")
    from .unlabelled import recognise  # imports this module

    return recognise(prefix, index)


class Index:
    """The .idx file, checked against its .bin; everything is mapped, nothing read.

    `lengths` int32 [rows] and `pointers` int64 [rows], in bytes, are those of the sequences; `bounds` int64 says
    at which sequence each document begins, and where the last one ends.
    """

    def __init__(self, prefix: Path) -> None:
        self.path, self.bin_path = sibling(prefix, ".idx"), sibling(prefix, ".bin")
        missing = [str(path) for path in (self.bin_path, self.path) if not path.exists()]
        if missing:
            raise DataError(f"no dataset at {prefix}: missing {' and '.join(missing)}{_unfinished(prefix)}")
        count, bounds, self.dtype = self._header()
        expected = HEADER.size + 12 * count + 8 * bounds
        actual = self.path.stat().st_size
        if actual != expected:
            raise DataError(f"{self.path}: {count} rows take {expected} bytes, the file has {actual}; build it again")
        self.lengths: np.ndarray = np.zeros(0, np.int32)
        self.pointers: np.ndarray = np.zeros(0, np.int64)
        if count:
            self.lengths = np.memmap(self.path, "<i4", "r", HEADER.size, (count,))
            self.pointers = np.memmap(self.path, "<i8", "r", HEADER.size + 4 * count, (count,))
        self.bounds: np.ndarray = np.zeros(0, np.int64)
        if bounds:
            self.bounds = np.memmap(self.path, "<i8", "r", HEADER.size + 12 * count, (bounds,))
        self._check_bin_size()

    def _header(self) -> tuple[int, int, np.dtype]:
        with open(self.path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise DataError(f"{self.path}: truncated, {len(header)} bytes of a header of {HEADER.size}")
        magic, version, code, count, bounds = HEADER.unpack(header)
        if magic != MAGIC:
            raise DataError(f"{self.path}: not a Megatron index: it begins with {magic!r}")
        if version != INDEX_VERSION or code not in TOKEN_TYPES:
            raise DataError(f"{self.path}: index version {version} with token type {code} is not known")
        return count, bounds, np.dtype(TOKEN_TYPES[code])

    def _check_bin_size(self) -> None:
        size = self.dtype.itemsize
        expected = int(self.pointers[-1]) + int(self.lengths[-1]) * size if len(self.lengths) else 0
        actual = self.bin_path.stat().st_size
        if actual != expected:
            raise DataError(
                f"{self.bin_path}: {self.path.name} ends at byte {expected}, the file has {actual}: "
                f"truncated, or of another build{_unfinished(self.bin_path.with_suffix(''))}"
            )

    def tokens(self) -> np.ndarray:
        """Return all tokens of the .bin as one mapped array."""
        if not self.bin_path.stat().st_size:
            return np.zeros(0, self.dtype)
        return np.memmap(self.bin_path, self.dtype, "r")


class IndexedDataset:
    """A dataset that this package wrote; see `Dataset`."""

    built_seq_len = None
    taken_for = None

    def __init__(self, prefix: Path, index: Index) -> None:
        self.path = prefix
        self.manifest: dict[str, Any] = _read_manifest(sibling(prefix, ".json"))
        self.kind: Kind = self.manifest.get("kind", "conversations")
        self.lengths = index.lengths
        self._starts = index.pointers
        if index.dtype != np.dtype("<i4"):
            raise DataError(f"{index.path}: tokens of type {index.dtype}, expected int32")
        self._tokens = index.tokens()
        self._check_sizes()
        self._mask = np.memmap(sibling(prefix, ".mask"), np.uint8, "r") if len(self._tokens) else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, row: int) -> np.ndarray:
        return self._tokens[self._span(row)]

    def mask(self, row: int) -> np.ndarray:
        return (self._mask[self._span(row)] != 0).view(np.uint8)

    def weights(self, row: int) -> np.ndarray:
        return WEIGHT_OF[self._mask[self._span(row)]]

    @property
    def max_token_id(self) -> int:
        return self.manifest["counts"]["max_token_id"]

    @property
    def tokenizer_fingerprint(self) -> str | None:
        tokenizer = self.manifest["tokenizer"]  # None in a set that was converted from one that did not say
        return tokenizer["fingerprint"] if tokenizer else None

    @property
    def num_trained_tokens(self) -> int:
        return self.manifest["counts"]["trained_tokens"]

    def about(self, row: int) -> dict[str, Any]:
        """Return what is known of a row beside its tokens: a label, a reference answer; empty for other kinds."""
        if self.kind not in KINDS_WITH_ABOUT:
            return {}
        start, end = self._about_bounds[row : row + 2]
        with open(sibling(self.path, ABOUT_SUFFIX), "rb") as file:
            file.seek(int(start))
            return json.loads(file.read(int(end - start)))  # type: ignore[no-any-return]

    def labels(self) -> np.ndarray:
        """Return of a labelled set whether each row's answer is good, bool [rows]."""
        with open(sibling(self.path, ABOUT_SUFFIX), "rb") as file:
            return np.array([json.loads(line)["label"] for line in file], bool)

    @cached_property
    def _about_bounds(self) -> np.ndarray:
        """The byte at which each line of .about begins, and where the last one ends, int64 [rows + 1]."""
        data = np.memmap(sibling(self.path, ABOUT_SUFFIX), np.uint8, "r")
        blocks = range(0, len(data), TOKENS_AT_ONCE)
        ends = [np.flatnonzero(data[first : first + TOKENS_AT_ONCE] == ord("\n")) + first + 1 for first in blocks]
        bounds = np.concatenate([[0], *ends])
        if len(bounds) != len(self) + 1:
            raise DataError(f"{self.path}{ABOUT_SUFFIX}: {len(bounds) - 1} lines for {len(self)} rows; build it again")
        return bounds

    def trained_targets(self) -> np.ndarray:
        counts = np.zeros(len(self), np.int64)
        starts = np.asarray(self._starts) // 4
        first = 0
        while first < len(self):
            past = max(first + 1, int(np.searchsorted(starts, starts[first] + TOKENS_AT_ONCE)))
            begin, end = int(starts[first]), int(starts[past]) if past < len(self) else len(self._mask)
            mask = self._mask[begin:end] != 0
            mask[starts[first:past] - begin] = 0
            counts[first:past] = np.add.reduceat(mask, starts[first:past] - begin, dtype=np.int64)
            first = past
        return counts

    def verify(self) -> None:
        """Read everything and compare it with the manifest's checksums; DataError when something differs."""
        for suffix, expected in self.manifest["files"].items():
            path = sibling(self.path, suffix)
            with open(path, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != expected["sha256"]:
                raise DataError(f"{path}: sha256 is {actual}, the manifest says {expected['sha256']}; build it again")

    def _span(self, row: int) -> slice:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = int(self._starts[row]) // 4
        return slice(start, start + int(self.lengths[row]))

    def _check_sizes(self) -> None:
        if not sibling(self.path, ".mask").exists():
            raise DataError(f"{sibling(self.path, '.mask')} is missing{_unfinished(self.path)}")
        for suffix, expected in self.manifest["files"].items():
            path = sibling(self.path, suffix)
            actual = path.stat().st_size
            if actual != expected["bytes"]:
                raise DataError(
                    f"{path}: {actual} bytes, the manifest says {expected['bytes']}: truncated, or of another "
                    f"build{_unfinished(self.path)}"
                )
        counts = self.manifest["counts"]
        if (counts["rows"], counts["tokens"]) != (len(self), len(self._tokens)):
            raise DataError(f"{self.path}: the manifest counts {counts['rows']} rows, the index {len(self)}")


def sibling(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _unfinished(prefix: Path) -> str:
    temporary = prefix.with_name(".tmp-" + prefix.name)
    if temporary.exists():
        return f"; {temporary} is there: a build is running or was killed, build it again"
    return "; there is no unfinished build beside it"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found, version = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        found, version = None, 0
    if found != FORMAT:
        raise DataError(f"{path}: not a dataset manifest of ours; build the dataset again")
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path}: dataset format {version}, this version reads up to {FORMAT_VERSION}; "
            f"use temper-mcore {manifest.get('toolkit_version')} or build it again"
        )
    return manifest
