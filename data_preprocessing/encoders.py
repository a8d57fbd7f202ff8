"""Texts -> token ids in one flat buffer, by the fastest encoder that makes the right ones.

    fastokens    when it is installed and has proven itself on this vocabulary
    tokenizers   otherwise; it says what is right

The proof encodes every token of the vocabulary, every special token and some thousand texts of Unicode at random
with both. Its outcome is kept for each vocabulary and pair of versions (see kept.py).
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import random
import sys
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import orjson

from toolkits.foundation.errors import MachineError
from toolkits.foundation.process import usable_cores

from .kept import kept
from .tokenizer import KEPT_FROM, LoadedTokenizer

EncoderName = Literal["auto", "fastokens", "tokenizers"]
Flat = tuple[np.ndarray, np.ndarray]  # ids [tokens], and where each text's begin and the last ones end [texts + 1]

CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # what is kept of an encoder follows from it too
TOKENIZERS_THREADS, FASTOKENS_THREADS = "RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"  # how many each may take
RANDOM_TEXTS = 4000
VOCABULARY_AT_ONCE = 40  # tokens of the vocabulary in one text of the proof
# First and last code points of the scripts that the texts at random are of.
SCRIPTS = ((0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xE7F), (0x1100, 0x11FF))
MORE_SCRIPTS = (
    (0x2000, 0x2BFF),
    (0x3000, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xF900, 0xFFFD),
    (0x1F300, 0x1F9FF),
)
PIECES = ("\n", "\n\n", "\r\n", " ", "  ", "\t", "e\u0301", "\u200d", "'s", "'LL", "1234567", "ﬁ", "\u3000", "中文")


class FlatEncoder(Protocol):
    """Turns texts into ids without a Python object for each."""

    name: str

    @property
    def is_ready(self) -> bool:
        """Whether what `encode` encodes with is built; the first call builds it, in seconds."""
        ...

    def encode(self, texts: Sequence[str]) -> Flat:
        """Return int32 ids and int64 bounds; special tokens are recognised, none are added."""


class TokenizersEncoder:
    """The `tokenizers` library."""

    name = "tokenizers"

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def is_ready(self) -> bool:
        return "encoder" in vars(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> Flat:
        rows = [found.ids for found in self._tokenizer.encoder.encode_batch_fast(texts, add_special_tokens=False)]
        bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.fromiter(chain.from_iterable(rows), np.int32, int(bounds[-1])), bounds


class FastokensEncoder:
    """The `fastokens` library."""

    name = "fastokens"

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _encoder(self) -> Any:
        built = _fastokens(self._tokenizer)
        return_memory()
        return built

    @property
    def is_ready(self) -> bool:
        return "_encoder" in vars(self)

    def encode(self, texts: Sequence[str]) -> Flat:
        ids, bounds = self._encoder.encode_batch_flat(list(texts), add_special_tokens=False)
        return np.frombuffer(ids, np.int32), np.frombuffer(bounds, np.int64)


def return_memory() -> None:
    """Have glibc give back what was freed since the start.

    Left alone it keeps, for the thread that took it, what reading a tokenizer took: a third of a build's memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)


def _fastokens(tokenizer: LoadedTokenizer) -> Any:
    from fastokens import Tokenizer

    file = tokenizer.folder / "tokenizer.json"

    def find_out() -> bytes:
        return orjson.dumps(quickly_read(orjson.loads(tokenizer.as_json or file.read_bytes())))

    size = len(tokenizer.as_json) if tokenizer.as_json else file.stat().st_size
    spelled = find_out() if size < KEPT_FROM else kept("fastokens", [tokenizer.identity, CODE], find_out)
    built = Tokenizer.from_json_str(spelled.decode())
    # It counts its threads when it is first used. One core is left to Python.
    told = os.environ.get(FASTOKENS_THREADS)
    os.environ[FASTOKENS_THREADS] = told or str(max(1, usable_cores() - 1))
    built.encode_batch_flat(["a", "b"])
    if told is None:
        del os.environ[FASTOKENS_THREADS]  # nobody else's, least of all of the processes that this one starts
    return built


