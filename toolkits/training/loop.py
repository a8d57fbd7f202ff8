"""The training loop; what is optimised is the objective's business, where it runs is the layout's."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from conversion.mcore_directory import step_folders, step_name

from ..foundation.errors import InterruptedRun, NumericsError
from ..foundation.publish import write_text
from ..launch.rank import stop_requested
from ..monitoring.record import SAVING, VALIDATING
from .batches import Batches, MicroBatch
from .checkpointing import Position, RunState
from .config import TrainConfig
from .layout import Layout
from .optimizer import learning_rate, set_learning_rate
from .parallel.context import share_of
from .parallel.model import gather_weights, unwrapped
from .parallel.world import context_rank, rank, speaks_for_its_tokens, sum_over_ranks
from .prefetch import prefetched
from .reporter import Reporter, StepFigures
from .saving import Saver


@dataclass(frozen=True)
class Outcome:
    """One pass over a global batch: its mean loss, and what the ranks said of themselves meanwhile.

    `stop`: one of them was asked to stop. `written`: all have written their share of a step that is saved in
    the background.
    """

    loss: float
    trained_tokens: int
    stop: bool
    written: bool


@dataclass(frozen=True)
class Training:
    """Everything a run needs once it is set up."""

    config: TrainConfig
    layout: Layout
    steps: int
    loss: Callable[..., Any]  # of the objective
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    batches: Batches
    validation: Batches
    reporter: Reporter
    checkpoints: Path
    saver: Saver
    start: Position
    complete: Callable[[Path], None] | None = None  # adds to a step's folder what other tools read
    began: float = field(default_factory=psutil.Process().create_time)  # before imports and loading

    @property
    def is_out_of_time(self) -> bool:
        """Whether --stop-after has passed."""
        minutes = self.config.output.stop_after
        return bool(minutes) and time.time() - self.began > 60 * minutes

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
    output = run.config.output
    for index in range(run.start.step, run.steps):
        figures, outcome = train_step(run, index, batches)
        run.reporter.step(figures)
        step, stop, last = figures.step, outcome.stop, figures.step == run.steps
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
    return run.checkpoints / step_name(run.steps)


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
    tokens = run.batches.rows.tokens_in(numbers)
    seconds = time.monotonic() - started
    return StepFigures(index + 1, outcome.loss, rate, grad_norm, tokens, outcome.trained_tokens, seconds), outcome


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
    run.reporter.validated(step, *result)
    return False


def evaluate(run: Training) -> tuple[float, int] | None:
    """Return the mean loss over all trained tokens of the validation rows, and how many those are.

    None when a rank was asked to stop on the way.
    """
    total, tokens, stop = 0.0, 0, False
    _switch_to(run, training=False)
    with torch.no_grad():
        for batches in run.validation.evaluation():
            one = _forward_backward(run, _shares(run, batches), forward_only=True)
            total, tokens, stop = total + one.loss * one.trained_tokens, tokens + one.trained_tokens, one.stop
            if stop:
                break
    _switch_to(run, training=True)
    return None if stop else (total / tokens, tokens)


def _switch_to(run: Training, *, training: bool) -> None:
    for chunk in run.chunks:
        chunk.train(training)


def _forward_backward(run: Training, batches: Iterator[MicroBatch], *, forward_only: bool) -> Outcome:
    """Run one global batch, forward only or backward too."""
    micro, several = run.config.batch.micro_batch_size, len(run.chunks) > 1
    mine = islice(batches, run.layout.micro_batches)
    results = get_forward_backward_func()(
        forward_step_func=partial(forward_step, run.loss),
        data_iterator=list(tee(mine, len(run.chunks))) if several else mine,
        model=run.chunks,
        num_microbatches=run.layout.micro_batches,
        # Packed rows lie end to end: one long row in the eyes of megatron-core.
        seq_length=micro * (run.validation if forward_only else run.batches).row_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    said = [0.0, 0.0]
    if speaks_for_its_tokens():
        said = [float(sum(result[key] for result in results)) for key in ("loss", "trained_tokens")]
    stop = stop_requested() or run.is_out_of_time
    loss, trained, stopping, written = sum_over_ranks([*said, float(stop), float(run.saver.is_written)])
    return Outcome(loss / max(trained, 1.0), int(trained), stopping > 0, written == run.layout.world)


def _shares(run: Training, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    return (share_of(batch, rank=context_rank(), size=run.layout.context) for batch in batches)


def forward_step(
    loss: Callable[..., Any], batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Run the next micro batch through `model`; return its output and the function that makes the loss of it."""
    batch = next(batches).cuda()
    output = model(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)
    return output, partial(loss, batch=batch)


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
