"""A JSON or JSONL file -> a dataset on disk.

    read_rows -> _records -> _rendered -> _samples -> DatasetWriter

Every stage is a generator, so memory stays flat. A stage that finds a bad row gives it to `_Rejects`, which
stops the build or writes the row down and goes on. The first good row says whether the file holds
conversations or plain text. The result does not depend on the size of the chunks that the encoder gets.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from toolkits.foundation.errors import DataError, UsageError
from toolkits.foundation.progress import Progress
from toolkits.foundation.publish import publish_files

from .chat import ChatEncoder, Rendered, Sample, tokenizer_fingerprint
from .dataset import DOCUMENT_SUFFIX, FILE_SUFFIXES, DatasetWriter, document_prefix
from .records import Document, ReadReport, Record, Row, RowError, parse_row, read_rows, record
from .text import TextEncoder

T = TypeVar("T")
Numbered = Iterator[tuple[Row, T]]
Encoder = ChatEncoder | TextEncoder

CHARACTERS_AT_ONCE = 1 << 22  # of a chunk's texts: a few long documents are a chunk too


@dataclass(frozen=True)
class BuildOptions:
    """How a build treats its input."""

    on_bad_row: Literal["stop", "skip"] = "stop"
    max_bad: float = 0.01  # with skip: the fraction of rows that may be bad
    encoding: str = "utf-8"
    merge_consecutive: bool = False  # join neighbouring turns of one role instead of refusing them
    end_token: str | None = None  # behind each plain text; None: the tokenizer's own
    chunk_rows: int = 1024  # rows that the encoder gets at once: more need more memory, nothing else changes


@dataclass
class _Tally:
    """What the stages count on the way."""

    read: ReadReport = field(default_factory=ReadReport)
    rows: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    control_texts: int = 0
    rows_with_control_text: int = 0


def build(
    input: Path | str,
    prefix: Path | str,
    *,
    tokenizer: Path | str,
    overwrite: bool = False,
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Write the dataset `prefix` from the conversations or the texts in `input` and return its manifest.

    `tokenizer` is a HuggingFace folder. Bad rows go to PREFIX.rejects.jsonl when `options` skip them. Raises
    DataError for bad input, UsageError when the dataset exists or another process is building it.
    """
    source, options = Path(input), options or BuildOptions()
    if not source.is_file() and not source.is_fifo():
        raise DataError(f"{source}: no such file")
    target = document_prefix(Path(prefix))
    tally = _Tally()
    with publish_files(target, FILE_SUFFIXES, overwrite=overwrite) as folder:
        rejects = _Rejects(source, rejects_path(target), skip=options.on_bad_row == "skip")
        with rejects, DatasetWriter(folder, target.name) as writer, Progress("building", None, unit="rows") as progress:
            rows = read_rows(source, tally.read, encoding=options.encoding)
            records = _records(rows, options, rejects, tally)
            first = next(records, None)
            if first is None:
                rejects.check(tally.rows, options.max_bad)
            assert first is not None  # without a good row the check has raised
            encoder = _encoder_for(first[1], Path(tokenizer), options)
            rendered = _rendered(chain([first], records), encoder, rejects, tally)
            for chunk in _samples(rendered, encoder, rejects, options.chunk_rows):
                for sample in chunk:
                    writer.add(sample.tokens, sample.mask)
                progress.advance(len(chunk))
            rejects.check(tally.rows, options.max_bad)
        return writer.finish(_about(source, encoder, rejects, tally))


def rejects_path(target: Path) -> Path:
    """Return where the bad rows of the dataset `target` are written down."""
    return target.with_name(target.name.removesuffix(DOCUMENT_SUFFIX) + ".rejects.jsonl")


def _encoder_for(first: Record, tokenizer: Path, options: BuildOptions) -> Encoder:
    if isinstance(first, Document):
        return TextEncoder(tokenizer, end_token=options.end_token)
    if options.end_token is not None:
        raise UsageError("--end-token is for plain text; a chat template ends the turns of conversations itself")
    return ChatEncoder(tokenizer)


