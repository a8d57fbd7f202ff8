"""A conversation -> tokens and loss mask, born together.

    render    the model's own chat template writes the text; spans of characters say what is trained
    encode    the tokenizer turns texts into ids; a token is trained when its characters lie in a span

What the assistant wrote is trained, calls of tools too, with the end token behind it and without the newline behind
that; results of tools are not. Where the template only copies what messages say, conversations of one shape are
rendered once (see shapes.py).
"""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from toolkits.foundation.errors import DataError

from .control_text import ControlText
from .dataset import mask_byte
from .encoders import EncoderName, choose_encoder
from .masks import Span
from .records import Conversation
from .rendered import Rendered, RenderedRows
from .row_error import RowError
from .samples import SampleEncoder
from .shapes import LEFT, RIGHT, Shape, shape_of, stand_in
from .spans import SpanFinder
from .template import CHATML_SOURCE, CHATML_TOKENS, ChatTemplate, find_template
from .tokenizer import LoadedTokenizer, load_tokenizer
from .turns import Message, PlainTurns

TrainOn = Literal["all", "last", "marked"]
ESCAPED_HALF = re.compile(r"\\ud8[0-9a-f]{2}")  # of a surrogate pair: how JSON in ASCII would spell hidden text
MAX_SHAPES = 4096  # remembered; conversations of still other shapes are rendered one by one


class ChatEncoder(SampleEncoder):
    """A tokenizer folder's chat template and encoder.

    `train_on`: all answers but those that the row marks with `loss` false, the last of these, or those marked true;
    a mark may be a weight.
    `may_be_untrained`: a row of which nothing is trained is welcome.
    """

    def __init__(
        self,
        folder: Path,
        *,
        encoder: EncoderName = "auto",
        train_on: TrainOn = "all",
        may_be_untrained: bool = False,
    ) -> None:
        tokenizer = load_tokenizer(folder)
        source = find_template(tokenizer.folder, tokenizer.config)
        if source.origin == CHATML_SOURCE:
            _require_chatml_tokens(tokenizer)
        control = ControlText(tokenizer)
        super().__init__(tokenizer, choose_encoder(tokenizer, encoder), control, may_be_untrained=may_be_untrained)
        self.template, self.train_on = ChatTemplate(source, tokenizer.named), train_on
        self._finder = SpanFinder(self.template, control)
        self._shapes: dict[tuple[object, ...], Shape | None] = {}
        self._shapes_by_roles: dict[tuple[str, ...], Shape | None] = {}

    def render(self, conversation: Conversation, *, trained: Sequence[float] | None = None) -> Rendered:
        """Return the conversation's text and trained spans; `trained` says with which weight each turn is, 0 for none.

        Without it `train_on` decides. Raises RowError with reasons `template`, `dropped_turn`, `undecidable`,
        `no_end_token` and `control_text`.
        """
        if self.template.copies_contents and not conversation.tools:
            shape = self._shape(conversation.messages, trained)
            if shape is not None:
                hidden = [self._control.hide(message.content) for message in conversation.messages]
                return shape.fill([text for text, _ in hidden], sum([count for _, count in hidden]))
        wanted = trained if trained is not None else _trained_turns(conversation.messages, self.train_on)
        messages, tools, num_hidden = self._hidden(conversation)
        return self._rendered(messages, tools, wanted, num_hidden)

    def render_plain(self, turns: PlainTurns, rows: RenderedRows) -> bool:
        """Add what `render` would return of conversations of plain turns to `rows`; False where it must be asked."""
        if self._control.is_in(turns.contents):
            return False
        filled, first = [], 0
        for roles, group in groupby(turns.roles):
            count = sum(1 for _ in group)
            contents = turns.contents[first : first + count * len(roles)]
            first += len(contents)
            shape = self._shape_by_roles(roles, contents[: len(roles)])
            if shape is None:
                return False
            try:
                filled.append((shape.frame, *shape.fill_all(contents, len(roles))))
            except UnicodeEncodeError:
                return False
        for part in filled:
            rows.extend_alike(*part)
        return True

    def render_prompt(self, conversation: Conversation) -> Rendered:
        """Return the text in front of the answer that the conversation waits for, of which nothing is trained."""
        messages, tools, num_hidden = self._hidden(conversation)
        text, _ = self.template.render(messages, tools=tools, add_generation_prompt=True)
        self._finder.check_nothing_dropped(messages, tools, text)
        return Rendered(text, (), len(self._control.pattern.findall(text)), num_hidden)

    def about(self) -> dict[str, Any]:
        """Return what the manifest says of the encoding."""
        source = self.template.source
        template = {"source": source.origin, "sha256": source.sha256}
        return {"kind": "conversations", "chat_template": template, "train_on": self.train_on}

    def _shape_by_roles(self, roles: tuple[str, ...], contents: Sequence[str]) -> Shape | None:
        """Return the shape of conversations of plain turns with these roles, and remember it."""
        if roles in self._shapes_by_roles:
            return self._shapes_by_roles[roles]
        if len(self._shapes_by_roles) == MAX_SHAPES:
            return None
        messages = [Message(role, content) for role, content in zip(roles, contents, strict=True)]
        shape = self._shape(messages, None) if self.template.copies_contents else None
        self._shapes_by_roles[roles] = shape
        return shape

    def _shape(self, messages: Sequence[Message], trained: Sequence[float] | None) -> Shape | None:
        """Return the shape of such conversations; None where they must be rendered one by one."""
        turns = [(message.role, message.loss, not message.content) for message in messages]
        key = (tuple(turns), trained and tuple(trained))
        for message in messages:
            if not message.is_plain or message.content.isspace():
                return None
        # There are as many shapes as weights: they leave room for those of ordinary rows.
        weighted = any(message.loss not in (None, 0, 1) for message in messages)
        if key not in self._shapes and len(self._shapes) < MAX_SHAPES // (2 if weighted else 1):
            self._shapes[key] = self._new_shape(messages, trained or _trained_turns(messages, self.train_on))
        return self._shapes.get(key)

    def _new_shape(self, messages: Sequence[Message], wanted: Sequence[float]) -> Shape | None:
        trial = [
            message._replace(content=stand_in(number) if message.content else "")
            for number, message in enumerate(messages)
        ]
        padded = [one._replace(content=LEFT + one.content + RIGHT if one.content else "") for one in trial]
        try:
            rendered = self._rendered(trial, [], wanted, 0)
            return shape_of(rendered, self.template.render(padded)[0])
        except RowError:
            return None  # the row itself will say what is wrong

    def _rendered(
        self, messages: Sequence[Message], tools: list[dict[str, Any]], wanted: Sequence[float], num_hidden: int
    ) -> Rendered:
        text, spans, one_each = self._finder.render(messages, tools)
        if num_hidden and ESCAPED_HALF.search(text):
            raise RowError("control_text", "the chat template escapes control text in a message, which hides it")
        spans, weights = _chosen(spans, one_each, messages, wanted)
        return Rendered(text, tuple(spans), len(self._control.pattern.findall(text)), num_hidden, weights)

    def _hidden(self, conversation: Conversation) -> tuple[list[Message], list[dict[str, Any]], int]:
        """Return messages and tools with their control text hidden, and how many there were."""
        messages, total = [], 0
        for message in conversation.messages:
            content, count = self._control.hide(message.content)
            total += count
            if not message.is_plain:
                calls, in_calls = self._control.hide_all(list(message.tool_calls))
                reasoning, in_reasoning = self._control.hide(message.reasoning)
                name, in_name = self._control.hide_all(message.name)
                call_id, in_id = self._control.hide_all(message.tool_call_id)
                total += in_calls + in_reasoning + in_name + in_id
                message = message._replace(
                    tool_calls=tuple(calls), reasoning=reasoning, name=name, tool_call_id=call_id
                )
            messages.append(message._replace(content=content))
        tools, count = self._control.hide_all(list(conversation.tools))
        return messages, tools, total + count


