"""A dataset without a manifest -> the layout of dataset.py: the same rows, tokens and masks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from toolkits.foundation.errors import DataError, UsageError
from toolkits.foundation.progress import Progress
from toolkits.foundation.publish import publish_files, require_space

from .dataset import ABOUT_SUFFIX, Dataset, file_suffixes, sibling
from .tokenizer import LoadedTokenizer
from .writer import DatasetWriter

TOKENS_AT_ONCE = 1 << 20


def write_ours(
    dataset: Dataset, prefix: Path, *, tokenizer: LoadedTokenizer | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the rows of a dataset that has no manifest under `prefix` and return the manifest that they get.

    `tokenizer` is the one that built it; None writes down that nobody said which. Rows without a token, which only
    plain tokens have, are left out and counted. Raises UsageError when the dataset has a manifest or the output
    exists, DataError for a token that the tokenizer lacks.
    """
    if dataset.manifest is not None:
        raise UsageError(
            f"{dataset.path} has a manifest already: there is nothing to convert; --to doubled SEQ_LEN writes it in "
            "the layout of older tools"
        )
    require_space(prefix.parent, 5 * int(np.sum(dataset.lengths, dtype=np.int64)))
    with (
        publish_files(prefix, file_suffixes(dataset.kind), overwrite=overwrite) as folder,
        DatasetWriter(folder, prefix.name) as writer,
        Progress("writing", len(dataset), unit="rows") as progress,
    ):
        for tokens, mask, lengths in _blocks(dataset):
            if tokenizer is not None:
                _require_in(tokenizer, tokens, dataset)
            writer.add_rows(tokens, mask, lengths[lengths > 0])
            progress.advance(len(lengths))
        manifest = writer.finish(_about(dataset, tokenizer))
    sibling(prefix, ABOUT_SUFFIX).unlink(missing_ok=True)  # of the dataset that stood here before
    return manifest


def _blocks(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the tokens int32, masks uint8 and lengths int64 of some rows, end to end."""
    ends = np.cumsum(dataset.lengths, dtype=np.int64)
    first = 0
    while first < len(dataset):
        before = int(ends[first - 1]) if first else 0
        past = max(first + 1, int(np.searchsorted(ends, before + TOKENS_AT_ONCE)))
        tokens = [np.asarray(dataset.tokens(row), np.int32) for row in range(first, past)]
        masks = [dataset.mask(row) for row in range(first, past)]
        yield np.concatenate(tokens), np.concatenate(masks), np.array([len(row) for row in tokens], np.int64)
        first = past


def _require_in(tokenizer: LoadedTokenizer, tokens: np.ndarray, dataset: Dataset) -> None:
    size = tokenizer.encoder.get_vocab_size(with_added_tokens=True)
    greatest = int(tokens.max(initial=-1))
    if greatest >= size and tokenizer.encoder.id_to_token(greatest) is None:
        raise DataError(
            f"{dataset.path} has token {greatest:,}, {tokenizer.folder} has {size:,} tokens: the dataset was built "
            "with another tokenizer"
        )


def _about(dataset: Dataset, tokenizer: LoadedTokenizer | None) -> dict[str, Any]:
    empty = int(np.count_nonzero(np.asarray(dataset.lengths) == 0))
    known = None
    if tokenizer is not None:
        folder = tokenizer.folder.resolve()
        known = {"name": folder.name, "folder": str(folder), "fingerprint": tokenizer.fingerprint}
    return {
        "tokenizer": known,
        "kind": dataset.kind,
        "input": {
            "name": dataset.path.name,
            "kind": dataset.taken_for,
            "rows": len(dataset),
            "layouts": {"converted": len(dataset)},
            "notes": {},
        },
        "dropped": {"empty_row": empty} if empty else {},
    }
