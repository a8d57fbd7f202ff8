"""One rank of a training run: `torchrun ... -m toolkits.training OBJECTIVE --flags`."""

import importlib
import sys

from ..foundation.errors import UsageError
from ..launch.rank import run_rank

OBJECTIVES = ("sft",)


def main() -> None:
    """Read the command line and train; heavy imports wait until the signal handler stands."""
    objective, *flags = sys.argv[1:] or [""]
    if objective not in OBJECTIVES:
        raise UsageError(f"unknown objective {objective!r}; there is {', '.join(OBJECTIVES)}")
    from ..commands.train import read_config

    config = read_config(flags)
    from .run import run

    run(config, importlib.import_module(f".objectives.{objective}", __package__))


if __name__ == "__main__":
    run_rank(main)
