"""A training run as a straight line: settings, sources, folder, ranks, model, weights, optimizer, loop, export."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from conversion.mcore_directory import step_folders

from ..foundation.errors import MachineError, UsageError
from ..foundation.progress import human_bytes
from ..foundation.publish import require_space, write_text
from ..planning.memory import run_memory
from ..planning.weights import Tuning
from .batches import Batches, Rows
from .checkpointing import Position, RunState, Saved, load_step, newest_step, require_loadable
from .config import TrainConfig
from .layout import Layout, layout_of
from .loop import Training, train
from .optimizer import build_optimizer
from .parallel.model import DTYPES, build_model, wrap
from .parallel.world import gather, process_groups, rank
from .reporter import Reporter, StepFigures, peak_memory
from .run_folder import claimed
from .sources import DataSource, ModelSource, find_data, find_model
from .weights import load_huggingface, load_mcore

EXPORTED = "exported.txt"  # in the run's folder: the step that its export holds
BYTES_OF_OPTIMIZER = 12  # a parameter: fp32 master weight and two fp32 moments


@dataclass(frozen=True)
class RunPlan:
    """What a start will do, known before any weight is allocated."""

    config: TrainConfig
    source: ModelSource
    data: DataSource
    layout: Layout

    @property
    def folder(self) -> Path:
        """Where the run's steps go."""
        return self.config.output.output / "checkpoint" / self.config.output.name

    @property
    def steps(self) -> int:
        """The optimizer steps: --train-iters, or as many as --epochs take."""
        batch = self.config.batch
        return batch.train_iters or math.ceil(batch.epochs * len(self.data.training) / batch.global_batch_size)

    @property
    def memory(self) -> int:
        """The bytes that the fullest rank needs at its worst moment."""
        return max(each.total for each in run_memory(self.source.plan, self.config, self.layout, Tuning()))

    @property
    def export(self) -> Path:
        """Where EXPORT_HF writes."""
        return self.config.output.output / "huggingface" / self.config.output.name

    def require_warmup_inside(self) -> None:
        """Raise UsageError when the warm-up leaves no step for the cosine; --epochs is only now known in steps."""
        warmup = self.config.optimizer.warmup_iters
        if warmup >= self.steps:
            raise UsageError(f"--warmup-iters {warmup} leaves nothing of the {self.steps} steps: it is part of them")


def run(config: TrainConfig, objective: ModuleType) -> list[StepFigures]:
    """Train as `config` says and return the figures of every step taken.

    Every rank calls it, with torchrun's variables in the environment.
    """
    config.check()
    source = find_model(config.model)
    layout = layout_of(config, source.settings, int(os.environ["WORLD_SIZE"]))
    plan = RunPlan(config, source, find_data(config.data, source), layout)
    plan.data.require_one_step(config.batch.global_batch_size)
    plan.require_warmup_inside()
    _require_export_free(plan)
    with contextlib.ExitStack() as stack:
        remarks = stack.enter_context(claimed(plan.folder, config, source)) if os.environ["RANK"] == "0" else []
        stack.enter_context(process_groups(layout, seed=config.data.seed))
        resumed, reporter = _open(plan, remarks)
        with reporter.noting_failure(), _out_of_memory_explained(plan):
            last = _train(plan, objective, resumed, reporter)
    if config.output.export_hf and os.environ["RANK"] == "0":
        _export(plan, last, reporter)
    reporter.say(f"done: {last}")
    return reporter.history


@contextlib.contextmanager
def _out_of_memory_explained(plan: RunPlan) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"out of memory ({str(error).splitlines()[0]}): {human_bytes(peak_memory())} were taken, "
            f"{human_bytes(plan.memory)} were planned. In this order: AC=full, a smaller BATCH_SIZE, a larger TP "
            "or PP; `temper plan` compares them"
        ) from error


def _open(plan: RunPlan, remarks: list[str]) -> tuple[Saved | None, Reporter]:
    """Find where the run goes on, and open its log; rank 0 looks and tells the others."""
    found, damaged = newest_step(plan.folder) if rank() == 0 else (None, [])
    found, started = gather((found, time.time()))[0]
    stamp = f"{plan.config.output.name}_{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}"
    out = plan.config.output.output
    reporter = Reporter(
        steps=plan.steps,
        log=out / "log" / f"{stamp}.log",
        tensorboard=out / "tensorboard" / stamp,
        folder=plan.folder,
        active=rank() == 0,
        first_step=found.position.step if found else 0,
    )
    for remark in (*remarks, *damaged, *plan.data.remarks):
        reporter.say(remark)
    return found, reporter


