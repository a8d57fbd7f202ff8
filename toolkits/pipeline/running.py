"""Run the stages of a pipeline that are not done, one after the other, by the lines that a user would type."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from ..foundation.errors import InterruptedRun, UsageError, raise_all
from ..foundation.lock import locked
from .child import Lines
from .stage import REPLACED, Pipeline, Stage, shown, typed
from .state import CHANGED, GONE, WAITING, State, Verdict


def run_pipeline(pipeline: Pipeline, *, only: str | None, redo: Sequence[str], dry: bool, again: str) -> None:
    """Run what is not done; `only` one stage, and `redo` some and all that rests on them; `dry` says what it would do.

    `again` is the line that goes on. Raises UsageError for stages that changed since they were done, SystemExit with
    the code of a stage that fails, InterruptedRun when one was stopped and the same line goes on.
    """
    _check_names(pipeline, [*redo, *([only] if only else [])])
    if dry:
        _run(State(pipeline), only=only, redo=redo, dry=True, again=again)
        return
    with locked(lock_of(pipeline), what=shown(pipeline.output)):
        _run(State(pipeline), only=only, redo=redo, dry=False, again=again)


def lock_of(pipeline: Pipeline) -> Path:
    """Return the file that whoever runs the pipeline holds."""
    return pipeline.output.with_name(f".lock-{pipeline.output.name}")


def _check_names(pipeline: Pipeline, names: Sequence[str]) -> None:
    known = [stage.name for stage in pipeline.stages]
    wrong = [name for name in names if name not in known]
    raise_all(
        UsageError, f"{pipeline.file}: it has {', '.join(known)}", [f"no stage is called {name}" for name in wrong]
    )


def _run(state: State, *, only: str | None, redo: Sequence[str], dry: bool, again: str) -> None:
    pipeline = state.pipeline
    anew = pipeline.resting_on(set(redo)) if redo else []
    stages = [pipeline.stage(only)] if only else list(pipeline.stages)
    kept = [stage for stage in pipeline.stages if stage not in anew]
    _refuse_changed(state, [stage for stage in kept if not only or stage in stages])
    if only:
        _refuse_unmade(state, pipeline.stage(only))
    for stage in anew:
        _move_aside(state, stage, dry=dry)
    lines = Lines()
    with lines.heeding_signals():
        for stage in stages:
            _stage(state, stage, lines, dry=dry, is_anew=stage in anew, again=again)


def _refuse_changed(state: State, stages: Sequence[Stage]) -> None:
    """Raise UsageError for stages that are done and would make something else today."""
    changed = [(stage, verdict) for stage in stages if (verdict := state.judge(stage)).state == CHANGED]
    if not changed:
        return
    pipeline = state.pipeline
    words = []
    for stage, verdict in changed:
        words += [f"{stage.name} is done, and has changed since:", *(f"  {problem}" for problem in verdict.problems)]
    names = [stage.name for stage, _ in changed]
    resting = [stage.name for stage in pipeline.resting_on(set(names)) if stage.name not in names]
    flags = " ".join(f"--redo {name}" for name in names)
    rests = f", and so do {', '.join(resting)}, which rest on it" if resting else ""
    where = shown(pipeline.output / REPLACED)
    words.append(
        f"With {flags} it runs again{rests}; what they made goes to {where}. Or say what was said before, or choose"
        " another output"
    )
    raise UsageError("\n".join(words))


def _refuse_unmade(state: State, stage: Stage) -> None:
    unmade = [name for name in stage.makers if not state.judge(state.pipeline.stage(name)).is_done]
    if unmade:
        raise UsageError(f"--only {stage.name}: it reads what {', '.join(unmade)} has not made yet; run that first")


def _move_aside(state: State, stage: Stage, *, dry: bool) -> None:
    if dry:
        return
    if not stage.folder.exists():
        state.forget(stage)
        return
    parent = state.pipeline.output / REPLACED
    parent.mkdir(parents=True, exist_ok=True)
    free = (parent / f"{stage.name}-{number}" for number in range(1, 10_000))
    target = next(path for path in free if not path.exists())
    os.replace(stage.folder, target)
    state.forget(stage)  # not before: killed in between, it must not find its old folder and take it for new
    click.echo(f"{stage.name}: what it made is now {shown(target)}")


def _stage(state: State, stage: Stage, lines: Lines, *, dry: bool, is_anew: bool, again: str) -> None:
    stages = state.pipeline.stages
    title = f"{stage.name} ({stages.index(stage) + 1} of {len(stages)})"
    verdict = Verdict("to be made anew") if dry and is_anew else state.judge(stage)
    if verdict.is_done:
        click.echo(f"{title}: done, {shown(stage.result if stage.kind.makes else stage.folder)}")
        return
    if dry:
        why = f" ({verdict.state})" if verdict.state in (GONE, WAITING) or is_anew else ""
        click.echo(click.style(f"{title}: would run{why}", bold=True))
        for line in stage.lines():
            click.echo(f"  {typed(line)}")
        return
    if verdict.state == CHANGED:  # what it reads was made anew, and is something else
        _refuse_changed(state, [stage])
    click.echo(click.style(f"\n{title}: {stage.kind.word}", bold=True))
    if verdict.problems:
        click.echo(f"{'; '.join(verdict.problems)}: it runs again")
    stage.folder.mkdir(parents=True, exist_ok=True)
    state.started(stage)
    code = 0
    for line in stage.lines():
        click.echo(click.style(f"$ {typed(line)}", bold=True))
        code = lines.run(line)
        if code:
            break
    interrupted = code == InterruptedRun.exit_code or (code != 0 and lines.signalled)
    state.ended(stage, code, interrupted=interrupted)
    if code == 0 and stage.kind.word == "generate":
        from .answers import show_answers

        show_answers(stage)
    _stop(stage, code, lines, interrupted=interrupted, again=again)


def _stop(stage: Stage, code: int, lines: Lines, *, interrupted: bool, again: str) -> None:
    """Raise what ends the pipeline behind a stage, if anything does."""
    if interrupted:
        raise InterruptedRun(f"{stage.name} was interrupted; the same line goes on with it: {again}")
    if code:  # no error of ours, whatever the code: the stage has said what is wrong
        said = (
            f"error: {stage.name} ended with exit code {code}; its own message is above. Mend that, and the same line"
        )
        print(f"{said} goes on with it: {again}", file=sys.stderr, flush=True)
        raise SystemExit(code)
    if lines.signalled:
        raise InterruptedRun(f"stopped behind {stage.name}; the same line goes on: {again}")
