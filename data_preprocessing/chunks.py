"""A chunk of rows -> tokens and masks: what a build does to each chunk, in whatever process.

prepare    JSON -> records -> rendered texts (Python)
encode     texts -> ids (the encoder's own code: the one part that another thread may do)
finish     ids -> tokens and masks (arrays)
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from toolkits.foundation.errors import UsageError

from .chat import ChatEncoder, TrainOn
from .dataset import Kind
from .encoders import EncoderName, Flat
from .records import Conversation, Document, Labelled, Preference, Prompt, Record, plain_conversations, record
from .rendered import Rendered, RenderedRows
from .row_error import RowError
from .rows import Row, Rows, is_exact, parse_row, parse_rows
from .samples import Samples
from .text import TextEncoder

MISSES = 4  # rows one behind the other that are not plain, after which no other one of their block is tried
ROWS_AT_ONCE = 128  # that are parsed and rendered together: what they say stays in a core's cache

KIND_OF: Mapping[type, Kind] = {
    Conversation: "conversations",
    Document: "text",
    Preference: "preferences",
    Labelled: "labelled",
    Prompt: "prompts",
}
ONE_OF: Mapping[Kind, tuple[str, str]] = {
    "conversations": ("a conversation", "conversations"),
    "text": ("plain text", "plain texts"),
    "preferences": ("a preference pair", "preference pairs"),
    "labelled": ("a labelled answer", "labelled answers"),
    "prompts": ("a prompt", "prompts"),
}


@dataclass(frozen=True)
class BuildOptions:
    """How a build treats its input."""

    on_bad_row: Literal["stop", "skip"] = "stop"
    max_bad: float = 0.01  # with skip: the fraction of rows that may be bad
    encoding: str = "utf-8"
    merge_consecutive: bool = False  # join neighbouring turns of one role instead of refusing them
    end_token: str | None = None  # behind each plain text; None: the tokenizer's own
    train_on: TrainOn = "all"  # which answers of conversations
    columns: tuple[tuple[str, str], ...] = ()  # (our name, the rows' name) of a key
    encoder: EncoderName = "auto"  # changes the speed, never the result, as the three below
    workers: int = 1  # processes; with one, threads of the encoder work beside Python
    chunk_rows: int = 2048  # rows that the encoder gets at once, at most: more need more memory
    save_seconds: float = 10.0  # between two points from which a killed build can go on


class Chunk(NamedTuple):
    """Rows that go through a build together; `first` counts the input's rows in front of them."""

    first: int
    rows: Rows


@dataclass
class Prepared:
    """A chunk's rendered rows: `groups` holds for each record the row it came from, `about` what is known of it.

    `about` is empty for kinds of rows of which nothing is.
    """

    chunk: Chunk
    rendered: RenderedRows = field(default_factory=RenderedRows)
    groups: list[int] = field(default_factory=list)
    about: list[bytes] = field(default_factory=list)
    rejects: list[tuple[int, RowError]] = field(default_factory=list)
    layouts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def num_characters(self) -> int:
        """The characters of the rendered texts; to be asked when they are complete."""
        return sum(map(len, self.rendered.texts))


@dataclass(frozen=True)
class Finished:
    """A chunk's samples, flat: `tokens` int32, `mask` uint8, `lengths` [rows], `about` a line of JSON for each row."""

    num_rows: int
    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    about: bytes
    rejects: list[tuple[Row, RowError]]
    layouts: Counter[str]
    control_texts: int
    rows_with_control_text: int


def chunks_of(batches: Iterable[Rows], *, chunk_rows: int, skip: int = 0) -> Iterator[Chunk]:
    """Yield rows in chunks, without the first `skip` of them."""
    first = 0
    for batch in batches:
        for start in range(max(0, skip - first), len(batch), chunk_rows):
            yield Chunk(first + start, batch[start : start + chunk_rows])
        first += len(batch)


