"""What a run says: one line a step on the screen and in the log, TensorBoard, and a picture of the loss."""

import contextlib
import dataclasses
import json
import resource
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from ..foundation.errors import InterruptedRun
from ..foundation.progress import clock, human_bytes
from ..foundation.publish import write_text

LOSS_PICTURE = "loss.png"
METRICS = "metrics.jsonl"


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


@dataclass
class Reporter:
    """Writes for rank 0; the other ranks only note what goes wrong.

    `log` is shared by all ranks, so that the one that fails can leave its traceback there. `history` has
    the steps of this start, `losses` and `validation` are (step, loss) of the whole run.
    """

    steps: int
    log: Path
    tensorboard: Path
    folder: Path  # of the run: metrics.jsonl and loss.png
    active: bool
    first_step: int = 0  # steps that were taken by earlier starts of this run
    history: list[StepFigures] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._file: TextIO | None = None
        if self.active:
            from torch.utils.tensorboard import SummaryWriter

            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.log, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
            self._board = SummaryWriter(str(self.tensorboard))
            self._recall()

    def say(self, text: str) -> None:
        """Print a line to the screen and the log."""
        if self._file is not None:
            print(text, flush=True)
            print(time.strftime("%H:%M:%S"), text, file=self._file, flush=True)

    def step(self, figures: StepFigures) -> None:
        """Report a finished step."""
        self.history.append(figures)
        if not self.active:
            return
        self.losses.append((figures.step, figures.loss))
        self._note(dataclasses.asdict(figures))
        rate = figures.tokens / figures.seconds
        left = (time.monotonic() - self._started) / len(self.history) * (self.steps - figures.step)
        self.say(
            f"step {figures.step}/{self.steps} | loss {figures.loss:.6f} | lr {figures.learning_rate:.3e}"
            f" | {_grad_norm(figures.grad_norm)} | {rate:,.0f} tokens/s | trained tokens {figures.trained_tokens:,}"
            f" | memory {human_bytes(peak_memory())} | {clock(left)} left"
        )
        scalars = {
            "train/loss": figures.loss,
            "train/learning_rate": figures.learning_rate,
            "train/grad_norm": figures.grad_norm,
            "train/trained_tokens": figures.trained_tokens,
            "speed/tokens_per_second": rate,
            "speed/step_seconds": figures.seconds,
            "memory/peak_bytes": peak_memory(),
        }
        for name, value in scalars.items():
            if value is not None:
                self._board.add_scalar(name, value, figures.step)

    def validated(self, step: int, loss: float, tokens: int) -> None:
        """Report a validation pass after `step`."""
        if self.active:
            self.validation.append((step, loss))
            self._note({"step": step, "validation_loss": loss, "trained_tokens": tokens})
            self.say(f"validation after step {step} | loss {loss:.6f} | trained tokens {tokens:,}")
            self._board.add_scalar("validation/loss", loss, step)

    def draw(self) -> None:
        """Write the picture of all losses so far."""
        if self.active:
            self._board.flush()
            draw_losses(self.folder / LOSS_PICTURE, self.losses, self.validation)

    def _recall(self) -> None:
        """Read the figures of earlier starts back, and forget those of steps that are taken again."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = []
        for line in lines:
            if not line.endswith("\n"):  # cut short when an earlier start was killed
                continue
            figures = json.loads(line)
            if figures["step"] > self.first_step:
                continue
            kept.append(line)
            if "validation_loss" in figures:
                self.validation.append((figures["step"], figures["validation_loss"]))
            else:
                self.losses.append((figures["step"], figures["loss"]))
        write_text(path, "".join(kept))

    def _note(self, figures: dict[str, float]) -> None:
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Leave the traceback of what goes wrong in the block in the log, on whichever rank it does."""
        try:
            yield
        except InterruptedRun:
            raise
        except Exception:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
            raise


def _grad_norm(norm: float | None) -> str:
    return "overflow, step skipped, loss scale halved" if norm is None else f"grad norm {norm:.4f}"


def draw_losses(path: Path, losses: list[tuple[int, float]], validation: list[tuple[int, float]]) -> None:
    """Draw (step, loss) points of training and validation into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per trained token")
    axes.plot(*zip(*losses, strict=True), label="training", linewidth=1.2)
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", label="validation", markersize=4)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def peak_memory() -> int:
    """Return this rank's peak memory in bytes: of its GPU, or of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
