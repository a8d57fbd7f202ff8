"""The table of a launcher, for a terminal and for the README."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .arguments import BETA, CLUSTER_VARIABLES, LAUNCHERS, VARIABLES, Entry, Launcher
from .reading import complaint

WIDE = 120  # columns where nobody watches
MARKS = ("<!-- launcher-table -->", "<!-- /launcher-table -->")
LAUNCHER_MARKS = ("<!-- launchers -->", "<!-- /launchers -->")


def print_table(family: Launcher, given: Sequence[str], *, to_stderr: bool) -> None:
    """Print the positions with what was `given` beside them; the environment variables when nothing was."""
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, highlight=False, width=WIDE)
    table = Table("#", "name", "values", "what it does", *(["given"] if given else []), title=_usage(family, given))
    for number, entry in enumerate(family.positions, 1):
        word = [_given(entry, given[number - 1])] if number <= len(given) else [Text("missing", "red")]
        table.add_row(str(number), entry.name, entry.kind.values, entry.help, *(word if given else []))
    for number, extra in enumerate(given[len(family.positions) :], len(family.positions) + 1):
        table.add_row(str(number), Text("too many", "red"), "", "", Text(extra, "red"))
    console.print(table)
    if given:
        return
    variables = Table("environment", "values", "what it does")
    for entry in (*VARIABLES, *CLUSTER_VARIABLES):
        variables.add_row(entry.name, entry.kind.values, entry.help)
    console.print(variables)


def markdown_table(family: Launcher) -> str:
    """Return both tables as Markdown, as they stand in the README between MARKS."""
    lines = ["| # | name | values | what it does |", "|---|---|---|---|"]
    lines += [
        f"| {number} | {entry.name} | {entry.kind.values} | {entry.help} |"
        for number, entry in enumerate(family.positions, 1)
    ]
    lines += ["", "| environment | values | what it does |", "|---|---|---|"]
    variables = (*VARIABLES, *CLUSTER_VARIABLES)
    lines += [f"| `{entry.name}` | {entry.kind.values} | {entry.help} |" for entry in variables]
    return "\n".join(lines)


def markdown_launchers() -> str:
    """Return the launchers as Markdown, as they stand in the README between LAUNCHER_MARKS."""
    lines = ["| launcher | families | arguments |", "|---|---|---|"]
    for launcher in LAUNCHERS.values():
        extra = [entry.name for entry in launcher.positions if entry.name in ("ETP", "EP")]
        count = f"{len(launcher.positions)}" + (f", {' and '.join(extra)} behind CP" if extra else "")
        count += ", BETA last" * (BETA in launcher.positions)
        lines.append(f"| `{launcher.script}` | {', '.join(launcher.families)} | {count} |")
    return "\n".join(lines)


def _usage(family: Launcher, given: Sequence[str]) -> str:
    count = len(family.positions)
    title = f"sh {family.script} with {count} arguments"
    return f"{title}; {len(given)} given" if given else title


def _given(entry: Entry, word: str) -> Text:
    """Return `word`, marked when it does not fit: the first such row shows where a word is missing."""
    if complaint(entry, word) is None:
        return Text(word)
    return Text(f"{word}  <- does not fit", "red")
