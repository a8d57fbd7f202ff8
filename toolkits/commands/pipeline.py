"""`temper pipeline`: stages of building, training and answering, each going on where it stopped."""

import shlex
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", metavar="FILE.yaml", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Check the file, say what would run, and stop.")
@click.option("--only", metavar="STAGE", help="Run this stage alone; what it reads must be there.")
@click.option("--redo", multiple=True, metavar="STAGE", help="Run a stage and all that rests on it anew.")
@click.option("--status", is_flag=True, help="Say how the stages stand, what each was made of, and the lineage.")
def pipeline(file: Path, dry_run: bool, only: str | None, redo: tuple[str, ...], status: bool) -> None:
    """Run the stages in FILE.yaml: build data, train, make pairs, answer.

    Each stage is a command of temper with its flags as settings, and reads files or what a stage before it makes:
    `{NAME}`. The whole file is checked before anything runs. The same line skips what is done and unchanged and goes
    on where it stopped; a stage that changed is refused until --redo says so.

    \b
    output: out
    model: Qwen2.5-7B-Instruct
    stages:
      - {name: chats, do: build, input: chats.jsonl}
      - {name: tuned, do: sft, data: "{chats}", epochs: 2, lr: 1e-5}
      - {name: said, do: pairs, model: "{tuned}", prompts: ask.jsonl, replace: [["I'm A", "I'm B"]]}
      - {name: better, do: build, input: "{said}"}
      - {name: aligned, do: dpo, model: "{tuned}", data: "{better}", epochs: 1, lr: 1e-6}
      - {name: answers, do: generate, models: {before: "{tuned}", after: "{aligned}"}, input: ask.jsonl}
    """
    from ..foundation.errors import UsageError
    from ..pipeline.reading import read_pipeline

    given = [flag for flag, said in (("--dry-run", dry_run), ("--only", only), ("--redo", redo)) if said]
    if status and given:
        raise UsageError(f"--status only looks: leave {', '.join(given)} out")
    found = read_pipeline(file)
    if status:
        from ..pipeline.status import status_lines

        for line in status_lines(found):
            click.echo(line)
        return
    from ..pipeline.running import run_pipeline

    again = shlex.join(
        ["temper", "pipeline", str(file), *(["--only", only] if only else [])]
    )  # not --redo: that is done
    run_pipeline(found, only=only, redo=redo, dry=dry_run, again=again)
