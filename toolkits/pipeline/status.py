"""How a pipeline stands, and the chain from its last checkpoint back to the first base."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..foundation.errors import TemperError
from ..monitoring.lineage import chain, made_by_origin
from ..monitoring.record import LINEAGE
from .digests import digest_of
from .running import lock_of
from .stage import File, Pipeline, Stage, shown
from .state import DONE, RUNNING, State, is_locked


def status_lines(pipeline: Pipeline) -> Iterator[str]:
    """Yield a line for each stage, what it was made of, and the lineage of the last checkpoint."""
    state = State(pipeline)
    running = is_locked(lock_of(pipeline))
    width = max(len(stage.name) for stage in pipeline.stages)
    kinds = max(len(stage.kind.word) for stage in pipeline.stages)
    for stage in pipeline.stages:
        verdict, entry = state.judge(stage), state.entry(stage)
        said = "died" if verdict.state == RUNNING and not running else verdict.state
        said += f" with exit code {entry['exit_code']}" if entry.get("exit_code") else ""
        made = f"  {shown(stage.result if stage.kind.makes else stage.folder)}" if verdict.state == DONE else ""
        digest = f"  {entry['digest']}" if verdict.state == DONE else ""
        yield f"{stage.name:<{width}}  {stage.kind.word:<{kinds}}  {said}{made}{digest}"
        yield from (f"{'':<{width}}    {problem}" for problem in verdict.problems)
        for name, files in stage.files.items():
            for file in files:
                yield f"{'':<{width}}    {name}: {file.maker or file.shown}  {_digest(file)}"
    for name in state.left_over:
        yield f"{name}: ran once and is no longer in {pipeline.file.name}; its output is kept"
    yield from _lineage(pipeline)


def lineage_of(stage: Stage) -> dict[str, Any] | None:
    """Return the lineage of a stage that trains; None when there is none to read yet."""
    try:
        found = json.loads((run_folder(stage) / LINEAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def run_folder(stage: Stage) -> Path:
    """Return the folder of the run of a stage that trains."""
    return stage.folder / "checkpoint" / stage.name


def _lineage(pipeline: Pipeline) -> Iterator[str]:
    trained = [stage for stage in pipeline.stages if stage.kind.makes == "checkpoint"]
    newest = next((found for stage in reversed(trained) if (found := lineage_of(stage)) is not None), None)
    if newest is None:
        return
    yield "lineage, from the first base:"
    documents = chain(newest)
    yield f"  {_base(documents[0])}"
    for document in documents:
        export = (document["exports"] or [{"digest": "not exported yet"}])[-1]
        broken = "" if document["base"]["origin"] is None or made_by_origin(document["base"]) else _BROKEN
        yield f"  -> {document['run']['name']}  {export['digest']}  made of {document['base']['digest']}{broken}"


_BROKEN = " (which is not what the run before made: it was changed in between)"


def _base(document: Mapping[str, Any]) -> str:
    return f"{shown(Path(document['base']['path']))}  {document['base']['digest']}"


def _digest(file: File) -> str:
    try:
        return digest_of(file)
    except (OSError, TemperError, KeyError, ValueError):
        return "not made yet"
