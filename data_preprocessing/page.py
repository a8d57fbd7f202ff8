"""Entries of a dataset as one HTML page that needs nothing else: no script, no font, no file beside it."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from toolkits.foundation.errors import UsageError
from toolkits.foundation.publish import write_text

from .inspect import Entries, Entry, Section
from .pieces import KINDS, Piece

# Nothing is loaded and nothing runs, whatever a row says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --trained: #b9f0c4; --control: #a0308f; --context: #666; }
@media (prefers-color-scheme: dark) { :root { --trained: #14532d; --control: #f0a0e4; --context: #999; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
h2, h3 { font-size: 1em; margin: 1.5em 0 .3em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .92em;
  border: 1px solid #8886; border-radius: 4px; padding: .6em; }
.trained { background: var(--trained); }
.context { color: var(--context); }
.control { color: var(--control); }
.trained.control { background: var(--trained); color: var(--control); font-weight: bold; }
"""


def write_page(entries: Entries, numbers: Iterable[int], path: Path, *, overwrite: bool = False) -> None:
    """Write the entries `numbers` into the page `path`; UsageError when it exists and `overwrite` does not say so."""
    if path.exists() and not overwrite:
        raise UsageError(f"output exists already: {path}; use --overwrite to replace it or choose another")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: its folder is not there; make it or choose another")
    write_text(path, page(entries.dataset.path.name, [entries[number] for number in numbers]))


def page(title: str, entries: Iterable[Entry]) -> str:
    """Return the page of entries."""
    legend = " ".join(f'<span class="{kind}">{kind}</span>' for kind in KINDS)
    body = "\n".join(map(_article, entries))
    return (
        f'<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n<p>{legend}</p>\n{body}\n</body>\n</html>\n"
    )


def _article(entry: Entry) -> str:
    sections = "\n".join(map(_section, entry.sections))
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in entry.notes)
    return f"<article>\n<h2>{escape(entry.heading)}</h2>\n{sections}\n{notes}</article>"


def _section(section: Section) -> str:
    title = f"<h3>{escape(section.title)}</h3>\n" if section.title else ""
    return f'{title}<div class="text" dir="auto">{"".join(map(_span, section.pieces))}</div>'


def _span(piece: Piece) -> str:
    where = f"token {piece.first}" if piece.first == piece.last else f"tokens {piece.first} to {piece.last}"
    return f'<span class="{piece.kind}" title="{where}: {piece.kind}">{escape(piece.text)}</span>'
