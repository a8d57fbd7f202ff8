"""Runs for a terminal: the list of them, and one with its curve and its lineage."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..foundation.progress import clock, human_bytes
from .lineage import chain, made_by_origin
from .plot import draw
from .record import FAILED, FINISHED, INTERRUPTED
from .runs import DAMAGE, DIED, SILENT, UNREADABLE, Run, Unreadable

WIDE, ENDLESS = 120, 10_000  # columns where nobody watches: of a picture, and of a line that must stay one
COLOURS = {FINISHED: "green", INTERRUPTED: "yellow", SILENT: "yellow", FAILED: "red", DIED: "red", UNREADABLE: "red"}
SETTINGS = ("seq_len", "global_batch_size", "lr")  # those that tell runs apart; all are in lineage.json
PERCENT = {"cpu_percent": "CPU", "gpu_percent": "GPU"}
DAY = 24 * 3600
GO_ON = "the same line goes on from the newest step that was saved"


def print_runs(runs: Sequence[Run | Unreadable], root: Path) -> None:
    """Print a line for each run, and beneath them why some cannot be read."""
    table = Table(box=None, pad_edge=False)
    for heading in ("state", "step", "loss", "tokens/s", "time", "seen", "host"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("step", "loss", "tokens/s") else "left")
    table.add_column("out", overflow="fold")
    table.add_column("name", overflow="fold")
    for run in runs:
        place = _relative(run.folder.parent.parent, root)
        cells = _cells(run) if isinstance(run, Run) else [""] * 6
        table.add_row(_state(run), *cells, Text(place), Text(run.name))
    target = _console(ENDLESS)
    target.print(table)
    for run in runs:
        if isinstance(run, Unreadable):
            target.print(f"{run.folder}: run.json {run.problem}", markup=False, soft_wrap=True)


def print_run(run: Run, lineage: Mapping[str, Any] | str) -> None:
    """Print all that is known of a run; `lineage` is its document, or why there is none."""
    target = _console(WIDE)
    target.print(Text.assemble(_state(run), f"  {run.name}", f"  {_progress(run)}"), soft_wrap=True)
    for line in draw(run.losses, run.validation, width=target.width):
        target.print(line, markup=False, soft_wrap=True)
    try:
        lines = [f"{name:<10} {text}" for name, text in _facts(run)]
    except DAMAGE as error:
        lines = [f"run.json is damaged: {error!r}"]
    for line in [*lines, "", "lineage, from the first base and data on", *_chain_lines(lineage)]:
        target.print(line, markup=False, soft_wrap=True)


def _console(width: int) -> Console:
    """Return where to print to: a terminal is as wide as it is; NO_COLOR and a pipe forbid colours."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=width)


def _cells(run: Run) -> list[str]:
    return [
        f"{run.step}/{run.steps}",
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.rate is None else f"{run.rate:,.0f}",
        _time(run),
        f"{_age(run.updated)} ago",
        str(run.process.host),
    ]


def _time(run: Run) -> str:
    if not run.is_active:
        return f"took {clock(run.took)}"
    return f"{clock(run.eta)} left" if run.eta is not None else f"{_age(run.started)} so far"


def _progress(run: Run) -> str:
    said = [f"step {run.step} of {run.steps}", _time(run)]
    if run.is_active:
        said.append(f"last progress {_age(run.progressed)} ago")
    return ", ".join(said)


def _state(run: Run | Unreadable) -> Text:
    return Text(run.state, COLOURS.get(run.state, "cyan"))


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    content = run.content
    if run.loss is not None:
        lowest = "" if run.lowest_loss is None else f", lowest {run.lowest_loss:.6f}"
        validation = f", validation {run.validation[-1][1]:.6f} (o)" if run.validation else ""
        yield "loss", f"{run.loss:.6f}{lowest}{validation}"
    if run.rate is not None:
        yield "speed", f"{run.rate:,.0f} tokens/s, {content.get('trained_tokens', 0):,} tokens trained on"
    layout = content.get("layout", {})
    yield (
        "layout",
        f"{layout.get('text')} on {layout.get('ranks')} x {content.get('device')}, {content.get('precision')}",
    )
    yield "process", f"{run.process.pid} on {run.process.host}, started {run.started:%Y-%m-%d %H:%M:%S} UTC"
    yield "uses", _use(content.get("use", {}))
    yield "versions", ", ".join(f"{name} {version}" for name, version in content.get("versions", {}).items())
    yield "commit", content.get("commit") or "no checkout"
    yield "folder", str(run.folder)
    yield "log", str(content.get("log", "none yet"))
    yield "line", str(content.get("line"))
    yield from _end(run)


