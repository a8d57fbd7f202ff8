"""What a reward model makes of conversations: rows in, each with its score out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_preprocessing.records import Conversation, Labelled, Preference, record
from data_preprocessing.row_error import RowError
from data_preprocessing.rows import Row, parse_row

from ..foundation.errors import DataError, raise_all
from ..foundation.progress import Progress
from .answering import batches_of
from .loading import Source, context_of, explain_memory, load_model, require_huggingface, require_kind
from .prompts import MOST_PROBLEMS, read_all
from .texts import Texts


@dataclass(frozen=True)
class Judged:
    """A row as it was read, and the conversations in it by the names that their scores get."""

    value: dict[str, Any]
    talks: dict[str, Conversation]
    where: str


def read_judged(source: Path) -> list[Judged]:
    """Return the rows of a file, of those that a pattern names, or of stdin (`-`).

    They are in any layout that `temper data build` reads and have an answer; a pair has two. Raises DataError that
    lists what is wrong with which row.
    """

    def judged(row: Row, _: Path, where: str) -> Judged:
        value = parse_row(row)
        return Judged(value, _talks(value), where)

    return read_all(source, judged, wrong="rows that cannot be scored", empty="no row in it")


def _talks(value: Any) -> dict[str, Conversation]:
    found = record(value)
    if isinstance(found, Preference):
        return {"score_chosen": found.chosen, "score_rejected": found.rejected}
    if isinstance(found, Labelled):
        return {"score": found.conversation}
    if isinstance(found, Conversation):
        return {"score": found}
    raise RowError("layout", "the row has no answer to score")


class Scorer:
    """A reward model with its tokenizer and template. Raises as `load_model`, `require_kind` and `Texts` do."""

    def __init__(self, source: Source) -> None:
        require_huggingface(source.folder)
        require_kind(source, scores=True)
        self.texts = Texts(source.folder)
        self.model = load_model(source, scores=True)
        self._pad = self.model.config.get_text_config().pad_token_id

    def score_all(self, rows: Sequence[Judged], *, batch_size: int) -> list[dict[str, Any]]:
        """Return each row with its scores beside what it had, with progress on stderr.

        Raises DataError that lists the conversations that the template refuses or the model cannot read whole.
        """
        tokens = self._tokens(rows)
        scores = self.scores(tokens, batch_size=batch_size)
        told = iter(scores)
        return [row.value | {name: next(told) for name in row.talks} for row in rows]

    def scores(self, tokens: Sequence[Sequence[int]], *, batch_size: int) -> list[float]:
        """Return the score of each sequence of token ids; rows are padded on the right."""
        found: dict[int, float] = {}
        size = 1 if self._pad is None else batch_size  # without a pad token transformers finds one row's end only
        with Progress("scoring", len(tokens), unit="answers") as progress:
            for batch in batches_of([len(each) for each in tokens], size):
                longest = max(len(tokens[number]) for number in batch)
                ids = torch.full((len(batch), longest), self._pad or 0)
                mask = torch.zeros_like(ids)
                for place, number in enumerate(batch):
                    ids[place, : len(tokens[number])] = torch.tensor(tokens[number])
                    mask[place, : len(tokens[number])] = 1
                found |= dict(zip(batch, self._batch(ids, mask), strict=True))
                progress.advance(len(batch))
        return [found[number] for number in range(len(tokens))]

    def _batch(self, ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
        device = self.model.device
        options = "a smaller --batch-size, --dtype bfloat16, or --device cpu"
        with torch.no_grad(), explain_memory(f"scoring {len(ids)} answers", options):
            output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        return output.logits[:, 0].float().tolist()  # type: ignore[no-any-return]

    def _tokens(self, rows: Sequence[Judged]) -> list[list[int]]:
        tokens: list[list[int]] = []
        problems: list[str] = []
        most = context_of(self.model)
        for row in rows:
            for talk in row.talks.values():
                try:
                    tokens.append(self.texts.whole(talk))
                except RowError as error:
                    problems.append(f"{row.where}: {error}")
                    continue
                if most is not None and len(tokens[-1]) > most:
                    problems.append(f"{row.where}: {len(tokens[-1]):,} tokens, and the model reads {most:,}")
        more = len(problems) - MOST_PROBLEMS
        problems[MOST_PROBLEMS:] = [f"and {more} more"] * (more > 0)
        raise_all(DataError, "conversations that cannot be scored", problems)
        return tokens
