"""Checks of control tokens: one in front, one behind each answer and trained, and generation stops at it."""

from collections import Counter
from typing import Any

import numpy as np

from ..tokenizer import LoadedTokenizer, read_json
from .block import Block, Setting
from .findings import FIRST, Check, Finding, counted

ENDING = ("conversations", "preferences", "labelled")  # kinds whose rows have answers


class SpecialTokens(Check):
    """The tokens that begin a conversation and end an answer."""

    def __init__(self, setting: Setting) -> None:
        self._setting, tokenizer = setting, setting.tokenizer
        self._control = np.array(sorted(tokenizer.control_ids), np.int64)
        bos, eos = (tokenizer.ids.get(tokenizer.named.get(f"{name}_token", "")) for name in ("bos", "eos"))
        self._bos = None if bos == eos or setting.kind == "text" else bos
        self._eos = eos
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[int]] = {}
        self._ends: Counter[int] = Counter()

    def add(self, block: Block) -> None:
        if not len(block.lengths):
            return
        if self._bos is not None:
            self._beginnings(block, self._bos)
        if self._setting.kind in ENDING:
            self._endings(block)

    def _beginnings(self, block: Block, bos: int) -> None:
        is_bos = block.tokens == bos
        counts = np.add.reduceat(is_bos, block.starts, dtype=np.int64)
        self._note("wrong_bos", block, np.flatnonzero((counts > 1) | ((counts == 1) & ~is_bos[block.starts])))
        if _puts_in_front(self._setting.tokenizer, bos):
            self._note("missing_bos", block, np.flatnonzero(counts == 0))

    def _endings(self, block: Block) -> None:
        """Look at the last token of every trained stretch."""
        ends = np.cumsum(block.lengths)
        sample_of = np.repeat(np.arange(len(ends)), block.lengths)
        following = np.append(block.tokens[1:], -1)
        following[ends - 1] = -1  # nothing follows in the same sample
        stops = np.append(block.mask[1:] == 0, True)
        stops[ends - 1] = True
        last = np.flatnonzero((block.mask == 1) & stops)
        ids, behind = block.tokens[last], following[last]
        ended = np.isin(ids, self._control)
        self._ends.update(ids[ended].tolist())
        untrained = ~ended & np.isin(behind, self._control)
        self._note("untrained_end", block, sample_of[last[untrained]])
        self._note("missing_end", block, sample_of[last[~ended & ~untrained]])
        before = np.where(last > block.starts[sample_of[last]], block.tokens[last - 1], -1)
        self._note("double_end", block, sample_of[last[ended & ((ids == behind) | (ids == before))]])

    def _note(self, code: str, block: Block, samples: np.ndarray) -> None:
        numbers = block.numbers(samples)
        self._counts[code] += len(numbers)
        first = self._first.setdefault(code, [])
        first += numbers[: FIRST - len(first)]

    def facts(self) -> dict[str, Any]:
        named = {token: text for text, token in self._setting.tokenizer.ids.items()}
        ends = [{"id": token, "text": named.get(token), "answers": count} for token, count in self._ends.most_common()]
        return {"answers_end_with": ends} if ends else {}

    def finish(self) -> list[Finding]:
        bos = self._setting.tokenizer.named.get("bos_token")
        said = {
            "wrong_bos": f"without exactly one {bos} in front: the chat template writes it twice, or inside",
            "missing_bos": f"without {bos} in front, which the tokenizer puts before every text: the template must too",
            "missing_end": "of which an answer has no end token behind it: cut off, or the template writes none",
            "untrained_end": "of which the end token of an answer is not trained",
            "double_end": "of which an answer ends with the same end token twice",
        }
        found = [
            Finding(code, f"{counted(self._counts[code])} {words}", self._counts[code], self._places(code))
            for code, words in said.items()
            if self._counts[code]
        ]
        return found + self._generation()

    def _places(self, code: str) -> tuple[str, ...]:
        return self._setting.places.of(self._first[code])

    def _generation(self) -> list[Finding]:
        """Hold the token that most answers end with against what generation stops at."""
        if not self._ends:
            return []
        end, count = self._ends.most_common(1)[0]
        folder, named = self._setting.tokenizer.folder, self._named
        stops = read_json(folder / "generation_config.json").get("eos_token_id")
        if stops is None:
            if self._eos in (None, end):
                return []
            said = (
                f"answers end with {named(end)}, the tokenizer's eos_token is {named(self._eos)}, and there is no "
                f"eos_token_id in {folder / 'generation_config.json'}: what generates must be told to stop at {end}"
            )
            return [Finding("eos_differs", said, count, more={"template": end, "tokenizer": self._eos})]
        stops = stops if isinstance(stops, list) else [stops]
        if end in stops:
            return []
        said = (
            f"answers end with {named(end)}, and {folder / 'generation_config.json'} stops at "
            f"{', '.join(map(named, stops))}: the model would not stop; put {end} into its eos_token_id"
        )
        return [Finding("eos_mismatch", said, count, more={"template": end, "generation_config": stops})]

    def _named(self, token: int | None) -> str:
        texts = [text for text, number in self._setting.tokenizer.ids.items() if number == token]
        return f"{texts[0]} ({token})" if texts else str(token)


def _puts_in_front(tokenizer: LoadedTokenizer, bos: int) -> bool:
    """Whether the tokenizer itself puts `bos` in front of a text."""
    if "add_bos_token" in tokenizer.config:
        return bool(tokenizer.config["add_bos_token"])
    return tokenizer.encoder.encode("", add_special_tokens=True).ids[:1] == [bos]
