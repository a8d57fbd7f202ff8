"""What a run says: a line a step, metrics.jsonl, trackers, run.json, and a picture of the loss."""

import contextlib
import dataclasses
import json
import math
import resource
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from ..foundation.errors import InterruptedRun
from ..foundation.progress import clock, human_bytes
from ..foundation.publish import write_text
from ..monitoring.series import Series
from ..monitoring.trackers import Tracker
from .watch import Watch

LOSS_PICTURE = "loss.png"
METRICS = "metrics.jsonl"
# What of an objective's figures is drawn beside the loss: a diagram's title and its lines.
PICTURED = {
    "reward": ("rewards/chosen", "rewards/rejected", "margin"),
    "share of pairs": ("accuracy", "falling"),
}


@dataclass(frozen=True)
class StepFigures:
    """The figures of one optimizer step over all ranks."""

    step: int  # from 1
    loss: float  # mean over the trained tokens of the global batch
    learning_rate: float
    grad_norm: float | None  # before clipping; None: fp16 overflowed and the step was skipped
    tokens: int  # without padding
    trained_tokens: int
    seconds: float
    more: Mapping[str, float] = field(default_factory=dict)  # what the objective measures beside, by name

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def flat(self) -> dict[str, Any]:
        """Return all figures by name, as metrics.jsonl has them."""
        fixed = dataclasses.asdict(self)
        return {**fixed, **fixed.pop("more")}


