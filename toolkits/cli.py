"""The `temper` command: a table of sub-commands, each imported only when it is called."""

import importlib
import os
import sys

import click

from .foundation.errors import TRACEBACK_VARIABLE, run_guarded


class LazyGroup(click.Group):
    """A group whose commands are imported on use, so that `--help` is instant.

    `table` maps a name to (module, attribute, help line).
    """

    def __init__(self, *args: object, table: dict[str, tuple[str, str, str]], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.table:
            return None
        module, attribute, _ = self.table[name]
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in self.table.items()])


COMMANDS = {
    "convert": ("toolkits.commands.convert", "convert", "HuggingFace checkpoints to and from Megatron-core."),
    "data": ("toolkits.commands.data", "data", "Build a dataset and look at its rows."),
    "plan": ("toolkits.commands.plan", "plan", "What a run needs, which layouts fit, and its launcher line."),
    "runs": ("toolkits.commands.runs", "runs", "List runs, and show one with its curve and its lineage."),
    "train": ("toolkits.commands.train", "train", "Tune a model with Megatron-core."),
    "verify": ("toolkits.commands.verify", "verify", "Run a model on both sides and compare its logits."),
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
