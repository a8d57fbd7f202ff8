"""A set to be audited as a stream of blocks: files of rows as `temper data build` would read them, or a built set."""

import mmap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from toolkits.foundation.errors import UsageError
from toolkits.foundation.progress import Progress

from ..build import bytes_of, kind_of, with_encoder
from ..chunks import BuildOptions, Chunk, ChunkWork, chunks_of, read_record
from ..dataset import Dataset, IndexedDataset, Kind, document_prefix, open_dataset, sibling
from ..inspect import tokenizer_of
from ..reading import ReadReport, find_inputs, read_batches
from ..records import Record
from ..row_error import RowError
from ..rows import Row
from ..tokenizer import LoadedTokenizer, load_tokenizer
from .block import Block, Entry, Places, entry_of

ROWS_AT_ONCE = 512


class Stream(Protocol):
    """A set: its name, what kind its rows are of (None when no row is good), its tokenizer, and its rows."""

    name: str
    kind: Kind | None
    tokenizer: LoadedTokenizer
    places: Places

    def blocks(self) -> Iterator[Block]:
        """Yield the rows, once."""

    def facts(self) -> dict[str, Any]:
        """Return what is known of the set when all rows were read."""


def open_stream(sources: Sequence[str], tokenizer: Path, options: BuildOptions) -> Stream:
    """Return the stream of a dataset PREFIX, or of files, patterns and `-`.

    Raises DataError for what is not there and for a dataset of another tokenizer.
    """
    built = [source for source in sources if _is_dataset(source)]
    if built and len(sources) > 1:
        raise UsageError(f"{built[0]} is a dataset: check it alone, or give files of rows only")
    return DatasetStream(built[0], tokenizer) if built else FileStream(sources, tokenizer, options)


def _is_dataset(source: str) -> bool:
    return source != "-" and sibling(document_prefix(Path(source)), ".idx").exists()


class FileStream:
    """Rows in files, each read, checked, rendered and encoded as a build does it; bad ones are skipped."""

    def __init__(self, sources: Sequence[str], tokenizer: Path, options: BuildOptions) -> None:
        self._sources, self._report = find_inputs(sources), ReadReport()
        self._options = with_encoder(replace(options, on_bad_row="skip", workers=1), self._sources)
        self.name = ", ".join(map(str, self._sources))
        self.places = Places(self._sources)
        batches = read_batches(self._sources, self._report, encoding=options.encoding)
        self.kind, self._batches = kind_of(batches, self._options)
        self._work = _Work(self.kind, tokenizer, self._options, self.places) if self.kind else None
        self.tokenizer = self._work.encoder.tokenizer if self._work else load_tokenizer(tokenizer)
        self._layouts: Counter[str] = Counter()

    def blocks(self) -> Iterator[Block]:
        total = bytes_of(self._sources)
        with Progress(f"checking {self.name}", total, unit="B" if total else "rows") as progress:
            for block in self._blocks():
                self._layouts.update(entry.layout for entry in block.entries)
                read = len(block.entries) + len(block.bad)
                progress.advance(self._report.bytes_read - progress.done if total else read)
                yield block
            progress.advance(total - progress.done if total else 0)

    def _blocks(self) -> Iterator[Block]:
        if self._work is None:
            for row in chain.from_iterable(self._batches):
                yield _without_samples([(self.places.add(row.source, row.line), _what_is_wrong(row, self._options))])
            return
        for chunk in chunks_of(self._batches, chunk_rows=self._options.chunk_rows):
            yield self._work.block(chunk)

    def facts(self) -> dict[str, Any]:
        notes = dict(sorted(self._report.notes.items()))
        return {"read_as": self._report.kind, "formats": dict(self._layouts.most_common()), "notes": notes}


class _Work(ChunkWork):
    """A build's work on a chunk that keeps what its rows say."""

    wants_records = True

    def __init__(self, kind: Kind, tokenizer: Path, options: BuildOptions, places: Places) -> None:
        super().__init__(kind, tokenizer, options)
        self._places = places
        self._found: list[tuple[int, Record]] = []

    def record(self, index: int, value: Any) -> Record:
        found = super().record(index, value)
        self._found.append((index, found))
        return found

    def block(self, chunk: Chunk) -> Block:
        """Return the chunk's rows as the checks see them."""
        rows = chunk.rows
        numbers = [self._places.add(rows.source, line) for line in rows.lines]
        self._found = []
        done = self(chunk)
        # In a JSON list several rows may begin on a line.
        index_of = {place: index for index, place in enumerate(zip(rows.lines, rows.offsets, strict=True))}
        bad = {index_of[row.line, row.offset]: error for row, error in done.rejects}
        entries = [entry_of(numbers[index], record) for index, record in self._found if index not in bad]
        wrong = [(numbers[index], error) for index, error in bad.items()]
        counts = (done.control_texts, done.rows_with_control_text)
        return Block(entries, done.tokens, (done.mask != 0).view(np.uint8), done.lengths, wrong, *counts)


