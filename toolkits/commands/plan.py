"""`temper plan`: what a run would need, which layouts fit, and the launcher's line."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from ..planning.weights import Method, Tuning
from ..training.config import TrainConfig, all_settings
from ..training.options import setting_option

SEARCHED = {
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
    "expert_parallel",
    "micro_batch_size",
    "recompute",
}
TAKEN = {
    "seq_len",
    "global_batch_size",
    "precision",
    "expert_tensor_parallel",
    "sequence_parallel",
    "distributed_optimizer",
    "first_stage_layers",
    "virtual_stage_layers",
    "recompute_layers",
    "optimizer_offload",
    "keep_last",
}
UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}


class Memory(click.ParamType):
    """An amount of memory as cards are sold: `80G` is 80 x 2^30 bytes."""

    name = "memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes; usage error otherwise."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT])(?:i?B)?", str(value))
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is not an amount such as 80G", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the training settings that memory and time depend on; those that are searched have no default."""
    for setting in reversed(list(all_settings())):
        if setting.name in SEARCHED:
            command = setting_option(replace(setting, default=None, help=f"{setting.help} Default: searched."))(command)
        elif setting.name in TAKEN:
            command = setting_option(setting)(command)
    return command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "model", required=True, type=click.Path(path_type=Path), help="config.json or its folder.")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="GPUs of the run.")
@click.option("--gpu-memory", type=Memory(), default="80G", show_default=True, help="Memory of one GPU.")
@click.option("--gpu-tflops", type=click.FloatRange(0, min_open=True), help="Dense TFLOP/s of one. Default: H100's.")
@click.option("--method", type=click.Choice(get_args(Method)), default="full", show_default=True, help="What is tuned.")
@click.option("--lora-rank", type=click.IntRange(1), default=16, show_default=True, help="Of the LoRA figures.")
@click.option("--json", "machine", is_flag=True, help="Print one JSON object; bytes and seconds.")
@_settings
def plan(model: Path, gpus: int, gpu_memory: int, gpu_tflops: float | None, machine: bool, **values: Any) -> None:
    """Say what a run of MODEL needs on every rank, which layouts fit, and the line that starts the best."""
    from conversion.mcore_directory import hf_folder
    from conversion.plan import plan_for

    from ..launch.checks import read_json
    from ..planning.layouts import Question
    from ..planning.report import as_json, report

    file = model if model.name == "config.json" else hf_folder(model) / "config.json"
    hf_config = read_json(file)
    tuning = Tuning(values.pop("method"), values.pop("lora_rank"))
    question = Question(
        plan=plan_for(hf_config),
        config=_config(values),
        tuning=tuning,
        gpus=gpus,
        gpu_bytes=gpu_memory,
        peak_flops=None if gpu_tflops is None else gpu_tflops * 1e12,
        fixed=frozenset(name for name in SEARCHED if values[name] is not None),
    )
    said = report(question, hf_config, checkpoint=str(model.parent if model.name == "config.json" else model))
    if machine:
        click.echo(json.dumps(as_json(said)))
        return
    from ..planning.tables import print_report

    print_report(said)


def _config(values: dict[str, Any]) -> TrainConfig:
    """Return a run's settings; what a plan does not depend on stands at its default."""
    chosen = {name: value for name, value in values.items() if value is not None}
    places = {"checkpoint": "CKPT", "data": Path("DATA"), "output": Path("OUT"), "train_iters": 1000}
    config = TrainConfig.from_values({**places, **chosen})
    config.check()
    return config
