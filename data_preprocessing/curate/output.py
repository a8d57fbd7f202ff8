"""Where a command that makes rows of rows writes: OUT, its siblings, and lines that say what the rows said."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkits.foundation.errors import UsageError

from ..reading import find_inputs
from ..rejects import rejects_path
from ..rows import STDIN, Row

OTHER_FORMATS = (".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")


@dataclass(frozen=True)
class Output:
    """OUT and the files beside it: OUT.rejects.jsonl, OUT.report.json, and for `rows.jsonl` parts as rows.valid.jsonl.

    All of their names begin with `stem`. A dataset that is built of rows.jsonl as `rows` has no file of the same name.
    """

    stem: Path
    ending: str  # of OUT: .jsonl or nothing
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, target: Path, parts: Sequence[str] = ()) -> "Output":
        """Return the files for `target`; UsageError for a name that promises another format."""
        if target.suffix in OTHER_FORMATS:
            raise UsageError(f"{target}: the output is JSONL, one row a line; call it {target.stem}.jsonl")
        ending = ".jsonl" if target.suffix == ".jsonl" else ""
        return cls(target.with_name(target.name.removesuffix(ending)), ending, tuple(parts))

    def within(self, folder: Path) -> "Output":
        """Return the same files in another folder."""
        return replace(self, stem=folder / self.stem.name)

    @property
    def suffixes(self) -> list[str]:
        """What follows `stem`, OUT itself last."""
        beside = [path.name.removeprefix(self.stem.name) for path in (self.rejects, *self.files[1:], self.report)]
        return [*beside, self.ending]

    @property
    def files(self) -> list[Path]:
        """OUT, and the files of the parts."""
        return [self._named(self.ending), *(self._named(f".{part}.jsonl") for part in self.parts)]

    @property
    def rejects(self) -> Path:
        """Where rows that are dropped are written down."""
        return rejects_path(self.files[0])

    @property
    def report(self) -> Path:
        """Where what was done is written down."""
        return self._named(self.ending + ".report.json")

    def old_files(self) -> set[Path]:
        """Return the files of rows that stand where this output goes, as their report names them."""
        try:
            names = json.loads(self.report.read_text(encoding="utf-8"))["output"]
        except (OSError, ValueError, KeyError, TypeError):
            return set()
        ours = [name for name in names if name.startswith(self.stem.name) and Path(name).name == name]
        return {self.stem.with_name(name) for name in ours}

    def write_report(self, report: dict[str, Any]) -> None:
        """Write the report beside OUT."""
        self.report.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def _named(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)


def input_files(said: Sequence[Path | str], output: Output) -> list[Path]:
    """Return the input files; UsageError for one that cannot be read twice, or that would be written over."""
    sources = find_inputs(said)
    for source in sources:
        if source == STDIN or not source.is_file():
            raise UsageError(f"{source}: the input is read twice, which a pipe cannot be; put it into a file first")
    targets = {path.resolve() for path in (*output.files, output.rejects, output.report)}
    same = [str(source) for source in sources if source.resolve() in targets]
    if same:
        raise UsageError(f"{', '.join(same)}: the input would be written over; choose another output")
    return sources


def line_of(row: Row, encoding: str) -> bytes:
    """Return a row as a line of JSONL in UTF-8: its own bytes where it came as one, else the same value."""
    if isinstance(row.data, bytes):
        line = row.data.rstrip(b"\r\n")
        return (line if encoding.lower() in ("utf-8", "utf8") else line.decode(encoding).encode()) + b"\n"
    try:
        return json.dumps(row.data, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a key that no step looks at
        return json.dumps(row.data, default=str).encode() + b"\n"


def changing_facts(sources: Sequence[Path]) -> list[tuple[int, int]]:
    """Return of each file what is another one when it was changed: size and time."""
    return [(path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
