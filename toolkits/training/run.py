"""A training run as a straight line: settings, sources, folder, ranks, model, weights, optimizer, loop, export."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conversion.mcore_directory import step_folders

from ..foundation.errors import MachineError, UsageError
from ..foundation.progress import human_bytes
from ..foundation.publish import require_space, write_text
from ..launch.ranks import fp8_problem
from ..monitoring.record import EXPORTING, RUNNING
from ..monitoring.trackers import require_tracker
from ..planning.memory import offload_that_fits, run_memory
from ..planning.weights import Tuning, trained_parameters
from . import quantize
from .adapters import attach
from .batches import Batches
from .checkpointing import Position, RunState, Saved, load_step, newest_step, require_loadable
from .config import TrainConfig
from .layout import Layout, layout_of
from .loop import Training, train
from .lora import Lora, write_peft
from .objectives import Objective
from .optimizer import build_optimizer
from .parallel.model import DTYPES, Chunks, build_model, draw_reward_head, wrap
from .parallel.world import gather, process_groups, rank
from .reference import Referee, ask_base
from .reporter import Reporter, StepFigures, peak_memory
from .run_folder import claimed, data_digest
from .saving import Saver
from .schedule import Pass
from .signals import ENDED, Signals
from .sources import DataSource, ModelSource, find_data, find_model
from .watch import Watch, trackers_of, watched
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
    lora: Lora | None = None

    @property
    def folder(self) -> Path:
        """Where the run's steps go."""
        return self.config.output.folder

    @property
    def steps(self) -> int:
        """The optimizer steps: --train-iters, or as many as --epochs take."""
        batch = self.config.batch
        return batch.train_iters or math.ceil(batch.epochs * len(self.data.training) / batch.global_batch_size)

    @property
    def memory(self) -> int:
        """The bytes that the fullest rank needs at its worst moment."""
        ranks = run_memory(self.source.plan, self.config, self.layout, self.tuning, offload=self.offload)
        return max(each.total for each in ranks)

    @property
    def tuning(self) -> Tuning:
        """What is trained, as the planner has it."""
        return Tuning() if self.lora is None else self.lora.tuning

    @property
    def offload(self) -> float:
        """The share of the optimizer's state in CPU memory; without a GPU it is there anyway."""
        said = self.config.optimizer.optimizer_offload
        if not torch.cuda.is_available():
            return 0.0
        if said != "auto":
            return float(said)
        _, gpu_bytes = torch.cuda.mem_get_info()
        return offload_that_fits(self.source.plan, self.config, self.layout, gpu_bytes, self.tuning)

    @property
    def export(self) -> Path:
        """Where EXPORT_HF writes."""
        return self.config.output.output / "huggingface" / self.config.output.name

    def require_warmup_inside(self) -> None:
        """Raise UsageError when the warm-up leaves no step for the cosine; --epochs is only now known in steps."""
        warmup = self.config.optimizer.warmup_iters
        if warmup >= self.steps:
            raise UsageError(f"--warmup-iters {warmup} leaves nothing of the {self.steps} steps: it is part of them")


def run(config: TrainConfig, objective: Objective) -> list[StepFigures]:
    """Train as `config` says and return the figures of every step taken.

    Every rank calls it, with torchrun's variables in the environment.
    """
    config.check()
    if config.compute.precision == "fp8" and (problem := fp8_problem()):
        raise MachineError(problem)
    if os.environ["RANK"] == "0":
        require_tracker(config.output.tracker)
    source = find_model(config.model, scores=objective.scores)
    layout = layout_of(config, source.settings, int(os.environ["WORLD_SIZE"]))
    lora = Lora.of(config, source)
    if lora is not None:
        lora.require_layout(source.plan, layout)
        if lora.quantize == "nf4":
            quantize.require_bitsandbytes()
    plan = RunPlan(config, source, find_data(config.data, source), layout, lora)
    plan.data.require_one_step(config.batch.global_batch_size)
    plan.require_warmup_inside()
    _require_export_free(plan)
    with contextlib.ExitStack() as stack:
        remarks, watch = [], None
        if os.environ["RANK"] == "0":
            remarks = stack.enter_context(claimed(plan.folder, config, source))
            watch = stack.enter_context(watched(plan))
        with process_groups(layout, seed=config.data.seed):
            resumed, start, reporter = _open(plan, remarks, watch)
            with reporter.noting_failure(), _out_of_memory_explained(plan):
                last = _train(plan, objective, resumed, start, reporter)
        if config.output.export_hf and watch is not None:
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


