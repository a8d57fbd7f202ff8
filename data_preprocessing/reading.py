"""Files -> rows, still raw, each with the file and the line it starts on.

What a file is, its content says, not its name: a JSON list, JSONL, Parquet, and any of them inside gzip or zstd.
Only a CSV file is known by its name. A JSON list is read whole, everything else is streamed.
"""

import csv
import glob
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import IO, Any, TypeVar

from toolkits.foundation.errors import DataError, MachineError, UsageError

from .rows import STDIN, Row, Rows, clipped, encoding_fault, syntax_fault

UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
GZIP_MARK, ZSTD_MARK, PARQUET_MARK = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
SEPARATORS = {".csv": ",", ".tsv": "\t"}
BYTES_AT_ONCE = 1 << 18  # that are read from a file
BATCH_BYTES = 1 << 20  # of rows that are handed on together

Item = TypeVar("Item")
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass
class ReadReport:
    """What a reader found out about its files: their kinds, harmless oddities by name, and how far it is."""

    kinds: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0  # of the files as they lie on disk

    @property
    def kind(self) -> str:
        """The kinds of the files, each once."""
        return ", ".join(dict.fromkeys(self.kinds)) or "empty"


def find_inputs(sources: Sequence[Path | str]) -> list[Path]:
    """Return the files that paths and patterns (`data/*.jsonl`) name, patterns in the order of their names.

    `-` is stdin. Raises DataError for what is not there, UsageError when a file is named twice.
    """
    found: list[Path] = []
    for source in map(str, sources):
        path = Path(source)
        if path == STDIN or path.is_file() or path.is_fifo():
            found.append(path)
            continue
        matching = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]
        if not matching:
            pattern = any(sign in source for sign in "*?[")
            raise DataError(f"{source}: no file matches the pattern" if pattern else f"{source}: no such file")
        found += matching
    twice = [str(path) for path, count in Counter(found).items() if count > 1]
    if twice:
        raise UsageError(f"{', '.join(twice)}: named more than once")
    return found


def read_batches(paths: Sequence[Path], report: ReadReport, *, encoding: str = "utf-8") -> Iterator[Rows]:
    """Yield the rows of several files, one file behind the other, some at once; `-` is stdin.

    Raises DataError for a file that cannot be read any further, UsageError for an unknown encoding, MachineError
    for one that takes a library which is missing.
    """
    for path in paths:
        yield from _batches(path, report, encoding)


def read_files(paths: Sequence[Path], report: ReadReport, *, encoding: str = "utf-8") -> Iterator[Row]:
    """Yield the rows of several files, one by one; see `read_batches`."""
    return chain.from_iterable(read_batches(paths, report, encoding=encoding))


def read_rows(path: Path, report: ReadReport, *, encoding: str = "utf-8") -> Iterator[Row]:
    """Yield the rows of a file; see `read_batches`."""
    return read_files([path], report, encoding=encoding)


def _batches(path: Path, report: ReadReport, encoding: str) -> Iterator[Rows]:
    try:
        "".encode(encoding)
    except LookupError:
        raise UsageError(f"--encoding {encoding}: no such encoding; utf-8, gbk and gb18030 are common") from None
    with _opened(path) as raw:
        before, seekable, size = report.bytes_read, raw.seekable(), os.fstat(raw.fileno()).st_size
        file, packing = _unpacked(path, raw)
        try:
            for batch in _unpacked_batches(path, file, report, encoding, packing):
                if seekable:
                    report.bytes_read = before + raw.tell()
                yield batch
        except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
            if not packing:
                raise
            raise DataError(f"{path}: the {packing} file is damaged or incomplete ({error}); copy it again") from None
        if seekable:
            report.bytes_read = before + size


def _opened(path: Path) -> IO[bytes]:
    if path == STDIN:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return open(path, "rb", buffering=BYTES_AT_ONCE)


def _unpacked(path: Path, raw: Any) -> tuple[Any, str]:
    """Return the file's content as a stream that can be peeked into, and what it was packed with."""
    start = raw.peek(4)
    if start.startswith(GZIP_MARK):
        return gzip.GzipFile(fileobj=raw), "gzip"
    if start.startswith(ZSTD_MARK):
        return io.BufferedReader(_pyarrow(path).CompressedInputStream(raw, "zstd")), "zstd"
    return raw, ""