def quickly_read(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer.json as fastokens reads it in three quarters of the time and memory.

    It makes the same ids of a text; what is done to ids and what turns them into text again is left out.
    """
    content = {key: content.get(key) for key in ("version", "added_tokens", "normalizer", "pre_tokenizer", "model")}
    model = content["model"]
    if isinstance(model.get("vocab"), dict):
        content["model"] = model = model | {"vocab": dict(sorted(model["vocab"].items()))}
    pairs = [pair for pair in model.get("merges") or () if isinstance(pair, list)]
    if pairs and not any(" " in part for pair in pairs for part in pair):
        content["model"] = model | {"merges": [" ".join(pair) for pair in model["merges"]]}
    return content


def choose_encoder(tokenizer: LoadedTokenizer, name: EncoderName = "auto") -> FlatEncoder:
    """Return the encoder called `name`; `auto` takes fastokens where it is equal to tokenizers.

    Raises MachineError for fastokens by name where it is missing or makes other ids.
    """
    installed = importlib.util.find_spec("fastokens") is not None
    if name == "fastokens" and not installed:
        raise MachineError("--encoder fastokens: it is not installed; pip install fastokens, or leave the flag out")
    if name == "tokenizers" or not installed:
        return TokenizersEncoder(tokenizer)
    why = _difference(tokenizer)
    if not why:
        return FastokensEncoder(tokenizer)
    if name == "fastokens":
        raise MachineError(f"--encoder fastokens: {why} with {tokenizer.folder}; leave the flag out")
    print(f"the encoder is tokenizers, because fastokens {why} with {tokenizer.folder}", file=sys.stderr)
    return TokenizersEncoder(tokenizer)


def _difference(tokenizer: LoadedTokenizer) -> str:
    """Return how fastokens differs from tokenizers on this vocabulary, "" when it does not; remembered."""
    versions = {name: importlib.metadata.version(name) for name in ("fastokens", "tokenizers")}

    def find_out() -> bytes:
        print("comparing the encoders fastokens and tokenizers on this vocabulary, once", file=sys.stderr)
        return compare(tokenizer).encode()

    try:
        return kept("encoders", [tokenizer.identity, versions, CODE], find_out).decode()
    except (OSError, MemoryError) as error:  # says nothing of the vocabulary, so it is not kept
        return f"fails ({error})"


def compare(tokenizer: LoadedTokenizer, *, other: FlatEncoder | None = None) -> str:
    """Return how `other`, else fastokens, differs from tokenizers on texts made for that, "" when it does not.

    Raises OSError and MemoryError.
    """
    texts = _proof_texts(tokenizer)
    ids, bounds = TokenizersEncoder(tokenizer).encode(texts)
    try:
        other_ids, other_bounds = (other or FastokensEncoder(tokenizer)).encode(texts)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a vocabulary that it cannot read
        return f"fails ({error})"
    if np.array_equal(bounds, other_bounds) and np.array_equal(ids, other_ids):
        return ""
    for number, text in enumerate(texts):
        own = ids[bounds[number] : bounds[number + 1]]
        if not np.array_equal(own, other_ids[other_bounds[number] : other_bounds[number + 1]]):
            return f"makes other ids of {text[:40]!r}"
    raise AssertionError("different buffers of equal texts")


def _proof_texts(tokenizer: LoadedTokenizer) -> list[str]:
    draw, encoder = random.Random(0), tokenizer.encoder
    known = [encoder.decode([token], skip_special_tokens=False) for token in encoder.get_vocab().values()]
    known.sort()
    draw.shuffle(known)
    texts = ["".join(known[at : at + VOCABULARY_AT_ONCE]) for at in range(0, len(known), VOCABULARY_AT_ONCE)]
    texts += [" ".join(known[at : at + VOCABULARY_AT_ONCE]) for at in range(0, len(known), VOCABULARY_AT_ONCE)]
    control = list(tokenizer.ids) or [""]
    for _ in range(RANDOM_TEXTS):
        scripts = draw.choices(SCRIPTS + MORE_SCRIPTS, k=3)
        drawn = [chr(draw.randint(*draw.choice(scripts))) for _ in range(draw.randint(0, 60))]
        drawn += draw.choices(PIECES, k=draw.randint(0, 6)) + draw.choices(control, k=draw.randint(0, 2))
        draw.shuffle(drawn)
        texts.append("".join(drawn))
    return texts