def _train(plan: RunPlan, objective: ModuleType, resumed: Saved | None, reporter: Reporter) -> Path:
    """Train what remains to be trained; return the last step's folder."""
    if resumed is not None and resumed.position.step >= plan.steps:
        reporter.say(f"all {plan.steps} steps are done")
        return resumed.folder
    _introduce(plan, resumed, reporter)
    return train(_set_up(plan, objective, resumed, reporter))


def _set_up(plan: RunPlan, objective: ModuleType, resumed: Saved | None, reporter: Reporter) -> Training:
    from megatron.core import parallel_state

    config, source, layout = plan.config, plan.source, plan.layout
    precision, sharding = config.compute.precision, config.layout.optimizer_sharding
    if resumed is not None:
        require_loadable(resumed, layout, precision=precision, sharding=sharding)
    _require_space(plan)
    chunks = build_model(
        source.settings, layout, config.compute, initialize=config.model.checkpoint == "none" and resumed is None
    )
    if resumed is None and source.hf_weights is not None:
        load_huggingface(chunks, source.hf_weights)
    elif resumed is None and source.mcore_weights is not None:
        load_mcore(chunks, source.mcore_weights)
    wrapped = wrap(chunks, distributed_optimizer=config.layout.distributed_optimizer)
    optimizer = build_optimizer(config, wrapped)
    if resumed is not None:
        load_step(resumed, RunState(chunks, optimizer, layout, precision, sharding))
    replica, seed = parallel_state.get_data_parallel_rank(), config.data.seed
    return Training(
        config=config,
        layout=layout,
        steps=plan.steps,
        objective=objective,
        chunks=wrapped,
        optimizer=optimizer,
        batches=Batches(plan.data.training, config.batch, layout, replica=replica, seed=seed),
        validation=Batches(plan.data.validation, config.batch, layout, replica=replica, seed=seed),
        reporter=reporter,
        checkpoints=plan.folder,
        start=_start(resumed, config),
    )


def _start(resumed: Saved | None, config: TrainConfig) -> Position:
    if resumed is None:
        return Position()
    return Position(resumed.position.step, 0 if config.output.data_restart else resumed.position.rows)


def _introduce(plan: RunPlan, resumed: Saved | None, reporter: Reporter) -> None:
    config, layout, rows = plan.config, plan.layout, plan.data.training
    if config.layout.sequence_parallel and not layout.sequence:
        reporter.say("sequence parallelism needs TP > 1: it is off")
    reporter.say(f"{_amount(rows)}; validation: {len(plan.data.validation):,} rows")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    reporter.say(
        f"{plan.steps:,} steps of {config.batch.global_batch_size} rows on {layout.world} x {device}: "
        f"{layout.grid}, {config.compute.precision}"
    )
    reporter.say(f"planned memory of a rank: {human_bytes(plan.memory)} at its worst moment")
    if resumed is None:
        return
    then, now = resumed.grid, layout.grid
    changed = "" if then == now else f"layout {then} -> {now}: optimizer resharded, "
    start = _start(resumed, config)
    reporter.say(f"going on from {resumed.folder}: {changed}step {start.step + 1}, data from row {start.rows:,}")


def _amount(rows: Rows) -> str:
    tokens = sum(sample.length for row in rows.rows for sample in row)
    fill = tokens / (len(rows) * rows.seq_len)
    return (
        f"{sum(map(len, rows.rows)):,} conversations, {tokens:,} tokens in {len(rows):,} rows of {rows.seq_len} "
        f"({fill:.1%} full)"
    )


def _require_space(plan: RunPlan) -> None:
    output, parameters = plan.config.output, plan.source.plan.num_parameters
    weights = DTYPES[plan.config.compute.precision].itemsize
    saves = math.ceil(plan.steps / output.save_interval) if output.save_interval else 1
    # The newest checkpoint is complete before the oldest goes; those of an earlier start are there already.
    kept = min(saves, output.keep_last + 1 - len(step_folders(plan.folder)))
    export = weights if output.export_hf else 0
    require_space(plan.folder, parameters * (max(1, kept) * (weights + BYTES_OF_OPTIMIZER) + export))


def _require_export_free(plan: RunPlan) -> None:
    """Refuse, before anything is trained, to export to a folder that this run did not write."""
    if plan.config.output.export_hf and plan.export.exists() and not (plan.folder / EXPORTED).exists():
        raise UsageError(
            f"{plan.export} is there already and not of this run; move it, or choose another OUTPUT_BASEPATH"
        )


def _export(plan: RunPlan, saved: Path, reporter: Reporter) -> None:
    from conversion.mcore_to_hf import convert

    note = plan.folder / EXPORTED
    if plan.export.exists() and note.exists() and note.read_text(encoding="utf-8") == saved.name:
        reporter.say(f"{plan.export} is there already")
        return
    convert(saved, plan.export, overwrite=True)  # what an earlier start of this run exported
    write_text(note, saved.name)
    reporter.say(f"exported {plan.export}")
