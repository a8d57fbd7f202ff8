"""A YAML file as values that know the line they stand on; scalars stay the text that was typed.

YAML takes `1e-5` for a text and `no` for a boolean: what a word means is for the setting to say that it is given to.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..foundation.errors import UsageError, raise_all

_STANDARD = "tag:yaml.org,2002:"
_SCALARS = tuple(_STANDARD + kind for kind in ("str", "int", "float", "bool", "timestamp"))
_NULL, _MERGE = _STANDARD + "null", "<<"
MOST_NODES = 100_000  # aliases of aliases could make any number of a few lines


@dataclass(frozen=True)
class Node:
    """A value and its line: a text, None, a list of nodes, or a dict of names to nodes."""

    line: int
    value: Any

    @property
    def kind(self) -> str:
        """What it is, for a complaint."""
        kinds = {"str": "a text", "list": "a list", "dict": "a mapping"}
        return kinds.get(type(self.value).__name__, "nothing")


@dataclass
class Complaints:
    """What is wrong with a file, each with its line."""

    file: Path
    problems: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, problem: str) -> None:
        """Note one."""
        self.problems.append((line, problem))

    def raise_them(self) -> None:
        """Raise UsageError that lists all of them in the order of their lines."""
        found = [f"{self.file}:{line}: {problem}" for line, problem in sorted(self.problems, key=lambda one: one[0])]
        raise_all(UsageError, "the pipeline cannot run", list(dict.fromkeys(found)))


def read_document(complaints: Complaints) -> Node:
    """Return what stands in the file; UsageError when it is no YAML or cannot be read."""
    import yaml

    file = complaints.file
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UsageError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        raise UsageError(f"{file} is empty")
    return _Reader(complaints).node(root)


class _Reader:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, complaints: Complaints) -> None:
        self._complaints, self._within, self._count = complaints, set[int](), 0

    def node(self, node: Any) -> Node:
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > MOST_NODES or id(node) in self._within:
            raise UsageError(f"{self._complaints.file}:{line}: an alias that contains itself, or far too many of them")
        self._within.add(id(node))
        try:
            return Node(line, self._value(node, line))
        finally:
            self._within.remove(id(node))

    def _value(self, node: Any, line: int) -> Any:
        if isinstance(node.value, str):
            if node.tag not in (*_SCALARS, _NULL):
                self._complaints.add(line, f"a value of another kind ({node.tag}): write it as text")
            return None if node.tag == _NULL else node.value
        if node.tag == _STANDARD + "seq":
            return [self.node(each) for each in node.value]
        return dict(self._pairs(node))

    def _pairs(self, node: Any) -> Iterator[tuple[str, Node]]:
        """Yield the names of a mapping and what they stand for: first what is merged in, then its own."""
        own: dict[str, int] = {}
        for key, value in node.value:
            if key.value == _MERGE:
                parts = value.value if value.tag == _STANDARD + "seq" else [value]
                for part in reversed(parts):
                    merged = self.node(part).value
                    if isinstance(merged, dict):
                        yield from merged.items()
                    else:
                        self._complaints.add(part.start_mark.line + 1, "<< takes a mapping")
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key.value, str):
                self._complaints.add(line, "a name must be a text")
            elif key.value != _MERGE:
                if key.value in own:
                    self._complaints.add(line, f"{key.value} stands twice, in line {own[key.value]} too")
                own[key.value] = line
                yield key.value, Node(line, self.node(value).value)
