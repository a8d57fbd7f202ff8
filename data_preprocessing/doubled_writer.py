"""Conversations -> the doubled layout, for tools that read it; see doubled.py for its bytes.

Conversations are packed as for training. Those of a document stand in the dataset's order, and documents in the order
of their first conversation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from toolkits.foundation.errors import DataError, UsageError
from toolkits.foundation.progress import Progress
from toolkits.foundation.publish import publish_files, require_space

from .dataset import ABOUT_SUFFIX, FILE_SUFFIXES, Dataset, sibling
from .doubled import IGNORED, NUMBERS_AT_ONCE
from .fitting import Fitted, TooLong, fit
from .inspect import tokenizer_of
from .packing import pack
from .tokenizer import load_tokenizer
from .writer import HashedFile, write_index

SUFFIXES = (".bin", ".idx")  # the index commits the set
WHY_NOT = {
    "text": "plain text needs it not: its .bin and .idx are already what Megatron's own tools read",
    "preferences": "it has no place for pairs",
    "labelled": "it has no place for labels",
    "prompts": "it has no place for reference answers",
}
NO_WEIGHTS = "the doubled layout has no place for them: build the rows again with loss true or false"


@dataclass(frozen=True)
class Packed:
    """Which conversations share a document: `rows` [conversations] in order, `bounds` [documents + 1] among them."""

    rows: np.ndarray
    bounds: np.ndarray
    fitted: Fitted

    def __len__(self) -> int:
        return len(self.bounds) - 1


def write_doubled(
    dataset: Dataset, prefix: Path, *, seq_len: int, pad: int, too_long: TooLong = "stop", overwrite: bool = False
) -> Packed:
    """Write a dataset's conversations as documents of `[tokens | labels]` under `prefix`; return what shares one.

    `pad` is the id that fills documents up. Raises DataError for another kind of rows and for conversations that do
    not fit when `too_long` is `stop`, UsageError when the output exists.
    """
    if dataset.kind != "conversations":
        raise DataError(
            f"{dataset.path} holds {dataset.kind}; the doubled layout is for conversations: {WHY_NOT[dataset.kind]}"
        )
    weighted = (dataset.manifest or {"counts": {}})["counts"].get("weighted_tokens")
    if weighted:
        raise DataError(f"{dataset.path}: {weighted:,} tokens are trained with weights; {NO_WEIGHTS}")
    _refuse_other_files(prefix)
    packed = _packed(dataset, seq_len, too_long)
    require_space(prefix.parent, 8 * seq_len * len(packed))
    with publish_files(prefix, SUFFIXES, overwrite=overwrite) as folder:
        numbers = HashedFile(sibling(folder / prefix.name, ".bin"))
        with Progress("writing", len(packed), unit="documents") as progress:
            for block in _documents(dataset, packed, seq_len, pad):
                numbers.write(np.ascontiguousarray(block, "<i4").data)
                progress.advance(len(block))
        numbers.close()
        index = HashedFile(sibling(folder / prefix.name, ".idx"))
        write_index(index, np.full(len(packed), 2 * seq_len, "<i4"))
        index.close()
    return packed


def _refuse_other_files(prefix: Path) -> None:
    """Raise UsageError where a set of our own layout stands: beside its manifest the new files would be misread."""
    others = [*set(FILE_SUFFIXES).difference(SUFFIXES), ABOUT_SUFFIX]
    found = sorted(str(sibling(prefix, suffix)) for suffix in others if sibling(prefix, suffix).exists())
    if found:
        raise UsageError(f"a dataset with a manifest stands there: {', '.join(found)}; choose another output")


def _packed(dataset: Dataset, seq_len: int, too_long: TooLong) -> Packed:
    fitted = fit(dataset, seq_len, too_long, label_beyond=True)
    kept = np.flatnonzero(fitted.lengths)
    if not len(kept):
        raise DataError(f"{dataset.path}: no conversation fits {seq_len} tokens; give a greater SEQ_LEN")
    order, bounds = pack(np.minimum(fitted.lengths[kept], seq_len), seq_len)
    document = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    first = np.minimum.reduceat(order, bounds[:-1])  # of each document
    sorted_by = np.lexsort((order, first[document]))
    counts = np.diff(bounds)[np.argsort(first)]
    return Packed(kept[order[sorted_by]], np.append(0, np.cumsum(counts)), fitted)


def _documents(dataset: Dataset, packed: Packed, seq_len: int, pad: int) -> Iterator[np.ndarray]:
    """Yield blocks of documents, int32 [documents, 2, seq_len]."""
    step = max(1, NUMBERS_AT_ONCE // (2 * seq_len))
    for first in range(0, len(packed), step):
        bounds = packed.bounds[first : first + step + 1].tolist()
        block = np.full((len(bounds) - 1, 2, seq_len), IGNORED, np.int32)
        block[:, 0] = pad
        for document, (begin, end) in zip(block, pairwise(bounds), strict=True):
            place = 0
            for row in packed.rows[begin:end].tolist():
                length = int(packed.fitted.lengths[row])
                place += _put(document[:, place:], dataset.tokens(row)[:length], dataset.mask(row)[:length])
        yield block


def _put(space: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> int:
    """Write a conversation at the beginning of `space` [2, n] and return the places that it takes."""
    places = min(len(tokens), space.shape[1])  # a token beyond the document is only a label
    labels = np.where(mask[1:], tokens[1:], IGNORED)
    space[0, :places] = tokens[:places]
    space[0, places - 1] = -1 - tokens[places - 1]
    space[1, : len(labels)] = labels
    return places


def padding_id(dataset: Dataset, tokenizer: Path | None) -> int:
    """Return the id of a tokenizer's pad token, else of its end token; see `inspect.tokenizer_of` for which tokenizer.

    Raises UsageError when it has neither.
    """
    loaded = load_tokenizer(tokenizer_of(dataset, tokenizer))
    token = loaded.named.get("pad_token", loaded.named.get("eos_token"))
    if token is None:
        raise UsageError(f"{loaded.folder} names no pad_token; say with --pad-id which id fills rows up")
    return loaded.ids[token]
