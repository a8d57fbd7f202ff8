"""The token that trained answers end with, which generation with the tuned model has to stop at."""

from collections import Counter

from data_preprocessing.dataset import Dataset

SAMPLE = 256  # rows


def end_token(dataset: Dataset) -> int | None:
    """Return the token that the trained part of most rows ends with; None when no token is that of most.

    Rows that were cut when a dataset was built end anywhere.
    """
    if dataset.kind == "text":
        return None
    ends: Counter[int] = Counter()
    rows = min(len(dataset), SAMPLE)
    for row in range(rows):
        trained = dataset.mask(row).nonzero()[0]
        if len(trained):
            ends[int(dataset.tokens(row)[trained[-1]])] += 1
    token, count = ends.most_common(1)[0] if ends else (0, 0)
    return token if 2 * count > ends.total() else None
