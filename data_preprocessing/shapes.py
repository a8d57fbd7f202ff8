"""Conversations of one shape look alike: render one with stand-ins, and fill the contents of every other one in.

Only for templates that copy contents (see flow.py). The shape is the turns' roles, which of them are empty and
which are trained.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from .masks import Span
from .samples import Rendered

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

    def content(self, contents: Sequence[str]) -> str:
        """Return the content of this slot as the template writes it."""
        text = contents[self.turn]
        if not self.left:
            return text.rstrip() if self.right else text
        return text.strip() if self.right else text.lstrip()


@dataclass(frozen=True)
class Shape:
    """The text around the contents: `literals` [slots + 1].

    `spans` holds (literal characters, slots) in front of each end of a trained span.
    """

    literals: tuple[str, ...]
    slots: tuple[Slot, ...]
    spans: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    num_control_tokens: int

    def fill(self, contents: Sequence[str], num_control_texts: int) -> Rendered:
        """Return the conversation with these contents."""
        filled = [slot.content(contents) for slot in self.slots]
        parts = [""] * (2 * len(filled) + 1)
        parts[::2], parts[1::2] = self.literals, filled
        lengths = list(accumulate(map(len, filled), initial=0))
        spans = [(start + lengths[before], end + lengths[past]) for (start, before), (end, past) in self.spans]
        return Rendered("".join(parts), spans, self.num_control_tokens, num_control_texts)


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
    return Shape(tuple(literals), slots, spans, rendered.num_control_tokens)
