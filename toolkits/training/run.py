"""A training run as a straight line: settings, sources, ranks, model, weights, optimizer, loop, export."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from conversion.hf_checkpoint import copy_sidecar_files

from ..foundation.errors import UsageError
from ..foundation.lock import locked
from ..foundation.publish import require_space
from .batches import Batches, Rows
from .checkpointing import load_huggingface, load_mcore
from .config import TrainConfig
from .layout import Layout, layout_of
from .loop import Training, train
from .optimizer import build_optimizer
from .parallel.model import build_model, wrap
from .parallel.world import process_groups, rank, sum_over_ranks
from .reporter import LOSS_PICTURE, Reporter, StepFigures
from .sources import DataSource, ModelSource, find_data, find_model

BYTES_OF_OPTIMIZER = 12  # a parameter: fp32 master weight and two fp32 moments


def run(config: TrainConfig, objective: ModuleType) -> list[StepFigures]:
    """Train as `config` says and return the figures of every step.

    Every rank calls it, with torchrun's variables in the environment.
    """
    config.check()
    source = find_model(config.model)
    layout = layout_of(config, source.settings, int(os.environ["WORLD_SIZE"]))
    data = find_data(config.data, source)
    checkpoints = config.output.output / "checkpoint" / config.output.name
    with _output_folder(checkpoints, source), process_groups(layout, seed=config.data.seed):
        reporter = _reporter(config, checkpoints, steps_of(config, data.training))
        with reporter.noting_failure():
            training = _set_up(config, objective, layout, (source, data), reporter, checkpoints)
            saved = train(training)
    if config.output.export_hf and int(os.environ["RANK"]) == 0:
        _export(config, saved, reporter)
    reporter.say(f"done: {saved}")
    return reporter.history


def steps_of(config: TrainConfig, rows: Rows) -> int:
    """Return the optimizer steps: --train-iters, or as many as --epochs take."""
    batch = config.batch
    return batch.train_iters or math.ceil(batch.epochs * len(rows) / batch.global_batch_size)


def _set_up(
    config: TrainConfig,
    objective: ModuleType,
    layout: Layout,
    sources: tuple[ModelSource, DataSource],
    reporter: Reporter,
    checkpoints: Path,
) -> Training:
    from megatron.core import parallel_state

    source, data = sources
    _introduce(config, layout, data, reporter)
    replica, seed = parallel_state.get_data_parallel_rank(), config.data.seed
    batches = Batches(data.training, config.batch, layout, replica=replica, seed=seed)
    batches.require_one_step()
    model = build_model(
        source.settings,
        layout,
        precision=config.batch.precision,
        flash_attention=config.batch.flash_attention,
        initialize=config.model.checkpoint == "none",
    )
    _require_space(config, source, checkpoints)
    if source.hf_weights is not None:
        load_huggingface(model, source.hf_weights)
    elif source.mcore_weights is not None:
        load_mcore(model, source.mcore_weights)
    wrapped = wrap(model, distributed_optimizer=config.layout.distributed_optimizer)
    return Training(
        config=config,
        layout=layout,
        steps=reporter.steps,
        objective=objective,
        model=wrapped,
        optimizer=build_optimizer(config, wrapped),
        batches=batches,
        validation=Batches(data.validation, config.batch, layout, replica=replica, seed=seed),
        reporter=reporter,
        checkpoints=checkpoints,
    )


@contextlib.contextmanager
def _output_folder(checkpoints: Path, source: ModelSource) -> Iterator[None]:
    """Rank 0 claims the run's folder while it trains, and puts config and tokenizer where an export finds them."""
    if int(os.environ["RANK"]) != 0:
        yield
        return
    with locked(checkpoints.with_name(f".lock-{checkpoints.name}"), what=str(checkpoints)):
        if any(checkpoints.glob("iter_*")):
            raise UsageError(
                f"{checkpoints} holds a run already, and continuing one is not built yet; "
                "choose another OUTPUT_BASEPATH"
            )
        (checkpoints / "hf").mkdir(parents=True, exist_ok=True)
        copy_sidecar_files(source.hf_files, checkpoints / "hf")
        yield


def _reporter(config: TrainConfig, checkpoints: Path, steps: int) -> Reporter:
    # One clock for all ranks, so that they share the log.
    started = sum_over_ranks([time.time() if rank() == 0 else 0.0])[0]
    stamp = f"{config.output.name}_{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}"
    out = config.output.output
    return Reporter(
        steps=steps,
        log=out / "log" / f"{stamp}.log",
        tensorboard=out / "tensorboard" / stamp,
        picture=checkpoints / LOSS_PICTURE,
        active=rank() == 0,
    )


def _introduce(config: TrainConfig, layout: Layout, data: DataSource, reporter: Reporter) -> None:
    for remark in data.remarks:
        reporter.say(remark)
    if config.layout.sequence_parallel and not layout.sequence:
        reporter.say("sequence parallelism needs TP > 1: it is off")
    rows, tokens = data.training.rows, sum(sample.length for row in data.training.rows for sample in row)
    fill = tokens / (len(rows) * config.data.seq_len)
    reporter.say(
        f"{sum(map(len, rows)):,} conversations, {tokens:,} tokens in {len(rows):,} rows of {config.data.seq_len} "
        f"({fill:.1%} full); validation: {len(data.validation):,} rows"
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    reporter.say(
        f"{reporter.steps:,} steps of {config.batch.global_batch_size} rows on {layout.world} x {device}: "
        f"TP {layout.tensor}, PP {layout.pipeline}, DP {layout.data}, {config.batch.precision}"
    )


def _require_space(config: TrainConfig, source: ModelSource, checkpoints: Path) -> None:
    weights = 2 if config.batch.precision == "bf16" else 4
    # The newest checkpoint is complete before the oldest goes.
    require_space(checkpoints, (config.output.keep_last + 1) * source.num_parameters * (weights + BYTES_OF_OPTIMIZER))


def _export(config: TrainConfig, saved: Path, reporter: Reporter) -> None:
    from conversion.mcore_to_hf import convert

    target = config.output.output / "huggingface" / config.output.name
    convert(saved, target)
    reporter.say(f"exported {target}")
