"""`temper train`: start a run on this machine, or be one rank of it."""

import shlex
import sys
from functools import partial
from typing import Any

import click

from ..training.config import TrainConfig
from ..training.objectives import OBJECTIVES, Objective
from ..training.options import settings_options


@click.group()
def train() -> None:
    """Tune a model with Megatron-core."""


def _command(objective: Objective) -> click.Command:
    defaults = {"rows": objective.rows, "name": objective.word}

    others = {group for each in OBJECTIVES.values() for group in each.groups} - set(objective.groups)

    @click.command(objective.word, help=objective.help, context_settings={"default_map": defaults})
    @partial(settings_options, leave_out=others)
    @click.option(
        "--ranks",
        type=click.IntRange(min=1),
        help="Ranks on this machine; default: its GPUs, or TP x PP x CP without one.",
    )
    def command(ranks: int | None, **values: Any) -> None:
        from ..launch.job import start_run
        from ..launch.ranks import ranks_of_machine

        config = TrainConfig.from_values(values)
        config.check()
        count = ranks or ranks_of_machine(config.layout.model_parallel)
        line = shlex.join(["temper", *sys.argv[1:]])
        sys.exit(start_run(objective.word, config, ranks=count, line=line))

    return command


for each in OBJECTIVES.values():
    train.add_command(_command(each))
