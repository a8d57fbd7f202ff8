"""Conversations of one shape look alike: render one with stand-ins, and fill the contents of every other one in.

Only for templates that copy contents (see flow.py). The shape is the turns' roles, which of them are empty and
which are trained.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, repeat
from typing import NamedTuple

from .masks import Frame, Span
from .rendered import Rendered

# What stands in for contents: a number between private-use characters, that no template asks for.
STAND_IN = re.compile("\ue0f0([0-9]+)\ue0f1")
# White space that no template writes; around a stand-in it tells whether the template strips contents.
LEFT, RIGHT = "\u2003\u2009", "\u2009\u2003"
PADDED = re.compile(f"({LEFT})?\ue0f0([0-9]+)\ue0f1({RIGHT})?")


def stand_in(number: int) -> str:
    """Return what stands in for the content of turn `number`."""
    return f"\ue0f0{number}\ue0f1"


class Slot(NamedTuple):
    """Where a content goes, and on which sides it is stripped."""

    turn: int
    left: bool
    right: bool

    def cut(self, content: str) -> str:
        """Return the content of this slot as the template writes it."""
        if not self.left:
            return content.rstrip() if self.right else content
        return content.strip() if self.right else content.lstrip()

    def cut_all(self, contents: Sequence[str]) -> Sequence[str]:
        """Return the content of this slot in several conversations."""
        return [self.cut(content) for content in contents] if self.left or self.right else contents


Edges = tuple[tuple[int, int], tuple[int, int]]  # (literal characters, slots) in front of a span's start and end


@dataclass(frozen=True)
class Shape:
    """The text around the contents: `literals` [slots + 1]."""

    literals: tuple[str, ...]
    slots: tuple[Slot, ...]
    spans: tuple[Edges, ...]
    marks: tuple[int, ...]
    num_control_tokens: int

    def fill(self, contents: Sequence[str], num_control_texts: int) -> Rendered:
        """Return the conversation with these contents."""
        parts = [slot.cut(contents[slot.turn]) for slot in self.slots]
        spans = _placed(self.spans, map(len, parts))
        return Rendered(self._text(parts), spans, self.num_control_tokens, num_control_texts, self.marks)

    def fill_all(self, contents: Sequence[str], num_turns: int) -> tuple[list[str], list[int]]:
        """Return conversations without control text, and the UTF-8 bytes of what fills the slots of each.

        `contents` [conversations x num_turns]. UnicodeEncodeError where one cannot be encoded.
        """
        columns = [slot.cut_all(contents[slot.turn :: num_turns]) for slot in self.slots]
        parts = contents if self._takes_all else list(chain.from_iterable(zip(*columns, strict=True)))
        if len(contents) == num_turns:
            texts = [self._text(parts)]
        else:
            literals = [repeat(literal, len(contents) // num_turns) for literal in self.literals]
            pieces = chain.from_iterable(zip(literals, columns, strict=False))
            texts = list(map("".join, zip(*pieces, literals[-1], strict=True)))
        return texts, [len(part) if part.isascii() else len(part.encode()) for part in parts]

    def _text(self, parts: Sequence[str]) -> str:
        return "".join([*chain.from_iterable(zip(self.literals, parts, strict=False)), self.literals[-1]])

    @cached_property
    def _takes_all(self) -> bool:
        """Whether the slots take contents once, in order and as they are."""
        return all(slot == (turn, False, False) for turn, slot in enumerate(self.slots))

    @cached_property
    def frame(self) -> Frame:
        """What conversations of this shape have in common."""
        literal = "".join(self.literals)
        edges = [edge for span in self.spans for edge in span]
        return Frame(
            len(literal.encode()),
            len(self.slots),
            tuple([len(literal[:characters].encode()) for characters, _ in edges]),
            tuple([slots for _, slots in edges]),
            self.marks,
            self.num_control_tokens,
        )


def _placed(spans: Sequence[Edges], lengths: Iterable[int]) -> list[Span]:
    """Return the spans of a text whose slots are filled with contents of these lengths."""
    before = [0, *accumulate(lengths)]
    return [(start + before[slots], end + before[past]) for (start, slots), (end, past) in spans]


def shape_of(rendered: Rendered, padded: str) -> Shape | None:
    """Return the shape of a conversation of stand-ins; `padded` is its text with white space around each of them.

    None when the two texts differ in more than that.
    """
    found = list(STAND_IN.finditer(rendered.text))
    found_padded = list(PADDED.finditer(padded))
    if PADDED.sub(lambda match: stand_in(int(match[2])), padded) != rendered.text or len(found) != len(found_padded):
        return None
    slots = tuple(Slot(int(match[2]), match[1] is None, match[3] is None) for match in found_padded)

    def place(character: int) -> tuple[int, int]:
        before = [match for match in found if match.end() <= character]
        return character - sum(match.end() - match.start() for match in before), len(before)

    def cuts(span: Span) -> bool:
        return any(match.start() < edge < match.end() for match in found for edge in span)

    if any(map(cuts, rendered.spans)):
        return None
    spans = tuple((place(start), place(end)) for start, end in rendered.spans)
    literals = STAND_IN.split(rendered.text)[::2]
    return Shape(tuple(literals), slots, spans, tuple(rendered.marks), rendered.num_control_tokens)
