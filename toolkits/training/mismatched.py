"""Prompts with the answers of other prompts: what KTO measures the model's distance from its reference on."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_preprocessing.dataset import Dataset

from ..foundation.errors import DataError


@dataclass(frozen=True)
class Mismatched:
    """A dataset whose documents have the prompts of another's, and answers that those gave to other prompts.

    `partners` int64 [documents]: whose answer each one gets; -1 where it is not used.
    """

    dataset: Dataset
    partners: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, documents: np.ndarray, *, seed: int) -> "Mismatched":
        """Give each of `documents` the answer that stands before it in an order of the seed, of another prompt.

        Raises DataError when there is no other prompt.
        """
        order = np.random.default_rng(seed).permutation(documents)
        prompts = [_prompt_digest(dataset, each) for each in order.tolist()]
        if len(set(prompts)) < 2:
            raise DataError(f"{dataset.path}: all answers are to one prompt: KTO asks about answers to another one")
        partners = np.full(len(dataset), -1, np.int64)
        for place, document in enumerate(order.tolist()):
            other = place - 1
            while prompts[other] == prompts[place]:
                other -= 1
            partners[document] = order[other]
        return cls(dataset, partners)

    def __len__(self) -> int:
        return len(self.partners)

    @property
    def path(self) -> Path:
        """Of the dataset that it is made of."""
        return self.dataset.path

    @cached_property
    def digest(self) -> str:
        """What tells these answers from others."""
        return hashlib.sha256(self.partners.tobytes()).hexdigest()[:16]

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where the answer of each document begins and ends in it, int64 [documents, 2]; 0 where it is not used."""
        found = np.zeros((len(self), 2), np.int64)
        for document in np.flatnonzero(self.partners >= 0).tolist():
            trained = np.flatnonzero(self.dataset.mask(document))
            found[document] = trained[0], trained[-1] + 1
        return found

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Return how many tokens some documents have."""
        answers = self.bounds[self.partners[documents]]
        return self.bounds[documents, 0] + answers[:, 1] - answers[:, 0]

    def tokens(self, document: int) -> np.ndarray:
        """Return the document's tokens."""
        return self._joined(self.dataset.tokens(document), self.dataset.tokens(self._partner(document)), document)

    def weights(self, document: int) -> np.ndarray:
        """Return the weights of the tokens: 1 in the answer, 0 elsewhere."""
        return self._joined(self.dataset.weights(document), self.dataset.weights(self._partner(document)), document)

    def _partner(self, document: int) -> int:
        return int(self.partners[document])

    def _joined(self, prompt: np.ndarray, answer: np.ndarray, document: int) -> np.ndarray:
        begin, end = self.bounds[self._partner(document)]
        return np.concatenate([prompt[: self.bounds[document, 0]], answer[begin:end]])


def _prompt_digest(dataset: Dataset, document: int) -> bytes:
    prompt = dataset.tokens(document)[: int(dataset.mask(document).argmax())]
    return hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
