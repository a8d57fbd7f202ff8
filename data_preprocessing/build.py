"""Files of rows -> a dataset on disk.

    read_batches -> chunks_of -> finished_chunks -> DatasetWriter

Every stage is a generator, so memory stays flat. The first good row says which kind of rows the files hold. A bad
row stops the build, or is written down. The result depends neither on the size of the chunks, nor on the encoder,
nor on the number of processes, nor on how often the build was killed and started again.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from toolkits.foundation.progress import Progress
from toolkits.foundation.publish import publish_files

from .chunks import KIND_OF, BuildOptions, ChunkWork, Finished, chunks_of, read_record
from .dataset import ABOUT_SUFFIX, Kind, document_prefix, file_suffixes, sibling
from .reading import ReadReport, find_inputs, read_batches
from .rejects import Rejects, rejects_path
from .row_error import RowError
from .rows import STDIN, Rows
from .unfinished import Unfinished
from .workers import finished_chunks
from .writer import DatasetWriter, toolkit_version

__all__ = ["BuildOptions", "build"]

SMALL = 4_000_000  # bytes of input below which tokenizers is done before fastokens is built
SPEED_ONLY = ("encoder", "workers", "chunk_rows", "save_seconds")  # options that never change the result


@dataclass
class _Tally:
    """What a build counts on the way."""

    rows: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    control_texts: int = 0
    rows_with_control_text: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "_Tally":
        return cls(**{**state, "layouts": Counter(state["layouts"])})

    def state(self) -> dict[str, Any]:
        return {**vars(self), "layouts": dict(self.layouts)}

    def add(self, done: Finished) -> None:
        self.rows += done.num_rows
        self.layouts.update(done.layouts)
        self.control_texts += done.control_texts
        self.rows_with_control_text += done.rows_with_control_text


def build(
    input: Path | str | Sequence[Path | str],
    prefix: Path | str,
    *,
    tokenizer: Path | str,
    overwrite: bool = False,
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Write the dataset `prefix` from the rows of one or several files and return its manifest.

    `input` is a path, a pattern, `-` for stdin, or a list of these; `tokenizer` a HuggingFace folder. Bad rows go to
    PREFIX.rejects.jsonl when `options` skip them. A build that was killed goes on where it was. Raises DataError for
    bad input, UsageError when the dataset exists or another process is building it.
    """
    sources = find_inputs([input] if isinstance(input, str | Path) else input)
    options, tokenizer, target = options or BuildOptions(), Path(tokenizer), document_prefix(Path(prefix))
    report = ReadReport()
    kind, batches = kind_of(read_batches(sources, report, encoding=options.encoding), options)
    if kind is None:
        _refuse_all(sources, target, batches, options)
    options = with_encoder(options, sources)
    work = ChunkWork(kind, tokenizer, options)
    suffixes, job = file_suffixes(kind), _job(sources, work)
    unfinished = Unfinished(job, rejects_path(target), seconds=options.save_seconds)
    with publish_files(target, suffixes, overwrite=overwrite, keeps=unfinished.keeps) as folder:
        run = _Run(sources, target, options, unfinished, folder)
        chunks = chunks_of(batches, chunk_rows=options.chunk_rows, skip=run.tally.rows)
        manifest = run.through(finished_chunks(chunks, work, kind, tokenizer, options), work, report)
    if ABOUT_SUFFIX not in suffixes:
        sibling(target, ABOUT_SUFFIX).unlink(missing_ok=True)  # of the dataset that stood here before
    return manifest


