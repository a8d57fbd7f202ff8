"""The steps that decide about each row alone: length, language, quality."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from toolkits.foundation.errors import UsageError

from ..chat import ChatEncoder
from ..languages import LANGUAGES, language_of
from ..records import Conversation, Document, Labelled, Preference
from ..rendered import Rendered
from ..row_error import RowError
from ..text import TextEncoder
from .facts import Facts, Part
from .quality import SIGNS
from .step import Chooser, Judge, Resources, Step, Verdict, option, part_option


@dataclass(frozen=True)
class Length(Step):
    """Keep rows of a length between two bounds."""

    name: ClassVar[str] = "length"
    reasons: ClassVar[Mapping[str, str]] = {"short": "shorter than min", "long": "longer than max"}
    min: int | None = option("the shortest that stays", None)
    max: int | None = option("the longest that stays", None)
    unit: str = option(
        "what is counted; tokens are those of the row as `temper data build` renders it, with --tokenizer",
        "characters",
        choices=("characters", "tokens"),
    )
    of: Part = part_option("row")

    def problems(self) -> list[str]:
        if self.min is None and self.max is None:
            return ["needs min or max"]
        if self.min is not None and self.max is not None and self.min > self.max:
            return [f"min={self.min} is above max={self.max}: no row would stay"]
        if self.unit == "tokens" and self.of != "row":
            return ["unit=tokens counts whole rows: leave `of` out"]
        return []

    def start(self, resources: Resources) -> Judge:
        if self.unit == "characters":
            return _Length(self)
        if resources.tokenizer is None:
            raise UsageError("length:unit=tokens needs --tokenizer, the HuggingFace folder of the model")
        return _Length(self, TokenCounter(resources.tokenizer))


class _Length(Judge):
    def __init__(self, settings: Length, tokens: "TokenCounter | None" = None) -> None:
        self._settings, self._tokens = settings, tokens

    def judge(self, rows: Sequence[Facts]) -> list[Verdict | None]:
        if self._tokens is None:
            return [self._verdict(len(row.text(self._settings.of))) for row in rows]
        counted = self._tokens.count(rows)
        return [
            Verdict(count.reason, str(count)) if isinstance(count, RowError) else self._verdict(count)
            for count in counted
        ]

    def _verdict(self, length: int) -> Verdict | None:
        settings = self._settings
        if settings.min is not None and length < settings.min:
            return Verdict("short", f"{length:,} {settings.unit}, fewer than {settings.min:,}")
        if settings.max is not None and length > settings.max:
            return Verdict("long", f"{length:,} {settings.unit}, more than {settings.max:,}")
        return None


class TokenCounter:
    """Counts the tokens that rows will have in a dataset; of a pair, those of its longer side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chat: ChatEncoder | None = None
        self._text: TextEncoder | None = None

    def count(self, rows: Sequence[Facts]) -> list[int | RowError]:
        """Return the number of tokens of each row, or why a build would refuse it."""
        counts: list[int | RowError] = [0] * len(rows)
        for of_text in (False, True):
            places = [place for place, row in enumerate(rows) if isinstance(row.record, Document) == of_text]
            rendered: list[Rendered] = []
            owners: list[int] = []
            for place in places:
                try:
                    sides = self._rendered(rows[place])
                except RowError as error:
                    counts[place] = error
                else:
                    rendered += sides
                    owners += [place] * len(sides)
            if rendered:
                samples = self._encoder(of_text).encode(rendered)
                for at, (owner, length) in enumerate(zip(owners, samples.lengths.tolist(), strict=True)):
                    before = counts[owner]
                    found = samples.errors.get(at, length)
                    counts[owner] = before if isinstance(before, RowError) else _greater(before, found)
        return counts

    def _encoder(self, of_text: bool) -> ChatEncoder | TextEncoder:
        if of_text:
            self._text = self._text or TextEncoder(self._folder)
            return self._text
        self._chat = self._chat or ChatEncoder(self._folder, may_be_untrained=True)
        return self._chat

    def _rendered(self, row: Facts) -> list[Rendered]:
        found, encoder = row.record, self._encoder(isinstance(row.record, Document))
        if isinstance(found, Document):
            assert isinstance(encoder, TextEncoder)
            return [encoder.render(found)]
        assert isinstance(encoder, ChatEncoder)
        if isinstance(found, Preference):
            return [encoder.render(found.chosen), encoder.render(found.rejected)]
        if isinstance(found, Conversation):
            return [encoder.render(found)]
        if isinstance(found, Labelled):
            return [encoder.render(found.conversation)]
        return [encoder.render_prompt(found.conversation)]


def _greater(before: int, found: int | RowError) -> int | RowError:
    return found if isinstance(found, RowError) else max(before, found)


@dataclass(frozen=True)
class Language(Step):
    """Keep rows in some languages, or drop those in some, by a guess from script and little words."""

    name: ClassVar[str] = "language"
    reasons: ClassVar[Mapping[str, str]] = {"language": "in another language"}
    keep: tuple[str, ...] = option("the languages that stay", (), choices=LANGUAGES)
    drop: tuple[str, ...] = option("the languages that go", (), choices=LANGUAGES)
    of: Part = part_option("row")

    def problems(self) -> list[str]:
        return [] if bool(self.keep) != bool(self.drop) else ["needs either keep or drop, a list of languages"]

    def start(self, resources: Resources) -> Judge:
        return _Language(self)


class _Language(Judge):
    def __init__(self, settings: Language) -> None:
        self._settings = settings

    def judge(self, rows: Sequence[Facts]) -> list[Verdict | None]:
        return [self._verdict(language_of(row.text(self._settings.of))) for row in rows]

    def _verdict(self, language: str) -> Verdict | None:
        keep, drop = self._settings.keep, self._settings.drop
        if language in drop or (keep and language not in keep):
            return Verdict("language", f"looks like {language}")
        return None


@dataclass(frozen=True)
class Quality(Step):
    """Drop rows with an answer that no model should learn from."""

    name: ClassVar[str] = "quality"
    reasons: ClassVar[Mapping[str, str]] = {name: said for name, (said, _) in SIGNS.items()}
    signs: tuple[str, ...] = option("what is looked for", tuple(SIGNS), choices=tuple(SIGNS))

    def start(self, resources: Resources) -> Judge | Chooser:
        return _Quality(self)


class _Quality(Judge):
    def __init__(self, settings: Quality) -> None:
        self._signs = [(name, sign) for name, (_, sign) in SIGNS.items() if name in settings.signs]

    def judge(self, rows: Sequence[Facts]) -> list[Verdict | None]:
        return [self._verdict(row) for row in rows]

    def _verdict(self, row: Facts) -> Verdict | None:
        for name, sign in self._signs:
            for turn, answer in row.answers:
                said = sign(answer)
                if said:
                    return Verdict(name, said if isinstance(row.record, Document) else f"turn {turn}: {said}")
        return None
