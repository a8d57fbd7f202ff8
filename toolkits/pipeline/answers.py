"""What several models answered to the same prompts, side by side: a table on the screen and in Markdown."""

import json
from pathlib import Path
from typing import Any

from ..foundation.publish import write_text
from .stage import Stage, shown

TABLE = "answers.md"
WIDEST = 60  # characters of an answer on the screen


def show_answers(stage: Stage) -> None:
    """Print the table of a stage `generate` and write it to its folder."""
    from rich.console import Console
    from rich.table import Column, Table

    from ..generation.texts import for_terminal

    names, rows = read_answers(stage)
    table = Table(*(Column(name, overflow="fold") for name in names))
    for row in rows:
        table.add_row(*(_clipped(for_terminal(text)) for text in row))
    Console(highlight=False).print(table)
    target = stage.folder / TABLE
    write_text(target, _markdown(names, rows))
    print(f"written   {shown(target)}", flush=True)


def read_answers(stage: Stage) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table: the last thing asked, then what each model answered."""
    columns = [_rows(stage.answers(model)) for model in stage.files["models"]]
    names = ["prompt", *(str(model.column) for model in stage.files["models"])]
    rows = []
    for row in zip(*columns, strict=True):
        prompt = row[0]["prompt"]
        asked = prompt if isinstance(prompt, str) else " / ".join(turn["content"] for turn in prompt)
        rows.append([asked, *(str(each["completion"]) for each in row)])
    return names, rows


def _rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:  # which end with newlines alone: other ends of lines are text
        return [json.loads(line) for line in lines]


def _markdown(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def _clipped(text: str) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= WIDEST else line[:WIDEST] + " ...").replace("[", "\\[")
