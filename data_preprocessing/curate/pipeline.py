"""Files of rows -> the rows that stay, the rows that go with the reason of each, and what every step did.

    survey    every row is read: judges decide about it, choosers remember a little of it
    decide    the steps in their order, on arrays: which rows stay
    write     every row is read again, and copied to OUT, to one of its siblings, or to the rejects

Memory holds a few numbers for each row, never its text. The result depends on the input and the steps alone.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from toolkits.foundation.errors import DataError, UsageError
from toolkits.foundation.publish import publish_files, require_space

from ..rejects import Rejects
from ..row_error import RowError
from ..rows import Row
from .output import Output, changing_facts, input_files, line_of
from .split import Split, Splitter
from .step import Choice, Chooser, Judge, Resources, Step, Verdict
from .steps import spelled
from .survey import BAD, STAYS, ReadOptions, Survey, batches_with_progress

READING = "reading"  # what stands for the step in the rejects of bad rows


@dataclass
class Fates:
    """What becomes of each row: `step` that drops it, BAD or STAYS; the row `because` of which; its `part`, [rows].

    `counts` are the rows in front of and behind each step, `said` what a step of choosers says of those it drops,
    `largest` the size of the largest group that a split kept together.
    """

    step: np.ndarray
    because: np.ndarray
    part: np.ndarray
    counts: list[tuple[int, int]] = field(default_factory=list)
    said: dict[int, Choice] = field(default_factory=dict)
    largest: int = 0


def filter_rows(
    inputs: Sequence[Path | str],
    target: Path,
    *,
    steps: Sequence[Step],
    split: Split | None = None,
    resources: Resources | None = None,
    options: ReadOptions | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the rows of `inputs` that stay to `target`, as they are, and return the report.

    Beside it (see `Output`): every other row with the step that dropped it and its reason, the report, and the parts
    of a split. Raises DataError for bad rows and when no row stays, UsageError when there is nothing to do or the
    output exists.
    """
    if not steps and split is None:
        raise UsageError("nothing to do: give --step, --split or --recipe; --list-steps says which steps there are")
    resources, options = resources or Resources(), options or ReadOptions()
    output = Output.of(target, [name for name, _ in split.shares] if split else [])
    sources = input_files(inputs, output)
    stale = output.old_files().difference(output.files)
    work = _Filter(sources, steps, split, resources, options)
    with publish_files(output.stem, output.suffixes, overwrite=overwrite) as folder:
        require_space(target.parent, sum(path.stat().st_size for path in sources))
        report = work.through(output.within(folder))
    for path in stale:
        path.unlink(missing_ok=True)  # part of a split that stood here before
    return report


