"""The `temper` command: a table of sub-commands, each imported only when it is called."""

import os
import sys

import click

from .commands.lazy import LazyGroup
from .foundation.errors import TRACEBACK_VARIABLE, run_guarded

COMMANDS = {
    "chat": ("toolkits.commands.chat", "chat", "Talk with a HuggingFace checkpoint, tuned or not."),
    "convert": ("toolkits.commands.convert", "convert", "HuggingFace checkpoints to and from Megatron-core."),
    "data": ("toolkits.commands.data", "data", "Build a dataset and look at its rows."),
    "generate": ("toolkits.commands.generate", "generate", "Answer prompts with a HuggingFace checkpoint."),
    "pipeline": ("toolkits.commands.pipeline", "pipeline", "Run stages of training, each made of the ones before."),
    "plan": ("toolkits.commands.plan", "plan", "What a run needs, which layouts fit, and its launcher line."),
    "runs": ("toolkits.commands.runs", "runs", "List runs, and show one with its curve and its lineage."),
    "score": ("toolkits.commands.score", "score", "Score answers with a reward model."),
    "train": ("toolkits.commands.train", "train", "Tune a model with Megatron-core."),
    "verify": ("toolkits.commands.verify", "verify", "Run a model on both sides; check a family."),
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, help="Show the Python traceback of an error.")
@click.version_option(package_name="temper-mcore", prog_name="temper")
def temper(traceback: bool) -> None:
    """Tune a HuggingFace checkpoint with Megatron-core and get a HuggingFace checkpoint back."""
    if traceback:
        os.environ[TRACEBACK_VARIABLE] = "1"


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run_guarded(_command))


def _command() -> None:
    try:
        temper(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.Abort:  # click's word for Ctrl-C
        raise KeyboardInterrupt from None


if __name__ == "__main__":
    main()
