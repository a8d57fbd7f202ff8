"""Settings of a stage: the options of the command that it runs, by their flags with underscores.

Names, types, choices and defaults are the command's own, so whatever `temper` learns a stage can say.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from .document import Node


@dataclass(frozen=True)
class Option:
    """One option of a command, under the name that it has in a pipeline's file."""

    name: str
    parameter: click.Option
    default: Any

    @property
    def flag(self) -> str:
        """The flag as it is typed, the longest where it has several."""
        return max(self.parameter.opts, key=len)

    def read(self, node: Node) -> tuple[list[Any], list[str]]:
        """Return the values that a node says, and what is wrong with it.

        A list has several where the option can be given several times; each is a tuple where it takes several words.
        """
        problems: list[str] = []
        words = self.parameter.nargs
        items = node.value if self.parameter.multiple and isinstance(node.value, list) else [node]
        if words > 1 and items and all(isinstance(each.value, str) for each in items):
            items = [Node(node.line, items)]
        return [self._one(each, words, problems) for each in items], problems

    def _one(self, node: Node, words: int, problems: list[str]) -> Any:
        if words == 1:
            return self._scalar(node, problems)
        if not isinstance(node.value, list) or len(node.value) != words:
            problems.append(f"{self.name} takes lists of {words} texts")
            return None
        return tuple(self._scalar(each, problems) for each in node.value)

    def _scalar(self, node: Node, problems: list[str]) -> Any:
        if not isinstance(node.value, str):
            problems.append(f"{self.name} takes a single value, this is {node.kind}")
            return None
        try:
            return self.parameter.type.convert(node.value, self.parameter, None)
        except click.BadParameter as error:
            problems.append(f"{self.name}: {error.message.rstrip('.')}")
            return None

    def words(self, values: Sequence[Any]) -> Iterator[str]:
        """Yield what is typed to say `values`."""
        for value in values:
            if self.parameter.is_flag and self.parameter.secondary_opts:
                yield self.flag if value else self.parameter.secondary_opts[0]
            elif self.parameter.is_flag:
                yield from [self.flag] if value else []
            else:
                yield self.flag
                yield from map(str, value if isinstance(value, tuple) else (value,))

    def is_default(self, values: Sequence[Any]) -> bool:
        """Whether saying `values` says nothing."""
        return len(values) == 1 and values[0] == self.default


def options_of(
    command: click.Command, *, renamed: Mapping[str, str], without: Collection[str]
) -> tuple[dict[str, Option], dict[str, Option]]:
    """Return the options of a command by name: those that a stage may say, and those `without` that are not its."""
    context = click.Context(command, info_name=command.name, **command.context_settings)
    found = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            name = max(parameter.opts, key=len).removeprefix("--").replace("-", "_")
            found[name] = Option(renamed.get(name, name), parameter, parameter.get_default(context))
    open_ = {option.name: option for name, option in found.items() if name not in without}
    return open_, {option.name: option for name, option in found.items() if name in without}


def nearest(name: str, known: Collection[str], *, else_see: str = "") -> str:
    """Return the end of a sentence that names what may have been meant, else all there is, or where that stands."""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else else_see or f"there is {', '.join(known)}"


def parsed(command: click.Command, words: Sequence[str]) -> Mapping[str, Any]:
    """Return the parameters that a command gets of `words`; click.UsageError when it would refuse them."""
    return command.make_context(command.name, list(words)).params