class _Filter:
    """Two passes over the rows, and the decision between them."""

    def __init__(
        self,
        sources: Sequence[Path],
        steps: Sequence[Step],
        split: Split | None,
        resources: Resources,
        options: ReadOptions,
    ) -> None:
        self._sources, self._steps, self._split, self._options = sources, steps, split, options
        self._resources, self._workers = resources, [step.start(resources) for step in steps]
        self._splitter = Splitter(split, resources) if split else None
        self._survey = Survey(sources, options)

    def through(self, output: Output) -> dict[str, Any]:
        """Write all files and return the report."""
        facts = changing_facts(self._sources)
        self._survey.run(self._workers, self._splitter)
        fates = self._decided()
        reasons = self._write(fates, output)
        if changing_facts(self._sources) != facts:
            names = ", ".join(map(str, self._sources))
            raise DataError(f"{names}: the input changed while it was read; start again when it is complete")
        report = self._report(fates, reasons, output)
        output.write_report(report)
        return report

    def _decided(self) -> Fates:
        survey = self._survey
        judged = np.array(survey.judged, np.int16)
        rows = np.flatnonzero(judged != BAD)
        count = len(judged)
        fates = Fates(np.where(judged == BAD, BAD, STAYS), np.full(count, -1), np.zeros(count, np.int8))
        for number, worker in enumerate(self._workers):
            before = len(rows)
            if isinstance(worker, Chooser) and before:
                choice = worker.choose(rows)
                kept = choice.kept
                fates.because[rows[~kept]] = choice.because[~kept]
                fates.said[number] = choice
            else:
                kept = judged[rows] != number
            fates.step[rows[~kept]] = number
            rows = rows[kept]
            fates.counts.append((before, len(rows)))
        if not len(rows):
            did = "; ".join(f"{spelled(step)} left {fates.counts[at][1]:,}" for at, step in enumerate(self._steps))
            raise DataError(f"no row stays of {count:,}: {did}; loosen a step")
        if self._splitter:
            fates.part[rows], groups = self._splitter.parts(rows)
            fates.largest = int(np.unique(groups, return_counts=True)[1].max())
        return fates

    def _write(self, fates: Fates, output: Output) -> list[Counter[str]]:
        """Copy every row to where it belongs; return how often each step gave each reason."""
        reasons: list[Counter[str]] = [Counter() for _ in self._steps]
        rows = chain.from_iterable(batches_with_progress("writing rows", self._sources, self._options))
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in output.files]
            rejects = stack.enter_context(Rejects(self._sources, output.rejects, skip=True, state=None))
            for number, row in enumerate(rows):
                if number == len(fates.step):
                    break  # there are more of them now: whoever called sees that
                step = int(fates.step[number])
                if step == STAYS:
                    files[fates.part[number]].write(line_of(row, self._options.encoding))
                elif step == BAD:
                    verdict = self._fault(number, row)
                    rejects.drop(row, step=READING, reason=verdict.reason, message=verdict.message)
                else:
                    verdict = self._verdict(fates, number, row)
                    reasons[step][verdict.reason] += 1
                    said = spelled(self._steps[step])
                    rejects.drop(row, step=said, reason=verdict.reason, message=verdict.message)
        output.rejects.touch()  # nothing dropped is a list of nothing
        return reasons

    def _fault(self, number: int, row: Row) -> Verdict:
        try:
            self._options.facts(number, row)
        except RowError as error:
            return Verdict(error.reason, str(error))
        return Verdict("changed", "bad when it was read first")  # whoever called sees that the file changed

    def _verdict(self, fates: Fates, number: int, row: Row) -> Verdict:
        """Return what a step said of a row that it dropped: a judge says the same again."""
        step = int(fates.step[number])
        worker = self._workers[step]
        if isinstance(worker, Judge):
            verdict = worker.judge([self._options.facts(number, row)])[0]
            return verdict or Verdict("changed", "refused when it was read first")
        choice, because = fates.said[step], int(fates.because[number])
        other = self._survey.place(because) if because >= 0 else ""
        return Verdict(choice.reason, choice.message.format(other=other))

    def _report(self, fates: Fates, reasons: Sequence[Counter[str]], output: Output) -> dict[str, Any]:
        survey = self._survey
        stayed = np.bincount(fates.part[fates.step == STAYS], minlength=len(output.files)).tolist()
        report: dict[str, Any] = {
            "input": {
                "files": list(map(str, self._sources)),
                "kind": survey.report.kind,
                "rows": len(survey),
                "layouts": dict(sorted(survey.layouts.items())),
                "notes": dict(sorted(survey.report.notes.items())),
            },
            "bad_rows": dict(sorted(survey.bad.reasons.items())),
            "steps": [
                {"step": spelled(step), "in": before, "out": after, "dropped": dict(sorted(why.items()))}
                for step, (before, after), why in zip(self._steps, fates.counts, reasons, strict=True)
            ],
            "output": {path.name: count for path, count in zip(output.files, stayed, strict=True)},
            "dropped": int((fates.step != STAYS).sum()),
        }
        if self._resources.model:
            report["embedded_by"] = self._resources.model
        if self._split:
            report["split"] = {**self._split.about(), "largest_group": fates.largest}
        return report