def _records(rows: Iterable[Row], options: BuildOptions, rejects: "_Rejects", tally: _Tally) -> Numbered[Record]:
    kind: type | None = None
    for row in rows:
        tally.rows += 1
        try:
            found = record(parse_row(row, encoding=options.encoding), merge_consecutive=options.merge_consecutive)
            if kind not in (None, type(found)):
                raise RowError("mixed", _mixed(found))
            kind = type(found)
        except RowError as error:
            rejects.add(row, error)
            continue
        tally.layouts[found.layout] += 1
        yield row, found


def _mixed(found: Record) -> str:
    words = ("plain text", "conversations") if isinstance(found, Document) else ("a conversation", "plain texts")
    return f"{words[0]} in a file of {words[1]}; a dataset holds one of them: build each from a file of its own"


def _rendered(
    records: Iterable[tuple[Row, Record]], encoder: Encoder, rejects: "_Rejects", tally: _Tally
) -> Numbered[Rendered]:
    for row, found in records:
        try:
            rendered = encoder.render(found)  # type: ignore[arg-type]  # _records keeps to the encoder's kind
        except RowError as error:
            rejects.add(row, error)
            continue
        tally.control_texts += rendered.num_control_texts
        tally.rows_with_control_text += rendered.num_control_texts > 0
        yield row, rendered


def _samples(
    rendered: Numbered[Rendered], encoder: Encoder, rejects: "_Rejects", chunk_rows: int
) -> Iterator[list[Sample]]:
    for chunk in _chunks(rendered, chunk_rows):
        samples = []
        for (row, _), sample in zip(chunk, encoder.encode([text for _, text in chunk]), strict=True):
            if isinstance(sample, RowError):
                rejects.add(row, sample)
            else:
                samples.append(sample)
        yield samples


def _chunks(rendered: Numbered[Rendered], chunk_rows: int) -> Iterator[list[tuple[Row, Rendered]]]:
    chunk, characters = [], 0
    for row, text in rendered:
        chunk.append((row, text))
        characters += len(text.text)
        if len(chunk) == chunk_rows or characters >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class _Rejects:
    """Bad rows: the first one stops the build, or each is written to `path` with its reason."""

    def __init__(self, source: Path, path: Path, *, skip: bool) -> None:
        self.reasons: Counter[str] = Counter()
        self._source, self._path, self._skip = source, path, skip
        self._first = ""
        self._file: TextIO | None = None

    def __enter__(self) -> "_Rejects":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file:
            self._file.close()
        elif kind is None:
            self._path.unlink(missing_ok=True)  # what an earlier build left there is not about this one

    def add(self, row: Row, error: RowError) -> None:
        """Raise DataError, or write the row down."""
        said = f"{self._source}:{row.line}: {error}"
        if not self._skip:
            raise DataError(f"{said} (mend it, or drop such rows with --on-bad-row skip)") from error
        self._first = self._first or said
        self.reasons[error.reason] += 1
        if self._file is None:
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115  closed by __exit__
        data = row.data.decode("utf-8", "replace").rstrip("\r\n") if isinstance(row.data, bytes) else row.data
        entry = {"line": row.line, "reason": error.reason, "message": str(error), "row": data}
        # Escaped, because a rejected row may hold what no encoding can write.
        self._file.write(json.dumps(entry, ensure_ascii=True) + "\n")

    def check(self, rows: int, max_bad: float) -> None:
        """Raise DataError when no row is left, or too many were bad."""
        bad = self.reasons.total()
        if not rows:
            raise DataError(f"{self._source}: the file has no rows")
        if bad > max_bad * rows or bad == rows:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
            raise DataError(
                f"{self._source}: {bad} of {rows} rows are bad ({bad / rows:.2%}, --max-bad allows {max_bad:.2%}): "
                f"{reasons}; all of them are in {self._path}; the first: {self._first}"
            )


def _about(source: Path, encoder: Encoder, rejects: _Rejects, tally: _Tally) -> dict[str, Any]:
    folder = encoder.tokenizer.folder.resolve()
    return {
        "tokenizer": {"name": folder.name, "folder": str(folder), "fingerprint": tokenizer_fingerprint(folder)},
        **encoder.about(),
        "input": {
            "name": source.name,
            "kind": tally.read.kind,
            "rows": tally.rows,
            "layouts": dict(sorted(tally.layouts.items())),
            "notes": dict(sorted(tally.read.notes.items())),
        },
        "control_text": {"texts": tally.control_texts, "rows": tally.rows_with_control_text},
        "dropped": dict(sorted(rejects.reasons.items())),
    }