def _trained_turns(messages: Sequence[Message], train_on: TrainOn) -> list[float]:
    """Return the weight with which each turn is trained."""
    unmarked = 0.0 if train_on == "marked" else 1.0
    marks = [unmarked if message.loss is None else message.loss for message in messages]
    weights = [mark * (message.role == "assistant") for mark, message in zip(marks, messages, strict=True)]
    return [*([0.0] * (len(weights) - 1)), weights[-1]] if train_on == "last" else weights


def _chosen(
    spans: list[Span], one_each: bool, messages: Sequence[Message], wanted: Sequence[float]
) -> tuple[list[Span], Sequence[int]]:
    """Return the spans of the turns that are wanted, and what the mask holds in each."""
    answers = [want for message, want in zip(messages, wanted, strict=True) if message.role == "assistant"]
    if all(answers) and len(set(answers)) < 2:
        return spans, [mask_byte(answers[0]) if answers else 1] * len(spans)
    if not one_each:
        raise RowError(
            "undecidable",
            f"the template marks {len(spans)} spans as generated for {len(answers)} answers, which are not all trained "
            "alike: which span is whose cannot be told",
        )
    chosen = [(span, mask_byte(want)) for span, want in zip(spans, answers, strict=True) if want]
    return [span for span, _ in chosen], [byte for _, byte in chosen]


def _require_chatml_tokens(tokenizer: LoadedTokenizer) -> None:
    missing = [token for token in CHATML_TOKENS if token not in tokenizer.control]
    if missing:
        raise DataError(
            f"{tokenizer.folder} has no chat template, and ChatML needs the special tokens {', '.join(missing)} that "
            "this tokenizer lacks; put a chat_template.jinja into the folder"
        )
