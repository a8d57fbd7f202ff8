"""An audit's report for people: lines of a terminal, and the lengths as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkits.foundation.errors import MachineError

from ..pieces import visible
from .findings import HARMFUL
from .run import Report

BAR = 40  # columns
Line = tuple[str, str]  # text and style


def lines(report: Report) -> list[Line]:
    """Return the report as lines, each with the style that a terminal shows it in."""
    found = _of_set("read", report.facts)
    if "lengths" in report.facts:
        found += [("", ""), *_lengths(report.facts), ("", ""), *_seq_lens(report.facts["seq_lens"])]
    if report.valid is not None:
        found += [("", ""), *_of_set("valid", report.valid)]
    found += [("", "")]
    harmful = report.harmful
    for finding in sorted(report.findings, key=lambda one: one not in harmful):
        word, style = ("HARM", "bold red") if finding in harmful else ("warning", "yellow")
        found.append((f"{word:8}{finding.code}: {visible(finding.message)}", style))
        found += [(f"{'':10}{visible(place)}", "dim") for place in finding.places]
    if not report.findings:
        found.append(("nothing found", "green"))
    return found


def verdict(report: Report) -> str:
    """Return the sentence that ends a report of harm: each kind of finding with what it does."""
    said = [f"{code}: {HARMFUL[code]}" for code in dict.fromkeys(finding.code for finding in report.harmful)]
    return f"training would be harmed ({'; '.join(said)}); mend it, or say --allow for what you mean to keep"


def draw(report: Report, path: Path) -> None:
    """Write the histogram of lengths, with the row lengths asked for, into a PNG; MachineError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MachineError("--png: matplotlib draws it; pip install matplotlib") from None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="rows", title=f"Lengths in {Path(report.facts['name']).name}")
    bars = report.facts.get("lengths", {}).get("histogram", [])
    drawn = [bar for bar in bars if bar["rows"]]
    widths = [bar["below"] - bar["from"] for bar in drawn]
    axes.bar([bar["from"] for bar in drawn], [bar["rows"] for bar in drawn], width=widths, align="edge", linewidth=0)
    longest = report.facts.get("lengths", {}).get("longest", 0)
    for one in report.facts.get("seq_lens", []):
        if one["seq_len"] <= longest:
            axes.axvline(one["seq_len"], color="tab:red", linewidth=1)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


def _of_set(word: str, facts: dict[str, Any]) -> list[Line]:
    bad = sum(facts["bad_rows"].values())
    found = [f"{word:10}{facts['name']}: {facts['read_as']}, {facts['rows']:,} rows" + f", {bad:,} bad" * bool(bad)]
    if facts["formats"]:
        found.append(f"{'formats':10}{_counted(facts['formats'])}")
    if facts["notes"]:
        found.append(f"{'accepted':10}{_counted(facts['notes'])}")
    if facts.get("languages"):
        found.append(f"{'languages':10}{_counted(facts['languages'])}")
    if "tokens" in facts:
        trained = facts["trained_tokens"]
        found.append(f"{'tokens':10}{facts['tokens']:,}, trained {trained:,} ({trained / facts['tokens']:.1%})")
    if "labels" in facts:
        found.append(f"{'labels':10}{_counted(facts['labels'])}")
    if "pairs" in facts:
        pairs = facts["pairs"]
        longer = f"chosen longer {pairs['chosen_longer']:,}, rejected longer {pairs['rejected_longer']:,}"
        found.append(f"{'pairs':10}{pairs['pairs']:,}: {longer}")
    for end in facts.get("answers_end_with", [])[:3]:
        found.append(f"{'end':10}{end['text']} ({end['id']}) ends {end['answers']:,} answers")
    return [(line, "") for line in found]


def _lengths(facts: dict[str, Any]) -> list[Line]:
    about = facts["lengths"]
    found = [
        f"{'lengths':10}shortest {about['shortest']:,}, median {about['p50']:,}, mean {about['mean']:,.0f}, "
        f"90% {about['p90']:,}, 99% {about['p99']:,}, longest {about['longest']:,} tokens"
    ]
    bars = about["histogram"]
    most = max(bar["rows"] for bar in bars)
    for bar in bars:
        label = f"{bar['from']:,}-{bar['below'] - 1:,}"
        filled = "█" * round(BAR * bar["rows"] / most) or "▏" * bool(bar["rows"])
        found.append(f"{label:>15} {filled:{BAR}} {bar['rows']:,}")
    return [(line, "") for line in found]


def _seq_lens(rows: Sequence[dict[str, Any]]) -> list[Line]:
    steps = "steps_an_epoch" in rows[0]
    names = ["seq len", "too long", "cut", "left out", "all masked", "rows unpacked", "rows packed", "fill"]
    table = [names + ["steps an epoch"] * steps]
    for row in rows:
        keys = ("seq_len", "too_long", "cut", "left_out", "all_masked", "rows_unpacked", "rows")
        figures = [f"{row[key]:,}" for key in keys] + [f"{row['fill']:.1%}"]
        table.append(figures + ([f"{row['steps_an_epoch']:,}"] if steps else []))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    said = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return [(line, "bold" if number == 0 else "") for number, line in enumerate(said)]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