class _Run:
    """From finished chunks to a complete set of files in `folder`."""

    def __init__(
        self, sources: Sequence[Path], target: Path, options: BuildOptions, unfinished: Unfinished, folder: Path
    ) -> None:
        self._sources, self._target, self._options = sources, target, options
        self._unfinished, self._folder, self._state = unfinished, folder, unfinished.state
        self.tally = _Tally.of(self._state["tally"]) if self._state else _Tally()

    def through(self, finished: Iterator[Finished], work: ChunkWork, report: ReadReport) -> dict[str, Any]:
        """Write all chunks and return the manifest."""
        state, tally, options = self._state or {}, self.tally, self._options
        skip, path = options.on_bad_row == "skip", rejects_path(self._target)
        rejects = Rejects(self._sources, path, skip=skip, state=state.get("rejects"))
        before, begun, total = tally.rows, time.monotonic(), bytes_of(self._sources)
        with (
            rejects,
            DatasetWriter(self._folder, self._target.name, state=state.get("writer")) as writer,
            Progress("building", total, unit="B" if total else "rows") as progress,
        ):
            for done in finished:
                for row, error in done.rejects:
                    rejects.add(row, error)
                writer.add_rows(done.tokens, done.mask, done.lengths, done.about)
                tally.add(done)
                rate = f"{(tally.rows - before) / (time.monotonic() - begun):,.0f} rows/s"
                amount = report.bytes_read - progress.done if total else done.num_rows
                progress.advance(amount, beside=rate if total else "")
                if self._unfinished.is_due:
                    self._save(writer, rejects)
            rejects.check(tally.rows, options.max_bad)
            progress.advance(total - progress.done if total else 0)
            self._unfinished.remove(self._folder)
            return writer.finish(_about(self._sources, work, rejects, tally, report))

    def _save(self, writer: DatasetWriter, rejects: Rejects) -> None:
        written, rejected = writer.save(), rejects.save()
        sizes = {self._target.name + suffix: size for suffix, size in written["bytes"].items()}
        self._unfinished.save(
            self._folder,
            rows=self.tally.rows,
            sizes=sizes,
            rejects=rejected["bytes"],
            state={"tally": self.tally.state(), "writer": written, "rejects": rejected},
        )


def kind_of(batches: Iterator[Rows], options: BuildOptions) -> tuple[Kind | None, Iterator[Rows]]:
    """Return which kind the first good row is of, and all rows again; None when a bad one stops the build first."""
    seen = []
    for batch in batches:
        seen.append(batch)
        for row in batch:
            try:
                return KIND_OF[type(read_record(row, options))], chain(seen, batches)
            except RowError:
                if options.on_bad_row == "stop":
                    return None, chain(seen, batches)
    return None, iter(seen)


def with_encoder(options: BuildOptions, sources: Sequence[Path]) -> BuildOptions:
    """Return the options with the encoder that is done first with `sources`, where it is ours to choose."""
    if options.encoder == "auto" and (bytes_of(sources) or SMALL) < SMALL:
        return replace(options, encoder="tokenizers")
    return options


def _refuse_all(sources: Sequence[Path], target: Path, batches: Iterator[Rows], options: BuildOptions) -> NoReturn:
    """Raise DataError for files without a good row, with their bad ones written down where that is asked for."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Rejects(sources, rejects_path(target), skip=options.on_bad_row == "skip", state=None) as rejects:
        count = 0
        for row in chain.from_iterable(batches):
            count += 1
            try:
                read_record(row, options)
            except RowError as error:
                rejects.add(row, error)
        rejects.check(count, options.max_bad)
    raise AssertionError("a good row was there after all")


def _job(sources: Sequence[Path], work: ChunkWork) -> dict[str, Any] | None:
    """Return everything that decides the result; None when the input cannot be read twice."""
    if any(path == STDIN or not path.is_file() for path in sources):
        return None
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    options = {key: value for key, value in asdict(work.options).items() if key not in SPEED_ONLY}
    return {
        "input": facts,
        "options": options,
        "encoding": work.about(),
        "tokenizer": work.encoder.tokenizer.identity,
        "version": toolkit_version(),
    }


def bytes_of(sources: Sequence[Path]) -> int | None:
    if any(path == STDIN or not path.is_file() for path in sources):
        return None
    return sum(path.stat().st_size for path in sources)


def _about(
    sources: Sequence[Path], work: ChunkWork, rejects: Rejects, tally: _Tally, report: ReadReport
) -> dict[str, Any]:
    tokenizer = work.encoder.tokenizer
    folder = tokenizer.folder.resolve()
    return {
        "tokenizer": {"name": folder.name, "folder": str(folder), "fingerprint": tokenizer.fingerprint},
        **work.about(),
        "input": {
            "name": ", ".join("stdin" if path == STDIN else path.name for path in sources),
            "kind": report.kind,
            "rows": tally.rows,
            "layouts": dict(sorted(tally.layouts.items())),
            "notes": dict(sorted(report.notes.items())),
        },
        "control_text": {"texts": tally.control_texts, "rows": tally.rows_with_control_text},
        "dropped": dict(sorted(rejects.reasons.items())),
    }