def _unpacked_batches(path: Path, file: Any, report: ReadReport, encoding: str, packing: str) -> Iterator[Rows]:
    start = file.peek(8192)
    if start.startswith(UTF16_MARKS):
        raise DataError(f"{path}: the file is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8")
    marked = start.startswith(UTF8_MARK)
    if marked:
        report.notes["byte order mark"] += 1
        start = start[len(UTF8_MARK) :]
        file.read(len(UTF8_MARK))
    separator = SEPARATORS.get(Path(path.stem if packing else path.name).suffix)
    kind = "JSON list" if start.lstrip()[:1] == b"[" else "JSONL"
    if start.startswith(PARQUET_MARK):
        kind, batches = "Parquet", _batched(_parquet_rows(path, file))
    elif separator:
        kind, batches = "CSV", _batched(_csv_rows(path, file, encoding, separator))
    elif kind == "JSON list":
        batches = _batched(_list_rows(path, file.read(), encoding))
    else:
        batches = _line_batches(path, file, report, behind=len(UTF8_MARK) * marked)
    report.kinds.append(f"{kind} ({packing})" if packing else kind)
    return batches


def _line_batches(path: Path, file: IO[bytes], report: ReadReport, *, behind: int) -> Iterator[Rows]:
    number = 1
    for lines in _gathered(file, len):
        # Bytes are counted, because a pipe cannot tell its place.
        *offsets, behind = accumulate(map(len, lines), initial=behind)
        batch = Rows(lines, range(number, number + len(lines)), offsets, path)
        number += len(lines)
        windows = sum(map(bytes.endswith, lines, repeat(b"\r\n")))
        if windows:
            report.notes["CRLF lines"] += windows
        if any(map(bytes.isspace, lines)):
            rows = [row for row in batch if not row.data.isspace()]
            report.notes["blank lines"] += len(lines) - len(rows)
            if not rows:
                continue
            batch = Rows.of(rows)
        yield batch


def _batched(rows: Iterator[Row]) -> Iterator[Rows]:
    return map(Rows.of, _gathered(rows, lambda row: len(str(row.data))))


def _gathered(items: Iterable[Item], size_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield items, some at once; those in front of a fault before it is raised."""
    gathered: list[Item] = []
    size, fault = 0, None
    try:
        for item in items:
            gathered.append(item)
            size += size_of(item)
            if size >= BATCH_BYTES:
                yield gathered
                gathered, size = [], 0
    except Exception as error:
        fault = error
    if gathered:
        yield gathered
    if fault is not None:
        raise fault


def _csv_rows(path: Path, file: Any, encoding: str, separator: str) -> Iterator[Row]:
    """A line of names, then rows; every value is text, and an empty one is left out."""
    csv.field_size_limit(sys.maxsize)
    lines = io.TextIOWrapper(file, encoding, newline="")
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) != len(names):
            raise DataError(f"{path}:1: a name stands twice in the line of column names: {', '.join(names)}")
        line = reader.line_num + 1
        for values in reader:
            if len(values) != len(names):
                said = f"{len(values)} values for {len(names)} columns"
                raise DataError(f"{path}:{line}: {said}; quote values with a {separator!r} or a new line in them")
            yield Row(line, {name: value for name, value in zip(names, values, strict=True) if value}, 0, path)
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {encoding_fault(error, error.object, encoding)}") from None
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    finally:
        with suppress(ValueError):  # who stops early has closed the file
            lines.detach()  # or it would close the file


def _parquet_rows(path: Path, file: Any) -> Iterator[Row]:
    arrow = _pyarrow(path)
    from pyarrow import parquet

    try:
        # Its end is read first, which a stream cannot do.
        table = parquet.ParquetFile(file if file.seekable() else arrow.BufferReader(file.read()))
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(number, {name: part for name, part in value.items() if part is not None}, 0, path)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}); copy it again") from None


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MachineError(f"{path}: Parquet and zstd are read by pyarrow; pip install 'temper-mcore[data]'") from None
    return pyarrow


def _list_rows(path: Path, raw: bytes, encoding: str) -> Iterator[Row]:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {encoding_fault(error, raw, encoding)}") from None
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    place = _skip_blanks(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line + _lines_into(error, line)}: {_list_fault(error)}") from None
        yield Row(line, value, place, path)
        place = _skip_blanks(text, place)
        if text[place : place + 1] == ",":
            place = _skip_blanks(text, place + 1)
        elif text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            raise DataError(f"{path}:{line}: {_unclosed(text, place)}")
    if text[place + 1 :].strip():
        raise DataError(f"{path}: something follows behind the closing ']' of the list")


def _skip_blanks(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    assert match is not None  # the pattern accepts the empty string
    return match.end()


def _lines_into(error: Exception, line: int) -> int:
    return error.lineno - line if isinstance(error, json.JSONDecodeError) else 0


def _list_fault(error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):  # the other is an integer of thousands of digits
        return "nested too deeply" if isinstance(error, RecursionError) else str(error)
    at_end = not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated")
    hint = "the list is not closed: the file may be incomplete" if at_end else "a JSON list ends at its first fault"
    return f"{syntax_fault(error)}; {hint}"


def _unclosed(text: str, place: int) -> str:
    if place == len(text):
        return "expected ',' or ']'; the list is not closed: the file may be incomplete"
    return f"expected ',' or ']' behind an element, found {clipped(text[place:])!r}"
