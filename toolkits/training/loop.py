"""The training loop; what is optimised is the objective's business, where it runs is the layout's."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from conversion.mcore_directory import step_folders, step_name

from ..foundation.errors import InterruptedRun, NumericsError
from ..launch.rank import stop_requested
from .batches import Batches, MicroBatch, row_length
from .checkpointing import Position, RunState, save_step
from .config import TrainConfig
from .layout import Layout
from .optimizer import learning_rate, set_learning_rate
from .parallel.context import share_of
from .parallel.model import unwrapped
from .parallel.world import context_rank, speaks_for_its_tokens, sum_over_ranks
from .reporter import Reporter, StepFigures


@dataclass(frozen=True)
class Training:
    """Everything a run needs once it is set up."""

    config: TrainConfig
    layout: Layout
    steps: int
    objective: ModuleType  # one of `objectives`
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    batches: Batches
    validation: Batches
    reporter: Reporter
    checkpoints: Path
    start: Position

    @property
    def state(self) -> RunState:
        """What is saved of the run on this rank."""
        return RunState(
            tuple(unwrapped(chunk) for chunk in self.chunks),
            self.optimizer,
            self.layout,
            self.config.compute.precision,
            self.config.layout.optimizer_sharding,
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
    saved = run.checkpoints
    for index in range(run.start.step, run.steps):
        figures, stop = train_step(run, index)
        run.reporter.step(figures)
        last = figures.step == run.steps
        save_due = last or _is_due(figures.step, run.config.output.save_interval)
        if save_due or stop:
            saved = _save(run, figures.step)
        if not stop and (save_due or _is_due(figures.step, run.config.output.eval_interval)):
            stop = _validate(run, figures.step)
            if stop and saved.name != step_name(figures.step):
                saved = _save(run, figures.step)
        if stop and not last:
            raise InterruptedRun(
                f"stopped after step {figures.step} of {run.steps}, saved as {saved}; the same line goes on from there"
            )
    return saved


def train_step(run: Training, index: int) -> tuple[StepFigures, bool]:
    """Take optimizer step `index` (from 0); return its figures and whether any rank was asked to stop."""
    started, settings = time.monotonic(), run.config.optimizer
    rate = learning_rate(
        index + 1, steps=run.steps, warmup=settings.warmup_iters, peak=settings.lr, floor=settings.min_lr
    )
    set_learning_rate(run.optimizer, rate)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    numbers = run.batches.row_numbers(run.consumed(index))
    loss, trained, stop = _forward_backward(run, run.batches.micro_batches(numbers), forward_only=False)
    _require_finite("loss", loss, run, index)
    grad_norm = _optimizer_step(run, index)
    tokens = sum(sample.length for number in numbers for sample in run.batches.rows.rows[number])
    figures = StepFigures(index + 1, loss, rate, grad_norm, tokens, trained, time.monotonic() - started)
    return figures, stop


def _optimizer_step(run: Training, index: int) -> float | None:
    """Update the weights; return the gradient norm, None when fp16 overflowed and the step was skipped."""
    updated, grad_norm, _ = run.optimizer.step()
    if updated:
        _require_finite("gradient norm", float(grad_norm), run, index)
        return float(grad_norm)
    if run.optimizer.get_loss_scale().item() <= 1.0:
        _require_finite("gradient", math.inf, run, index)
    return None


def _validate(run: Training, step: int) -> bool:
    """Report the validation loss; return whether a stop was requested, which ends it unfinished."""
    result = evaluate(run)
    if result is None:
        return True
    run.reporter.validated(step, *result)
    run.reporter.draw()
    return False


def evaluate(run: Training) -> tuple[float, int] | None:
    """Return the mean loss over all trained tokens of the validation rows, and how many those are.

    None when a rank was asked to stop on the way.
    """
    total, tokens, stop = 0.0, 0, False
    _switch_to(run, training=False)
    with torch.no_grad():
        for batches in run.validation.evaluation():
            loss, trained, stop = _forward_backward(run, batches, forward_only=True)
            total, tokens = total + loss * trained, tokens + trained
            if stop:
                break
    _switch_to(run, training=True)
    return None if stop else (total / tokens, tokens)


def _switch_to(run: Training, *, training: bool) -> None:
    for chunk in run.chunks:
        chunk.train(training)


def _forward_backward(run: Training, batches: Iterator[MicroBatch], *, forward_only: bool) -> tuple[float, int, bool]:
    """Run one global batch; return its mean loss, its trained tokens, and whether a rank was asked to stop."""
    micro, several = run.config.batch.micro_batch_size, len(run.chunks) > 1
    shares = (share_of(batch, rank=context_rank(), size=run.layout.context) for batch in batches)
    results = get_forward_backward_func()(
        forward_step_func=partial(forward_step, run.objective),
        data_iterator=list(tee(shares, len(run.chunks))) if several else shares,
        model=run.chunks,
        num_microbatches=run.layout.micro_batches,
        # Packed rows lie end to end: one long row in the eyes of megatron-core.
        seq_length=micro * row_length(run.config.data.seq_len, run.layout),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    mine = [0.0, 0.0]
    if speaks_for_its_tokens():
        mine = [float(sum(result[key] for result in results)) for key in ("loss", "trained_tokens")]
    loss, trained, stop = sum_over_ranks([*mine, float(stop_requested())])
    return loss / max(trained, 1.0), int(trained), stop > 0


def forward_step(
    objective: ModuleType, batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Run the next micro batch through `model`; return its output and the function that makes the loss of it."""
    batch = next(batches).cuda()
    output = model(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)
    return output, partial(objective.loss, batch=batch)


def _require_finite(what: str, value: float, run: Training, index: int) -> None:
    if math.isfinite(value):
        return
    rows = ", ".join(map(str, run.batches.row_numbers(run.consumed(index))))
    steps = step_folders(run.checkpoints)
    good = f"the last good checkpoint is {steps[-1]}" if steps else "no checkpoint was written yet"
    raise NumericsError(
        f"step {index + 1}: the {what} is {value}; {good}. Rows of this batch: {rows}. "
        "A lower --lr, or --precision fp32, is what usually helps"
    )


def _save(run: Training, step: int) -> Path:
    position = Position(step, run.consumed(step))
    saved = save_step(run.checkpoints, run.state, position, keep_last=run.config.output.keep_last)
    run.reporter.draw()
    run.reporter.say(f"saved {saved}")
    return saved


def _is_due(step: int, interval: int) -> bool:
    return bool(interval) and step % interval == 0
