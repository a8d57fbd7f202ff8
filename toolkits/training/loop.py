"""The training loop; what is optimised is the objective's business, where it runs is the layout's."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer

from conversion.mcore_directory import step_folders, step_name

from ..foundation.errors import InterruptedRun, NumericsError
from ..foundation.publish import write_text
from ..launch.rank import stop_requested
from ..monitoring.record import SAVING, VALIDATING
from .batches import Batches, MicroBatch
from .checkpointing import Position, RunState
from .config import TrainConfig
from .layout import Layout
from .objectives import Loss
from .optimizer import learning_rate, set_learning_rate
from .parallel.context import share_of
from .parallel.model import gather_weights, unwrapped
from .parallel.world import context_rank, rank, speaks_for_its_tokens, sum_over_ranks
from .prefetch import prefetched
from .reference import with_baseline
from .reporter import Reporter, StepFigures
from .saving import Saver
from .schedule import Pass
from .signals import ENDED, Signals
from .time_limit import is_out_of_time


@dataclass(frozen=True)
class Outcome:
    """One pass over a global batch: its sums over all ranks, and what the ranks said of themselves meanwhile.

    `sums` are those that the loss gives. `stop`: a rank was asked to stop. `written`: all have written their share of
    a step that is saved in the background.
    """

    sums: Mapping[str, float]
    figures: Mapping[str, str]  # of the loss
    stop: bool
    written: bool

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.sums["loss"] / max(self.sums["count"], 1.0)

    @property
    def more(self) -> dict[str, float]:
        """The means of what the loss measures beside, where there is anything to mean over."""
        return {name: self.sums[name] / self.sums[over] for name, over in self.figures.items() if self.sums[over]}


@dataclass(frozen=True)
class Training:
    """Everything a run needs once it is set up."""

    config: TrainConfig
    layout: Layout
    steps: int
    loss: Loss
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    batches: Batches
    validation: Batches
    reporter: Reporter
    checkpoints: Path
    saver: Saver
    start: Position
    signals: Signals
    refer: Callable[[Pass, list[MicroBatch]], list[MicroBatch]] | None = None  # asks a reference at every step
    complete: Callable[[Path], None] | None = None  # adds to a step's folder what other tools read

    @property
    def work(self) -> Pass:
        """How micro batches run."""
        return Pass(self.chunks, self.layout)

    @property
    def state(self) -> RunState:
        """What is saved of the run on this rank."""
        return RunState(
            tuple(unwrapped(chunk) for chunk in self.chunks),
            self.optimizer,
            self.layout,
            self.config.compute.precision,
            self.config.layout.optimizer_sharding,
            self.complete,
        )

    def consumed(self, index: int) -> int:
        """Return the rows that the run has consumed before step `index`."""
        return self.start.rows + (index - self.start.step) * self.config.batch.global_batch_size


def train(run: Training) -> Path:
    """Run all steps, saving and validating on the way; return the last checkpoint.

    Raises InterruptedRun after a requested stop was honoured, NumericsError on a loss or gradient that
    is not finite.
    """
    config = run.chunks[0].config  # all chunks share it
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = run.optimizer.scale_loss
    with prefetched(upcoming(run)) as batches:
        return _take_steps(run, batches)


def upcoming(run: Training) -> Iterator[MicroBatch]:
    """Yield this rank's micro batches of all steps that are left, step after step."""
    for index in range(run.start.step, run.steps):
        yield from _shares(run, run.batches.micro_batches(run.batches.row_numbers(run.consumed(index))))


def _take_steps(run: Training, batches: Iterator[MicroBatch]) -> Path:
    output, ended = run.config.output, False
    for index in range(run.start.step, run.steps):
        figures, outcome = train_step(run, index, batches)
        run.reporter.step(figures)
        step, stop, last = figures.step, outcome.stop, figures.step == run.steps
        for sentence in run.signals.look(step, figures.more):
            run.reporter.say(sentence)
        if run.signals.is_enough and not last:
            run.reporter.say(f"--stop-separated {run.signals.stop_separated}: training ends with this step")
            last = ended = True
        due = last or _is_due(step, output.save_interval)
        saves = last or (due and not stop)
        if saves:
            _save(run, step, background=output.background_save and not last)
        elif outcome.written:
            run.saver.finish()
        if not stop and (due or _is_due(step, output.eval_interval)):
            stop = _validate(run, step)
        if stop and not last:
            if not saves:
                _save(run, step, background=False)
            run.saver.finish(required=True)
            raise InterruptedRun(
                f"stopped after step {step} of {run.steps}, saved as {run.checkpoints / step_name(step)}; "
                "the same line goes on from there"
            )
        if ended and rank() == 0:
            write_text(run.checkpoints / ENDED, str(run.signals.stop_separated))
        if last:
            break
    return run.checkpoints / step_name(step)


