"""`temper train`: start a run on this machine, or be one rank of it."""

import sys
from typing import Any

import click

from ..training.config import TrainConfig
from ..training.options import settings_options


@click.group()
def train() -> None:
    """Tune a model with Megatron-core."""


@train.command("sft")
@settings_options
@click.option(
    "--ranks", type=click.IntRange(min=1), help="Ranks on this machine; default: its GPUs, or TP x PP without one."
)
def sft(ranks: int | None, **values: Any) -> None:
    """Supervised fine-tuning of all parameters."""
    from ..launch.elastic import start_ranks
    from ..launch.ranks import ranks_of_machine

    config = TrainConfig.from_values(values)
    config.check()
    layout = config.layout
    count = ranks or ranks_of_machine(layout.tensor_parallel * layout.pipeline_parallel)
    sys.exit(start_ranks(["sft", *config.flags()], ranks=count))