def _use(use: Mapping[str, Any]) -> str:
    said = [f"rank 0 {human_bytes(use['rank_bytes'])}"] if "rank_bytes" in use else []
    if "machine_bytes" in use:
        said.append(f"its machine {human_bytes(use['machine_bytes'])} of {human_bytes(use['machine_total_bytes'])}")
    if "gpu_bytes" in use:
        said.append(f"its GPU {human_bytes(use['gpu_bytes'])} of {human_bytes(use['gpu_total_bytes'])}")
    said += [f"{use[name]:.0f}% {label}" for name, label in PERCENT.items() if name in use]
    return ", ".join(said)


def _end(run: Run) -> Iterator[tuple[str, str]]:
    """Say how it ended and what to do next."""
    ending = run.content.get("ending")
    if ending:
        yield "ended", f"{ending['kind']}, exit code {ending['exit_code']}: {ending['message']}"
    if run.state == DIED:
        yield "ended", f"process {run.process.pid} is gone and left no word: killed, or the machine went down"
    if run.state == SILENT:
        yield "silent", f"{run.process.host} wrote nothing for {_age(run.updated)}; look there for {run.process.pid}"
    if run.state in (DIED, INTERRUPTED):
        yield "next", GO_ON
    if run.state == FAILED:
        yield "next", f"mend what the message says, look into the log; {GO_ON}"


def _chain_lines(lineage: Mapping[str, Any] | str) -> list[str]:
    if isinstance(lineage, str):
        return [lineage]
    try:
        documents = chain(lineage)
        return [line for document in documents for line in _document_lines(document)]
    except DAMAGE as error:
        return [f"lineage.json is damaged: {error!r}"]


def _document_lines(document: Mapping[str, Any]) -> Iterator[str]:
    base, run = document["base"], document["run"]
    yield f"base    {_base(base)}"
    for start in document["starts"]:
        for data in start["data"]:
            yield f"data    {_data(data)}"
        settings = ", ".join(f"{name} {start['settings'][name]}" for name in SETTINGS)
        after = f" going on after {start['after']}" if start["after"] else ""
        layout = f"{start['layout']['text']}, {start['precision']}"
        yield f"run     {run['name']}{after}: {settings}, {layout}, {run['folder']}"
    for step in document["steps"]:
        yield f"step    {step['folder']}, manifest sha256 {str(step['manifest'])[:16]}"
    for export in document["exports"]:
        files = ", ".join(f"{name} sha256 {file['sha256'][:16]}" for name, file in export["files"].items())
        yield f"export  {export['folder']} of {export['step']}, {files}"


def _base(base: Mapping[str, Any]) -> str:
    if base["kind"] == "random":
        return f"random weights with the config of {base['path']}, {base['digest']}"
    said = f"{base['path']} ({base['kind']}), digest {base['digest']}, config {base['config']}"
    if not base["origin"]:
        return f"{said}, tokenizer {base['tokenizer']}"
    made = made_by_origin(base)
    name = base["origin"]["run"]["name"]
    if made is None:
        return f"{said}: from run {name}, converted or changed since"
    return f"{said}: {made['folder']} of run {name}, unchanged"


def _data(data: Mapping[str, Any]) -> str:
    counts = f"{data['rows']:,} rows, {data['tokens']:,} tokens, {data['trained_tokens']:,} of them trained on"
    uses, manifest = " and ".join(data["uses"]), data["manifest"]
    if not manifest:
        return f"{data['path']} for {uses}: {counts}; no manifest"
    source, digest = manifest["input"]["name"], manifest["files"][".bin"]["sha256"][:16]
    return f"{data['path']} for {uses}: {counts}; made of {source}, tokens sha256 {digest}"


def _age(then: datetime) -> str:
    seconds = max(0.0, (datetime.now(UTC) - then).total_seconds())
    return f"{seconds / DAY:.0f} days" if seconds > 2 * DAY else clock(seconds)


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
