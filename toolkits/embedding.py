"""A language model as a measure of what texts are about: the mean of its last hidden states."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .foundation.errors import CheckpointError

MAX_TOKENS = 1024  # of a text: what is behind them is not looked at
TOKENS_AT_ONCE = 16 * MAX_TOKENS


class Embedder:
    """Calls a HuggingFace model on texts; it is loaded when the first ones come, on a GPU where there is one.

    Raises CheckpointError for a directory that transformers cannot load. Code from the directory is never run.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._model: Any = None
        self._tokenizer: Any = None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the mean of the hidden states of each text's tokens, float32 [texts, hidden]; zeros without any."""
        import torch

        if self._model is None:
            self._load()
        encoded = [self._tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"] for text in texts]
        found = np.zeros((len(texts), self._model.config.get_text_config().hidden_size), np.float32)
        with torch.inference_mode():
            for batch in _batches(encoded):
                found[batch] = self._pooled([encoded[row] for row in batch])
        return found

    def _load(self) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        said = {"local_files_only": True, "trust_remote_code": False}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self._directory, **said)
            self._model = AutoModel.from_pretrained(self._directory, dtype=torch.float32, **said).to(device).eval()
        except Exception as error:  # whatever transformers raises, it is the folder's fault
            raise CheckpointError(f"--embed {self._directory}: transformers cannot load it: {error}") from None

    def _pooled(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        import torch

        length = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=self._model.device)
        here = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self._model.device)
        states = self._model(input_ids=tokens, attention_mask=here).last_hidden_state.float()
        return ((states * here[..., None]).sum(1) / here.sum(1, keepdim=True)).cpu().numpy()


def _batches(encoded: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the numbers of the rows that have tokens, those of like lengths together."""
    batches: list[list[int]] = []
    for row in sorted((row for row in range(len(encoded)) if encoded[row]), key=lambda row: len(encoded[row])):
        if batches and (len(batches[-1]) + 1) * len(encoded[row]) <= TOKENS_AT_ONCE:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
