"""Tokens of questions -> tokens of answers, a batch at a time, with transformers' own loop.

An answer depends on its question, its number and the settings, never on what else is in the batch: the padding
stands on the left and is masked, and each answer draws from random numbers of its own.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..foundation.errors import NumericsError, UsageError
from .loading import context_of, explain_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Reason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen; `temperature` 0 takes the likeliest token each time.

    Above 0, tokens are drawn from the `top_k` likeliest (0: all), and of those from the likeliest that together have
    the probability `top_p` (Holtzman et al., 2020). Raises UsageError for choices that would do nothing.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise UsageError("--top-p and --top-k choose what is drawn from: give a --temperature above 0 too")


class Decoded(NamedTuple):
    """The tokens of an answer without the one that ends it, their number with it, and why no more came."""

    tokens: list[int]
    num_tokens: int
    reason: Reason


class Step(NamedTuple):
    """What one step of a batch gave: the new token of each row (None where it has ended), and how many rows ended."""

    tokens: list[int | None]
    ended: int


@dataclass(frozen=True)
class Watching:
    """Who follows a batch: `step` hears of each step, `stopped` is asked whether to break off."""

    step: Callable[[Step], object] = lambda step: None
    stopped: Callable[[], bool] = lambda: False


class Decoder:
    """Answers batches with one model; `ends` are the tokens that end an answer."""

    def __init__(self, model: "PreTrainedModel", ends: Sequence[int], decoding: Decoding) -> None:
        from transformers import GenerationConfig

        self.model, self.ends, self.decoding = model, frozenset(ends), decoding
        self.context = context_of(model)
        # What it would add to our settings, penalties for one, is not what was asked for.
        model.generation_config = GenerationConfig()
        model.generation_config.pad_token_id = min(self.ends, default=0)

    def room(self, num_tokens: int) -> int:
        """Return how many tokens an answer to a question of `num_tokens` may have; 0 when the question is too long."""
        most = self.decoding.max_new_tokens
        return most if self.context is None else max(0, min(most, self.context - num_tokens))

    def decode(
        self, questions: Sequence[Sequence[int]], numbers: Sequence[int], *, watching: Watching | None = None
    ) -> list[Decoded]:
        """Return the answers to the tokens of questions; `numbers` say which random numbers each draws.

        Raises MachineError when memory runs out, NumericsError when a logit is not a number.
        """
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        longest = max(map(len, questions))
        rows = [_Row(room=self.room(len(question))) for question in questions]
        watch = _Watch(rows, self.ends, watching or Watching())
        chooser = _Chooser(self.decoding, numbers)
        ids = torch.tensor([[0] * (longest - len(question)) + list(question) for question in questions])
        mask = torch.tensor([[0] * (longest - len(question)) + [1] * len(question) for question in questions])
        doing = f"answering {len(questions)} questions of up to {longest:,} tokens at once"
        smaller = f"--batch-size {len(questions) // 2}, " if len(questions) > 1 else ""
        with torch.inference_mode(), explain_memory(doing, f"{smaller}--dtype bfloat16, fewer --max-new-tokens"):
            self.model.generate(  # type: ignore[operator]
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=GenerationConfig(max_new_tokens=max(row.room for row in rows), do_sample=False),
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        return [row.decoded() for row in rows]


@dataclass
class _Row:
    """An answer while it grows."""

    room: int
    tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None

    def add(self, token: int, ends: frozenset[int]) -> None:
        self.tokens.append(token)
        if token in ends:
            self.reason = "stop"
        elif len(self.tokens) == self.room:
            self.reason = "length"

    def decoded(self) -> Decoded:
        assert self.reason is not None  # the loop ends when every row has
        kept = self.tokens[:-1] if self.reason == "stop" else self.tokens
        return Decoded(kept, len(self.tokens), self.reason)


class _Watch:
    """A stopping criterion of transformers that takes down each row's answer and says which have ended."""

    def __init__(self, rows: Sequence[_Row], ends: frozenset[int], watching: Watching) -> None:
        self.rows, self._ends, self._watching = rows, ends, watching

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens: list[int | None] = list(input_ids[:, -1].tolist())
        ended = 0
        for number, row in enumerate(self.rows):
            if row.reason is not None:
                tokens[number] = None
                continue
            row.add(tokens[number], self._ends)  # type: ignore[arg-type]
            ended += row.reason is not None
        self._watching.step(Step(tokens, ended))
        if self._watching.stopped():
            for row in self.rows:
                row.reason = row.reason or "interrupted"
        return torch.tensor([row.reason is not None for row in self.rows], device=input_ids.device)


class _Chooser:
    """A logits processor of transformers that leaves of each row's logits [b, vocabulary] the one that is chosen."""

    def __init__(self, decoding: Decoding, numbers: Sequence[int]) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        # Text as the seed: Python hashes it the same way everywhere.
        self._draws = [random.Random(f"{decoding.seed}:{number}") for number in numbers]
        self._warpers: list[Any] = []
        if decoding.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_k > 0:
                self._warpers.append(TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1:
                self._warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise NumericsError(
                "the model's logits are not numbers: its weights are damaged (temper convert inspect), or too large "
                "for float16 (--dtype bfloat16)"
            )
        if not self._warpers:
            return scores
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        place = torch.tensor([draw.random() for draw in self._draws], dtype=torch.float64, device=scores.device)
        chosen = draw_tokens(scores, place)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw_tokens(scores: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return the tokens [b] at `place` [b], in [0, 1), of the distributions that logits [b, vocabulary] say."""
    reach = torch.softmax(scores.double(), -1).cumsum(-1)
    total = reach[:, -1]
    # Below the sum, whatever is rounded: then the token that is found has a probability.
    place = torch.minimum(place * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reach, place[:, None], right=True)[:, 0]