def _open(plan: RunPlan, remarks: list[str], watch: Watch | None) -> tuple[Saved | None, Position, Reporter]:
    """Find where the run goes on, and open its log; rank 0 looks and tells the others."""
    found, damaged, digest = None, [], ""
    if rank() == 0:
        (found, damaged), digest = newest_step(plan.folder), data_digest(plan.folder)
    found, digest, started = gather((found, digest, time.time()))[0]
    start = _start(found, digest, restart=plan.config.output.data_restart)
    stamp = f"{plan.config.output.name}_{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}"
    out = plan.config.output.output
    reporter = Reporter(
        steps=plan.steps,
        log=out / "log" / f"{stamp}.log",
        folder=plan.folder,
        watch=watch,
        trackers=trackers_of(plan, stamp) if watch else [],
        first_step=found.position.step if found else 0,
    )
    for remark in (*remarks, *damaged, *plan.data.remarks):
        reporter.say(remark)
    return found, start, reporter


def _train(plan: RunPlan, objective: Objective, resumed: Saved | None, start: Position, reporter: Reporter) -> Path:
    """Train what remains to be trained; return the last step's folder."""
    if resumed is not None and resumed.position.step >= plan.steps:
        reporter.say(f"all {plan.steps} steps are done")
        return resumed.folder
    if resumed is not None and gather(_has_ended(plan))[0]:
        reporter.say(f"--stop-separated ended it with step {resumed.position.step}")
        return resumed.folder
    _introduce(plan, resumed, start, reporter)
    training = _set_up(plan, objective, resumed, start, reporter)
    reporter.enter(RUNNING)
    return train(training)


def _has_ended(plan: RunPlan) -> bool:
    """Whether an earlier start ended before the last step, by the --stop-separated that this one has too."""
    note = plan.folder / ENDED
    return note.exists() and note.read_text(encoding="utf-8") == str(plan.config.preference.stop_separated)


def _set_up(
    plan: RunPlan, objective: Objective, resumed: Saved | None, start: Position, reporter: Reporter
) -> Training:
    from megatron.core import parallel_state

    config, layout = plan.config, plan.layout
    precision, sharding = config.compute.precision, config.layout.optimizer_sharding
    if resumed is not None:
        require_loadable(resumed, layout, precision=precision, sharding=sharding)
    _require_space(plan)
    loss, data = objective.loss(config), plan.data
    reporter.unit = loss.unit
    referee = None
    if loss.uses_reference and config.reference.reference == "cached":
        referee = Referee(data, config, plan.source, reporter)
    chunks = _model(plan, as_it_starts=resumed is None or (referee is not None and not referee.is_complete))
    wrapped = wrap(
        chunks,
        distributed_optimizer=config.layout.distributed_optimizer,
        overlap=config.layout.overlap_communication,
    )
    replica, seed = parallel_state.get_data_parallel_rank(), config.data.seed
    if referee is not None:
        data = referee.data(Pass(wrapped, layout), replica)
    optimizer = build_optimizer(config, wrapped, offload=plan.offload)
    if resumed is not None:
        load_step(resumed, RunState(chunks, optimizer, layout, precision, sharding))
    return Training(
        config=config,
        layout=layout,
        steps=plan.steps,
        loss=loss,
        chunks=wrapped,
        optimizer=optimizer,
        batches=Batches(data.training, config.batch, layout, replica=replica, seed=seed),
        validation=Batches(data.validation, config.batch, layout, replica=replica, seed=seed),
        reporter=reporter,
        checkpoints=plan.folder,
        saver=Saver(plan.folder, config.output.keep_last, say=reporter.say, saved=reporter.saved),
        start=start,
        signals=Signals(config.preference.stop_separated),
        refer=ask_base if loss.uses_reference and referee is None else None,
        complete=partial(write_peft, plan.lora, plan.source, DTYPES[precision]) if plan.lora is not None else None,
    )


def _model(plan: RunPlan, *, as_it_starts: bool) -> Chunks:
    """Build this rank's model; its weights are there `as_it_starts`, or unless a step will bring them."""
    config, source, lora = plan.config, plan.source, plan.lora
    is_new = as_it_starts or lora is not None  # an adapter's step has no other weights
    initialize = config.model.checkpoint == "none" and is_new
    quantize_as = lora.quantize if lora is not None else None
    kinds = {"adapters": lora is not None, "quantized": quantize_as is not None}
    chunks = build_model(source.settings, plan.layout, config.compute, initialize=initialize, **kinds)
    if quantize_as is not None:
        quantize.allocate(chunks, source.plan, quantize_as)
        quantize.load(chunks, source.plan, quantize.matrices_of(source))
    if is_new and source.hf_weights is not None:
        load_huggingface(chunks, source.hf_weights, elsewhere=source.left_alone)
    elif is_new and source.mcore_weights is not None:
        elsewhere = {step.key for step in source.plan.steps if step.is_linear} if quantize_as else set()
        load_mcore(chunks, source.mcore_weights, elsewhere=elsewhere | source.left_alone)
    if is_new and source.has_new_head:
        draw_reward_head(chunks, config.data.seed)
    if lora is not None:
        attach(chunks, lora, source.plan, seed=config.data.seed)
    return chunks