@dataclass
class Reporter:
    """Speaks for rank 0, which has a `watch`; the other ranks only note what goes wrong.

    `log` is shared by all ranks, so that the one that fails can leave its traceback there. `history` has
    the steps of this start; `losses`, `validation` and `rates` are of the whole run.
    """

    steps: int
    log: Path
    folder: Path  # of the run: metrics.jsonl and loss.png
    watch: Watch | None = None
    trackers: list[Tracker] = field(default_factory=list)
    first_step: int = 0  # steps that were taken by earlier starts of this run
    history: list[StepFigures] = field(default_factory=list)
    losses: Series = field(default_factory=Series)
    validation: Series = field(default_factory=Series)
    rates: Series = field(default_factory=Series)  # tokens a second
    more: dict[str, Series] = field(default_factory=dict)  # what the objective measures beside, by name
    unit: str = "trained token"  # what a loss is the mean over
    trained_tokens: int = 0

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._file: TextIO | None = None
        if self.watch is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.log, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
            self._recall()
            self._show(log=str(self.log.absolute()))

    def say(self, text: str) -> None:
        """Print a line to the screen and the log."""
        if self._file is not None:
            print(text, flush=True)
            print(time.strftime("%H:%M:%S"), text, file=self._file, flush=True)

    def step(self, figures: StepFigures) -> None:
        """Report a finished step."""
        self.history.append(figures)
        if self.watch is None:
            return
        self._count(figures.flat())
        self._note(figures.flat())
        left = (time.monotonic() - self._started) / len(self.history) * (self.steps - figures.step)
        self.say(
            f"step {figures.step}/{self.steps} | loss {figures.loss:.6f} | lr {figures.learning_rate:.3e}"
            f" | {_grad_norm(figures)} | {figures.rate:,.0f} tokens/s"
            f" | trained tokens {figures.trained_tokens:,}{_shown(figures.more)}"
            f" | memory {human_bytes(peak_memory())} | {clock(left)} left"
        )
        self._show(eta_seconds=left)
        scalars = {
            "train/loss": figures.loss,
            "train/learning_rate": figures.learning_rate,
            "train/grad_norm": figures.grad_norm,
            "train/trained_tokens": figures.trained_tokens,
            **{f"train/{name}": value for name, value in figures.more.items()},
            "speed/tokens_per_second": figures.rate,
            "speed/step_seconds": figures.seconds,
            "memory/peak_bytes": peak_memory(),
        }
        self._track(figures.step, {name: value for name, value in scalars.items() if value is not None})

    def validated(self, step: int, loss: float, tokens: int, more: Mapping[str, float]) -> None:
        """Report a validation pass after `step`; `more` is what the objective measures beside."""
        if self.watch is not None:
            self.validation.add(step, loss)
            self._note({"step": step, "validation_loss": loss, "trained_tokens": tokens, **more})
            self.say(f"validation after step {step} | loss {loss:.6f} | trained tokens {tokens:,}{_shown(more)}")
            self._show()
            self._track(step, {"validation/loss": loss, **{f"validation/{name}": each for name, each in more.items()}})
            self.draw()

    def saved(self, folder: Path) -> None:
        """Report a checkpoint."""
        if self.watch is not None:
            self.say(f"saved {folder}")
            self.draw()
            self.watch.lineage.saved()

    def exported(self, folder: Path, *, step: str) -> None:
        """Report that `step` was exported as the HuggingFace checkpoint `folder`."""
        if self.watch is not None:
            self.watch.lineage.exported(folder, step=step)
            self.say(f"exported {folder}")

    def doing(self, state: str) -> contextlib.AbstractContextManager[None]:
        """Let run.json say `state` while the block runs."""
        return contextlib.nullcontext() if self.watch is None else self.watch.record.doing(state)

    def draw(self) -> None:
        """Write the picture of all figures so far."""
        draw(self.folder / LOSS_PICTURE, self._panels())

    def _panels(self) -> "list[Panel]":
        losses = {"training": self.losses.points}
        if self.validation.points:
            losses["validation"] = self.validation.points
        panels = [Panel(f"loss per {self.unit}", losses)]
        for title, names in PICTURED.items():
            lines = {name.split("/")[-1]: self.more[name].points for name in names if name in self.more}
            panels += [Panel(title, lines)] if lines else []
        return panels

    def enter(self, state: str) -> None:
        """Let run.json say `state` from now on."""
        if self.watch is not None:
            self.watch.record.enter(state)

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Leave the traceback of what goes wrong in the block in the log, on whichever rank it does.

        The trackers are closed with it, so that they hear how it ended.
        """
        succeeded = False
        try:
            yield
            succeeded = True
        except InterruptedRun:
            raise
        except Exception:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
            raise
        finally:
            for tracker in tuple(self.trackers):
                with self._kept_going(tracker):
                    tracker.close(succeeded=succeeded)

    def _recall(self) -> None:
        """Read the figures of earlier starts back, and forget those of steps that are taken again."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = []
        for line in lines:
            if not line.endswith("\n"):  # cut short when an earlier start was killed
                continue
            try:
                figures = json.loads(line)
            except ValueError:
                self.say(f"{path}: a damaged line is left out")
                continue
            if figures["step"] > self.first_step:
                continue
            kept.append(line)
            if "validation_loss" in figures:
                if figures["validation_loss"] is not None:
                    self.validation.add(figures["step"], figures["validation_loss"])
            else:
                self._count(figures)
        write_text(path, "".join(kept))

    def _count(self, figures: Mapping[str, Any]) -> None:
        if _finite(figures["loss"]) is not None:
            self.losses.add(figures["step"], figures["loss"])
        self.rates.add(figures["step"], figures["tokens"] / figures["seconds"])
        for name in {name for names in PICTURED.values() for name in names} & figures.keys():
            if _finite(figures[name]) is not None:
                self.more.setdefault(name, Series()).add(figures["step"], figures[name])
        self.trained_tokens += figures["trained_tokens"]

    def _note(self, figures: dict[str, Any]) -> None:
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({name: _finite(value) for name, value in figures.items()}) + "\n")

    def _show(self, **figures: Any) -> None:
        """Let run.json have the newest figures."""
        assert self.watch is not None
        step = self.losses.points[-1][0] if self.losses.points else self.first_step
        self.watch.record.update(
            step=step,
            **figures,
            loss=self.losses.summary(),
            validation=self.validation.summary(),
            tokens_per_second=self.rates.summary(),
            trained_tokens=self.trained_tokens,
        )

    def _track(self, step: int, figures: Mapping[str, float]) -> None:
        for tracker in tuple(self.trackers):
            with self._kept_going(tracker):
                tracker.scalars(step, figures)

    @contextlib.contextmanager
    def _kept_going(self, tracker: Tracker) -> Iterator[None]:
        """Give a tracker up that fails, whatever the reason: training does not depend on it."""
        try:
            yield
        except Exception as error:
            self.trackers.remove(tracker)
            self.say(f"{tracker.name} failed and gets no more figures: {error}")


def _shown(more: Mapping[str, float]) -> str:
    """Return the figures that a line has room for; those with a / in their name are of a group, for files."""
    return "".join(f" | {name} {value:.4g}" for name, value in more.items() if "/" not in name)


def _grad_norm(figures: StepFigures) -> str:
    if figures.grad_norm is not None:
        return f"grad norm {figures.grad_norm:.4f}"
    return "overflow, step skipped, loss scale halved" if math.isfinite(figures.loss) else "not finite, step skipped"


def _finite(value: Any) -> Any:
    """Return `value`, or None in the place of a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Panel:
    """Lines of (step, value) in one diagram, by their names."""

    title: str
    lines: Mapping[str, Sequence[tuple[int, float]]]


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Draw diagrams under each other into a PNG; an axis without negative values begins at 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 3 * len(panels)), dpi=120, layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(len(panels), 1, number, xlabel="step", ylabel=panel.title)
        for name, points in panel.lines.items():
            sparse = name == "validation"
            axes.plot(*zip(*points, strict=True), "o-" if sparse else "-", label=name, markersize=4, linewidth=1.2)
        if all(value >= 0 for points in panel.lines.values() for _, value in points):
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def peak_memory() -> int:
    """Return this rank's peak memory in bytes: of its GPU, or of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