def train_step(run: Training, index: int, batches: Iterator[MicroBatch]) -> tuple[StepFigures, Outcome]:
    """Take optimizer step `index` (from 0) on the next of `batches`, which are those of `upcoming`.

    Returns its figures and what the ranks said on the way.
    """
    started, settings = time.monotonic(), run.config.optimizer
    rate = learning_rate(
        index + 1, steps=run.steps, warmup=settings.warmup_iters, peak=settings.lr, floor=settings.min_lr
    )
    set_learning_rate(run.optimizer, rate)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    numbers = run.batches.row_numbers(run.consumed(index))
    outcome = _forward_backward(run, batches, forward_only=False)
    if not math.isfinite(outcome.loss):
        _not_finite("loss", outcome.loss, run, index)
    grad_norm = _optimizer_step(run, index) if math.isfinite(outcome.loss) else None
    tokens, trained = run.batches.rows.tokens_in(numbers), int(outcome.sums["trained_tokens"])
    seconds = time.monotonic() - started
    return StepFigures(index + 1, outcome.loss, rate, grad_norm, tokens, trained, seconds, outcome.more), outcome


def _optimizer_step(run: Training, index: int) -> float | None:
    """Update the weights; return the gradient norm, None when fp16 overflowed and the step was skipped."""
    updated, grad_norm, _ = run.optimizer.step()
    if not updated and run.optimizer.get_loss_scale().item() <= 1.0:
        _not_finite("gradient", math.inf, run, index, spoiled=True)
    if updated and not math.isfinite(grad_norm):
        _not_finite("gradient norm", float(grad_norm), run, index, spoiled=True)
    return float(grad_norm) if updated else None


def _validate(run: Training, step: int) -> bool:
    """Report the validation loss; return whether a stop was requested, which ends it unfinished."""
    with run.reporter.doing(VALIDATING):
        result = evaluate(run)
    if result is None:
        return True
    run.reporter.validated(step, result.loss, int(result.sums["trained_tokens"]), result.more)
    return False


def evaluate(run: Training) -> Outcome | None:
    """Return the figures of all validation rows; None when a rank was asked to stop on the way."""
    sums: dict[str, float] = {}
    one = None
    with run.work.evaluating():
        for batches in run.validation.evaluation():
            one = _forward_backward(run, _shares(run, batches), forward_only=True)
            sums = {name: sums.get(name, 0.0) + value for name, value in one.sums.items()}
            if one.stop:
                break
    return None if one is None or one.stop else replace(one, sums=sums)


def _forward_backward(run: Training, batches: Iterator[MicroBatch], *, forward_only: bool) -> Outcome:
    """Run one global batch, forward only or backward too."""
    mine: Iterable[MicroBatch] = islice(batches, run.layout.micro_batches)
    if run.refer is not None:
        mine = run.refer(run.work, list(mine))
    if run.loss.uses_others:
        mine = with_baseline(run.work, list(mine))
    results = run.work.run(run.loss, mine, forward_only=forward_only)
    names = list(dict.fromkeys(("loss", "count", "trained_tokens", *run.loss.figures, *run.loss.figures.values())))
    said = [0.0] * len(names)
    if speaks_for_its_tokens():
        said = torch.stack([sum(result[name].double() for result in results) for name in names]).tolist()
    stop = stop_requested() or is_out_of_time(run.config.output)
    *sums, stopping, written = sum_over_ranks([*said, float(stop), float(run.saver.is_written)])
    written_by_all = written == run.layout.world
    return Outcome(dict(zip(names, sums, strict=True)), run.loss.figures, stopping > 0, written_by_all)


def _shares(run: Training, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    return (share_of(batch, rank=context_rank(), size=run.layout.context) for batch in batches)


def _not_finite(what: str, value: float, run: Training, index: int, *, spoiled: bool = False) -> None:
    """Write the batch down, then raise NumericsError, unless the step may be skipped and the weights are whole.

    All ranks call it. `spoiled` says that the weights are not.
    """
    numbers = run.batches.row_numbers(run.consumed(index))
    dump = run.checkpoints / f"not-finite-step-{index + 1}.json"
    if rank() == 0:
        write_text(dump, json.dumps({"step": index + 1, what: str(value), "rows": run.batches.rows.dump(numbers)}))
    earlier = sum(not math.isfinite(figures.loss) for figures in run.reporter.history)
    allowed = run.config.optimizer.max_nonfinite
    said = f"step {index + 1}: the {what} is {value}; rows {', '.join(map(str, numbers))}, written to {dump}"
    if earlier + 1 < allowed and not spoiled:
        run.reporter.say(f"{said}. The step is skipped ({earlier + 1} of {allowed} before the run ends)")
        return
    run.saver.finish()
    steps = step_folders(run.checkpoints)
    good = f"The last good checkpoint is {steps[-1]}" if steps else "No checkpoint was written yet"
    raise NumericsError(f"{said}. {good}. A lower --lr, or --precision fp32, is what usually helps")


def _save(run: Training, step: int, *, background: bool) -> None:
    gather_weights(run.chunks)
    with run.reporter.doing(SAVING):
        run.saver.save(run.state, Position(step, run.consumed(step), run.start.data), background=background)


def _is_due(step: int, interval: int) -> bool:
    return bool(interval) and step % interval == 0
