"""Start a training run: its ranks, what they are told of the launcher, and the last word in the run's record."""

import os
from functools import partial
from uuid import uuid4

from ..monitoring.record import LAUNCH, LINE, conclude
from ..training.config import TrainConfig
from .elastic import ALONE, start_ranks
from .nodes import Nodes


def start_run(objective: str, config: TrainConfig, *, ranks: int, nodes: Nodes = ALONE, line: str) -> int:
    """Train as `config` says on `ranks` ranks of this node and return the exit code; `line` is what was typed."""
    launch = uuid4().hex
    os.environ.update({LINE: line, LAUNCH: launch})
    on_end = partial(conclude, config.output.folder, launch)
    return start_ranks([objective, *config.flags()], ranks=ranks, nodes=nodes, on_end=on_end)
