"""`python -m toolkits.quickstart.identity [FOLDER]`: the pipeline of the folder identity/ on the tiny model.

SFT teaches the tiny model to say "I'm A", DPO on correction pairs to say "I'm B", DPO on refusals what not to answer.
"""

import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import click

from ..foundation.errors import NumericsError, run_guarded
from ..foundation.progress import clock
from ..foundation.publish import publish_directory
from ..pipeline.reading import read_pipeline
from ..pipeline.running import run_pipeline
from ..pipeline.stage import Pipeline, shown
from .tiny import write_tiny_checkpoint

EXAMPLE = Path(__file__).with_suffix("")
FILE, MODEL = "pipeline.yaml", "tiny-hf"
RIGHT_ENOUGH = 7  # of the 8 answers of the last model


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path), default=Path("identity-example"))
def identity(folder: Path) -> None:
    """Copy the example to FOLDER (default: identity-example), make the tiny model there, and run its pipeline.

    In a FOLDER that has the example already the pipeline goes on.
    """
    start = time.monotonic()
    file = folder / FILE
    if not file.exists():
        make_example(folder)
        click.echo(f"made {shown(folder)}: {FILE}, its rows, and {MODEL}, a tiny model of random weights")
    again = shlex.join(["temper", "pipeline", shown(file)])
    click.echo(f"$ {again}")
    pipeline = read_pipeline(file)
    run_pipeline(pipeline, only=None, redo=(), dry=False, again=again)
    first, last, count = num_expected(pipeline)
    click.echo(f"\nas wanted: {first} of {count} answers after SFT, {last} of {count} after DPO and safety DPO")
    click.echo("A tiny random model memorised a few sentences. That proves the line, not any intelligence.")
    click.echo(f"Done in {clock(time.monotonic() - start)}. Look at it: {again} --status")
    if last < RIGHT_ENOUGH:
        raise NumericsError(f"only {last} of {count} answers are as wanted after the last stage; the line is broken")


def make_example(folder: Path) -> None:
    """Write the example and the tiny model to `folder`; UsageError when it is there already."""
    with publish_directory(folder) as temporary:
        for path in EXAMPLE.iterdir():
            if path.suffix in (".yaml", ".jsonl"):
                shutil.copyfile(path, temporary / path.name)
        write_tiny_checkpoint(temporary / MODEL)


def num_expected(pipeline: Pipeline) -> tuple[int, int, int]:
    """Return how many answers of the first and of the last model are as expected, and how many there are."""
    stage = pipeline.stage("answers")
    columns = []
    for model in (stage.files["models"][0], stage.files["models"][-1]):
        rows = [json.loads(line) for line in stage.answers(model).read_text(encoding="utf-8").splitlines()]
        columns.append(sum(row["completion"].strip() == row["expected"] for row in rows))
    return columns[0], columns[1], len(rows)


if __name__ == "__main__":
    sys.exit(run_guarded(identity))