class ChunkWork:
    """What is done to the chunks of a build whose rows are of one kind; `wants_records`: `record` is asked for each."""

    wants_records = False

    def __init__(self, kind: Kind, tokenizer: Path, options: BuildOptions) -> None:
        self.kind, self.options, self._is_single = kind, options, kind in ("conversations", "text")
        self._may_be_plain = kind == "conversations" and not options.columns and not self.wants_records
        self._together = ROWS_AT_ONCE if self._may_be_plain else 1  # rows that are tried: the more, the more are plain
        self.encoder: ChatEncoder | TextEncoder
        if kind == "text":
            self.encoder = TextEncoder(tokenizer, encoder=options.encoder, end_token=options.end_token)
            return
        if options.end_token is not None:
            raise UsageError("--end-token is for plain text; a chat template ends the turns of conversations itself")
        if kind in ("preferences", "prompts") and options.train_on != "all":
            raise UsageError(
                f"--train-on {options.train_on} is for conversations; {ONE_OF[kind][1]} have their own rule"
            )
        self.encoder = ChatEncoder(
            tokenizer, encoder=options.encoder, train_on=options.train_on, may_be_untrained=kind == "prompts"
        )
        self._render_plain = self.encoder.render_plain

    def __call__(self, chunk: Chunk) -> Finished:
        done = self.prepare(chunk)
        return self.finish(done, self.encode(done))

    def prepare(self, chunk: Chunk) -> Prepared:
        """Parse, check and render the rows of a chunk."""
        done = Prepared(chunk)
        for first in range(0, len(chunk.rows), ROWS_AT_ONCE):
            rows = chunk.rows[first : first + ROWS_AT_ONCE]
            self._prepare(done, first, parse_rows(rows, encoding=self.options.encoding))
        return done

    def _prepare(self, done: Prepared, first: int, values: list[Any]) -> None:
        """Check and render `values`, those of the rows from `first` on, as many at once as are plain."""
        start = misses = 0
        while start < len(values):
            together = values[start : start + self._together]
            if misses < MISSES and self._prepare_plain(done, first + start, together):
                self._together, misses = min(2 * self._together, ROWS_AT_ONCE), 0
            elif len(together) > 1:
                self._together = len(together) // 2
                continue
            else:
                self._prepare_one(done, first + start, values[start])
                misses += 1
            start += len(together)

    def _prepare_plain(self, done: Prepared, first: int, values: list[Any]) -> bool:
        """Render rows that are all plain; False when one is not."""
        turns = plain_conversations(values) if self._may_be_plain else None
        if turns is None or not self._render_plain(turns, done.rendered):
            return False
        done.layouts[turns.layout] += len(values)
        done.groups += range(first, first + len(values))
        return True

    def _prepare_one(self, done: Prepared, index: int, value: Any) -> None:
        try:
            if isinstance(value, RowError):
                raise value
            if not is_exact(done.chunk.rows.data[index]):
                value = parse_row(done.chunk.rows[index], encoding=self.options.encoding)
            found = self.record(index, value)
            rendered, about = self._render(found)
        except RowError as error:
            done.rejects.append((index, error))
            return
        done.rendered.extend(rendered)
        done.layouts[found.layout] += 1
        done.groups.append(index)
        if about:
            done.about.append(about)

    def record(self, index: int, value: Any) -> Record:
        """Return the record of the JSON value of a chunk's row `index`; RowError for none, or one of another kind."""
        found = record(value, merge_consecutive=self.options.merge_consecutive, columns=self.options.columns)
        kind = KIND_OF[type(found)]
        if kind != self.kind:
            said = f"{ONE_OF[kind][0]} in a file of {ONE_OF[self.kind][1]}; a dataset holds one of them"
            raise RowError("mixed", f"{said}: build each from a file of its own")
        return found

    def encode(self, done: Prepared) -> Flat:
        """Encode the texts of a prepared chunk, in whatever thread."""
        return self.encoder.flat(done.rendered)

    def finish(self, done: Prepared, flat: Flat) -> Finished:
        """Return what becomes of a prepared chunk with its texts encoded."""
        samples = self.encoder.samples(done.rendered, flat)
        size = 2 if self.kind == "preferences" else 1
        samples, failed = _without_failed_groups(samples, size)
        rejects = sorted(
            done.rejects + [(done.groups[group], error) for group, error in failed.items()], key=itemgetter(0)
        )
        rows = done.chunk.rows
        about = b"".join([line for group, line in enumerate(done.about) if group not in failed])
        hidden = [row.num_control_texts for row in done.rendered.hidden.values()]
        return Finished(
            num_rows=len(rows),
            tokens=samples.tokens,
            mask=samples.mask,
            lengths=samples.lengths[samples.lengths > 0],
            about=about,
            rejects=[(rows[index], error) for index, error in rejects],
            layouts=done.layouts,
            control_texts=sum(hidden),
            rows_with_control_text=len(hidden),
        )

    def about(self) -> dict[str, Any]:
        """Return what the manifest says of the encoding."""
        return {**self.encoder.about(), "kind": self.kind}

    def _render(self, found: Record) -> tuple[list[Rendered], bytes]:
        """Return the rows that a record becomes, and the line that .about gets."""
        if self._is_single:
            return [self.encoder.render(found)], b""  # type: ignore[arg-type]  # `record` keeps to one kind
        match found:
            case Preference():
                pair = (found.chosen, found.rejected)
                return [self._render_answer(one, found.num_shared) for one in pair], b""
            case Labelled():
                assert isinstance(self.encoder, ChatEncoder)  # `record` keeps to one kind
                talk = found.conversation
                asked = max((at for at, turn in enumerate(talk.messages) if turn.role == "user"), default=-1)
                return [self._render_answer(talk, asked + 1)], _line({"label": found.label})
            case Prompt():
                assert isinstance(self.encoder, ChatEncoder)  # `record` keeps to one kind
                return [self.encoder.render_prompt(found.conversation)], _line(found.about)
        raise AssertionError(f"a record of kind {self.kind}")

    def _render_answer(self, conversation: Conversation, num_shared: int) -> Rendered:
        """Render a conversation of which the answers behind the first turns are trained."""
        if any(message.loss not in (None, 0, 1) for message in conversation.messages):
            raise RowError("type", f"a weight is for answers of conversations; {ONE_OF[self.kind][0]} has none")
        assert isinstance(self.encoder, ChatEncoder)  # `record` keeps to one kind
        turns = enumerate(conversation.messages)
        trained = [turn >= num_shared and message.role == "assistant" for turn, message in turns]
        return self.encoder.render(conversation, trained=trained)


def read_record(row: Row, options: BuildOptions) -> Record:
    """Return the record of a row, whatever its kind."""
    value = parse_row(row, encoding=options.encoding)
    return record(value, merge_consecutive=options.merge_consecutive, columns=options.columns)


def _line(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:
        raise RowError("character", "the row has half of a surrogate pair beside its prompt") from None


def _without_failed_groups(samples: Samples, size: int) -> tuple[Samples, dict[int, RowError]]:
    """Return the samples without the groups of `size` rows of which one went wrong, and the errors by group."""
    failed: dict[int, RowError] = {}
    for number in sorted(samples.errors):
        failed.setdefault(number // size, samples.errors[number])
    if size == 1 or not failed:
        return samples, failed
    kept = np.ones(len(samples.lengths), bool)
    for group in failed:
        kept[group * size : (group + 1) * size] = False
    of_kept = np.repeat(kept, samples.lengths)
    lengths = np.where(kept, samples.lengths, 0)
    return Samples(samples.tokens[of_kept], samples.mask[of_kept], lengths, samples.errors), failed
