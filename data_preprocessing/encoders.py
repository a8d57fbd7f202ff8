"""Texts -> token ids in one flat buffer, by the fastest encoder that makes the right ones.

    fastokens    when it is installed and has proven itself on this vocabulary
    tokenizers   otherwise; it says what is right

The proof encodes every token of the vocabulary, every special token and some thousand texts of Unicode at random
with both. Its outcome is kept for each vocabulary and pair of versions in the user's cache folder.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from toolkits.foundation.errors import MachineError

from .tokenizer import LoadedTokenizer

EncoderName = Literal["auto", "fastokens", "tokenizers"]
Flat = tuple[np.ndarray, np.ndarray]  # ids [tokens], and where each text's begin and the last ones end [texts + 1]

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

    def encode(self, texts: Sequence[str]) -> Flat:
        """Return int32 ids and int64 bounds; special tokens are recognised, none are added."""


class TokenizersEncoder:
    """The `tokenizers` library."""

    name = "tokenizers"

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Flat:
        rows = [found.ids for found in self._tokenizer.encoder.encode_batch_fast(texts, add_special_tokens=False)]
        bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.fromiter(chain.from_iterable(rows), np.int32, int(bounds[-1])), bounds


class FastokensEncoder:
    """The `fastokens` library."""

    name = "fastokens"

    def __init__(self, tokenizer: LoadedTokenizer, *, begun: Future[Any] | None = None) -> None:
        if begun is None or tokenizer.as_json is not None:  # then tokenizer.json is not all of it
            begun = _in_background(_fastokens, tokenizer.folder, tokenizer.as_json)
        self._built = begun

    @cached_property
    def _encoder(self) -> Any:
        built = self._built.result()
        return_memory()
        return built

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


def begin_encoder(folder: Path, name: EncoderName = "auto") -> Future[Any] | None:
    """Begin to build what `choose_encoder` will probably choose, beside Python, which has a tokenizer to read."""
    wanted = name != "tokenizers" and importlib.util.find_spec("fastokens") is not None
    return _in_background(_fastokens, folder, None) if wanted and (folder / "tokenizer.json").exists() else None


def _in_background(build: Callable[..., Any], *of: object) -> Future[Any]:
    thread = ThreadPoolExecutor(1)
    begun = thread.submit(build, *of)
    thread.shutdown(wait=False)
    return begun


def _fastokens(folder: Path, as_json: str | None) -> Any:
    from fastokens import Tokenizer

    file = str(folder / "tokenizer.json")
    built = Tokenizer.from_file(file) if as_json is None else Tokenizer.from_json_str(as_json)
    built.no_truncation()
    built.no_padding()
    return built


def choose_encoder(
    tokenizer: LoadedTokenizer, name: EncoderName = "auto", *, begun: Future[Any] | None = None
) -> FlatEncoder:
    """Return the encoder called `name`; `auto` takes fastokens where it is equal to tokenizers.

    `begun` is what `begin_encoder` returned. Raises MachineError for fastokens by name where it is missing or makes
    other ids.
    """
    installed = importlib.util.find_spec("fastokens") is not None
    if name == "fastokens" and not installed:
        raise MachineError("--encoder fastokens: it is not installed; pip install fastokens, or leave the flag out")
    if name == "tokenizers" or not installed:
        return TokenizersEncoder(tokenizer)
    why = _difference(tokenizer)
    if not why:
        return FastokensEncoder(tokenizer, begun=begun)
    if name == "fastokens":
        raise MachineError(f"--encoder fastokens: {why} with {tokenizer.folder}; leave the flag out")
    print(f"the encoder is tokenizers, because fastokens {why} with {tokenizer.folder}", file=sys.stderr)
    return TokenizersEncoder(tokenizer)


def _difference(tokenizer: LoadedTokenizer) -> str:
    """Return how fastokens differs from tokenizers on this vocabulary, "" when it does not; remembered."""
    versions = {name: importlib.metadata.version(name) for name in ("fastokens", "tokenizers")}
    key = {"tokenizer": tokenizer.fingerprint, "added": sorted(tokenizer.ids.items()), **versions}
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = _cache_folder() / f"{digest}.json"
    try:
        return str(json.loads(path.read_text())["difference"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print("comparing the encoders fastokens and tokenizers on this vocabulary, once", file=sys.stderr)
    difference = compare(tokenizer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"difference": difference, **key, "added": len(tokenizer.ids)}))
        os.replace(temporary, path)
    except OSError as error:
        print(f"{path.parent}: {error.strerror}; the comparison will be made again", file=sys.stderr)
    return difference


def compare(tokenizer: LoadedTokenizer, *, other: FlatEncoder | None = None) -> str:
    """Return how `other`, else fastokens, differs from tokenizers on texts made for that, "" when it does not."""
    texts = _proof_texts(tokenizer)
    ids, bounds = TokenizersEncoder(tokenizer).encode(texts)
    try:
        other_ids, other_bounds = (other or FastokensEncoder(tokenizer)).encode(texts)
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


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "temper" / "encoders"
