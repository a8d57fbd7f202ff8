"""`temper runs`: the runs under a folder, and one of them in full."""

import json
from pathlib import Path
from typing import Any

import click

from ..foundation.errors import CheckpointError

HELP = {"help_option_names": ["-h", "--help"]}
DIRECTORY = click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False), default=".")
MACHINE = click.option("--json", "machine", is_flag=True, help="Print JSON: what the runs' files say, and the state.")


class Runs(click.Group):
    """`temper runs [DIR]` is short for `temper runs list [DIR]`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `list` in front of what names no command."""
        if not args or args[0] not in (*self.commands, *HELP["help_option_names"]):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Runs, context_settings=HELP)
def runs() -> None:
    """Watch runs: `temper runs [DIR]` lists those under DIR (here), `temper runs show NAME [DIR]` shows one.

    A run is a folder OUT/checkpoint/NAME with a run.json, OUT being DIR or up to three folders below. Its state is
    starting, running, validating, saving, exporting; finished, interrupted (saved, the same line goes on), failed;
    died when its process is gone; silent when another machine has written nothing for a minute.
    """


@runs.command("list")
@DIRECTORY
@MACHINE
def list_runs(directory: Path, machine: bool) -> None:
    """List the runs under DIRECTORY: `list` may be left out."""
    from ..monitoring.runs import NONE_FOUND, find_runs

    found = find_runs(directory)
    if machine:
        click.echo(json.dumps([_as_json(run) for run in found]))
    elif not found:
        click.echo(f"{directory}: {NONE_FOUND}")
    else:
        from ..monitoring.listing import print_runs

        print_runs(found, directory)


@runs.command("show")
@click.argument("name")
@DIRECTORY
@MACHINE
def show(name: str, directory: Path, machine: bool) -> None:
    """Show the run NAME under DIRECTORY: its curve, its state, and what it came from.

    A part of the name is enough when no other run has it.
    """
    from ..monitoring.runs import find_run, read_lineage

    run = find_run(name, directory)
    try:
        lineage: dict[str, Any] | str = read_lineage(run.folder)
    except CheckpointError as error:
        lineage = str(error)
    if machine:
        click.echo(json.dumps({**_as_json(run), "lineage": lineage}))
        return
    from ..monitoring.listing import print_run

    print_run(run, lineage)


def _as_json(run: Any) -> dict[str, Any]:
    """Return what is known of a run; `state` is as judged now, `folder` where it was found."""
    known = {"problem": run.problem} if hasattr(run, "problem") else dict(run.content)
    return {**known, "name": run.name, "folder": str(run.folder), "state": run.state}