class DatasetStream:
    """The rows of a built dataset, decoded."""

    def __init__(self, source: str, tokenizer: Path) -> None:
        self._dataset: Dataset = open_dataset(source)
        self.name = str(self._dataset.path)
        self.kind: Kind | None = self._dataset.kind
        self.tokenizer = load_tokenizer(tokenizer_of(self._dataset, tokenizer))
        self._each = 2 if self.kind == "preferences" else 1
        self._scaffold = np.zeros(
            0, np.int32
        )  # what the context of all rows begins with: the template's, a system turn
        self._system = ""
        self.places = Places(dataset=self._dataset.path, word="pair" if self._each == 2 else "row")

    def blocks(self) -> Iterator[Block]:
        count = len(self._dataset) // self._each
        with Progress(f"checking {self.name}", count, unit="rows") as progress:
            for first in range(0, count, ROWS_AT_ONCE):
                numbers = range(first, min(first + ROWS_AT_ONCE, count))
                if not first:
                    self._find_scaffold()
                yield self._block(numbers)
                self._let_go()
                progress.advance(len(numbers))

    def _let_go(self) -> None:
        """Let go of the pages of the dataset's files; read once, they would be this process's memory to the end."""
        for held in vars(self._dataset).values():
            if isinstance(held, np.memmap) and isinstance(held.base, mmap.mmap):
                held.base.madvise(mmap.MADV_DONTNEED)

    def facts(self) -> dict[str, Any]:
        manifest = self._dataset.manifest or {}
        formats = manifest.get("input", {}).get("layouts", {})
        return {"read_as": self._dataset.taken_for or "a dataset of Temper", "formats": formats, "notes": {}}

    def _find_scaffold(self) -> None:
        contexts = []
        for row in range(min(len(self._dataset), ROWS_AT_ONCE)):
            trained = np.flatnonzero(self._dataset.mask(row))
            contexts.append(np.asarray(self._dataset.tokens(row)[: trained[0] if len(trained) else None], np.int32))
        shortest = min(map(len, contexts))
        together = np.stack([context[:shortest] for context in contexts])
        shared = np.append((together == together[0]).all(axis=0), False).argmin()
        self._scaffold = together[0][:shared] if len(contexts) > 1 else self._scaffold
        self._system = self.tokenizer.encoder.decode(self._scaffold.tolist(), skip_special_tokens=True)

    def _block(self, numbers: range) -> Block:
        rows = range(numbers.start * self._each, numbers.stop * self._each)
        tokens = [np.asarray(self._dataset.tokens(row), np.int32) for row in rows]
        masks = [np.asarray(self._dataset.mask(row), np.uint8) for row in rows]
        texts = self._texts(tokens, masks)
        entries = [self._entry(number, texts[at : at + self._each]) for number, at in self._numbered(numbers)]
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        return Block(entries, np.concatenate(tokens), np.concatenate(masks), lengths)

    def _numbered(self, numbers: range) -> Iterator[tuple[int, int]]:
        return zip(numbers, range(0, self._each * len(numbers), self._each), strict=True)

    def _entry(self, number: int, texts: list[tuple[str, tuple[str, ...]]]) -> Entry:
        question, answers = texts[0]
        rejected = texts[1][1] if self._each == 2 else ()
        about = self._dataset.about(number) if isinstance(self._dataset, IndexedDataset) else {}
        label = about.get("label") if self.kind == "labelled" else None
        if self.kind == "text":
            question, answers = "\n".join(answers), ()
        return Entry(number, self.kind or "", self._system, question, answers, rejected, label)

    def _texts(self, tokens: list[np.ndarray], masks: list[np.ndarray]) -> list[tuple[str, tuple[str, ...]]]:
        """Return of each row the text of what is not trained, and of each stretch that is."""
        parts: list[list[int]] = []
        counts = []
        for ids, mask in zip(tokens, masks, strict=True):
            edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).tolist()
            trained = [ids[start:end].tolist() for start, end in list(pairwise(edges))[::2]]
            start = len(self._scaffold) if np.array_equal(ids[: len(self._scaffold)], self._scaffold) else 0
            parts += [ids[start:][mask[start:] == 0].tolist(), *trained]
            counts.append(len(trained))
        said = iter(self.tokenizer.encoder.decode_batch(parts, skip_special_tokens=True))
        return [(next(said), tuple(next(said) for _ in range(count))) for count in counts]


def _without_samples(bad: list[tuple[int, RowError]]) -> Block:
    return Block([], np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int64), bad)


def _what_is_wrong(row: Row, options: BuildOptions) -> RowError:
    try:
        read_record(row, options)
    except RowError as error:
        return error
    raise AssertionError("a good row was there after all")