def _start(resumed: Saved | None, digest: str, *, restart: bool) -> Position:
    """Return where the run goes on in the data with `digest`; other data is read from its beginning, if allowed."""
    if resumed is None:
        return Position(data=digest)
    then = resumed.position
    if then.data in (digest, "") and not (restart and not then.data):
        return replace(then, data=digest)
    if not restart:
        raise UsageError(
            f"{resumed.folder} was trained on other data; --data-restart goes on with this one, from its beginning"
        )
    return Position(then.step, 0, digest)


def _introduce(plan: RunPlan, resumed: Saved | None, start: Position, reporter: Reporter) -> None:
    config, layout = plan.config, plan.layout
    if config.layout.sequence_parallel and not layout.sequence:
        reporter.say("sequence parallelism needs TP > 1: it is off")
    for line in plan.data.training.report(rows_of_run=plan.steps * config.batch.global_batch_size):
        reporter.say(line)
    reporter.say(f"validation: {len(plan.data.validation):,} rows")
    for line in plan.source.reward_remarks(is_new=resumed is None):
        reporter.say(line)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    reporter.say(
        f"{plan.steps:,} steps of {config.batch.global_batch_size} rows on {layout.world} x {device}: "
        f"{layout.grid}, {config.compute.precision}"
    )
    if config.optimizer.offloads:
        share = f"{plan.offload:.0%} of it" if torch.cuda.is_available() else "without a GPU all of it"
        reporter.say(f"optimizer state in CPU memory (--optimizer-offload): {share}")
    reporter.say(f"planned memory of a rank: {human_bytes(plan.memory)} at its worst moment")
    if resumed is None:
        return
    then, now = resumed.grid, layout.grid
    changed = "" if then == now else f"layout {then} -> {now}: optimizer resharded, "
    reporter.say(f"going on from {resumed.folder}: {changed}step {start.step + 1}, data from row {start.rows:,}")


def _require_space(plan: RunPlan) -> None:
    output, weights = plan.config.output, DTYPES[plan.config.compute.precision].itemsize
    saves = math.ceil(plan.steps / output.save_interval) if output.save_interval else 1
    # The newest checkpoint is complete before the oldest goes; those of an earlier start are there already.
    kept = max(1, min(saves, output.keep_last + 1 - len(step_folders(plan.folder))))
    of_parameter = weights + BYTES_OF_OPTIMIZER + (weights if plan.lora else 0)  # an adapter is there for PEFT too
    trained = trained_parameters(plan.source.plan, plan.tuning)
    export = plan.source.plan.num_parameters * weights if output.export_hf else 0
    require_space(plan.folder, trained * kept * of_parameter + export)


def _require_export_free(plan: RunPlan) -> None:
    """Refuse, before anything is trained, to export to a folder that this run did not write."""
    if plan.config.output.export_hf and plan.export.exists() and not (plan.folder / EXPORTED).exists():
        raise UsageError(
            f"{plan.export} is there already and not of this run; move it, or choose another OUTPUT_BASEPATH"
        )


def _export(plan: RunPlan, saved: Path, reporter: Reporter) -> None:
    from conversion.mcore_to_hf import convert
    from conversion.merge import merge

    note = plan.folder / EXPORTED
    if plan.export.exists() and note.exists() and note.read_text(encoding="utf-8") == saved.name:
        reporter.say(f"{plan.export} is there already")
        return
    with reporter.doing(EXPORTING):
        write_text(note, "unfinished")  # so that a start after a kill knows whose folder this is
        replaces: dict[str, Any] = {"overwrite": True, "restart": True}  # what an earlier start of this run exported
        base = plan.source.hf_weights or plan.source.mcore_weights
        if plan.lora is None:
            convert(saved, plan.export, **replaces)
        elif base is not None:
            merge(base, [(saved, 1.0)], plan.export, **replaces)
        write_text(note, saved.name)
        reporter.exported(plan.export, step=saved.name)
