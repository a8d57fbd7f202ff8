"""The same tokens through transformers and through megatron-core's GPTModel, in fp32: do both compute the same?"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.hf_checkpoint import read_config
from conversion.mcore_directory import find_step, hf_folder
from conversion.settings import mcore_settings, untrainable_reasons

from ..foundation.errors import CheckpointError, UsageError
from .config import ComputeSettings
from .layout import Layout

ROW = 512  # tokens that attend to each other


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart over `tokens` tokens; at `agreed` of them the same next one is most likely."""

    tokens: int
    agreed: int
    difference: float  # the largest, absolute
    largest: float  # the largest logit, absolute

    @property
    def relative(self) -> float:
        """The difference as a part of the largest logit, or of 1 when that is smaller."""
        return self.difference / max(1.0, self.largest)


def tokens_of(directory: Path, texts: Sequence[str]) -> list[int]:
    """Return the token ids of texts, one behind the other, by the tokenizer of a HuggingFace directory."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises, it is the folder's fault
        raise CheckpointError(f"{directory}: transformers cannot load its tokenizer: {error}") from None
    return [token for text in texts for token in tokenizer(text)["input_ids"]]


def random_tokens(directory: Path, count: int) -> list[int]:
    """Return `count` random token ids of a model's vocabulary, always the same."""
    size: Any = mcore_settings(read_config(directory))["vocab_size"]
    return torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def compare_logits(hf: Path, mcore: Path, tokens: Sequence[int]) -> Comparison:
    """Run both models on `tokens`, in rows of at most ROW, one model after the other.

    Takes 4 bytes a parameter, and 4 a token and vocabulary entry. Raises CheckpointError when a directory does not
    load, or one of them is of another vocabulary.
    """
    if not tokens:
        raise UsageError("no tokens to compare on: give some text")
    rows = [torch.tensor([tokens[start : start + ROW]]) for start in range(0, len(tokens), ROW)]
    step = find_step(mcore)
    config = read_config(hf_folder(mcore))
    for reason in untrainable_reasons(config):
        print(f"note: {reason}", file=sys.stderr, flush=True)
    with torch.no_grad():
        theirs = _of_transformers(hf, rows)
        ours = _of_megatron(step, mcore_settings(config), rows)
    if theirs[0].shape != ours[0].shape:
        sizes = f"{theirs[0].shape[-1]} and {ours[0].shape[-1]}"
        raise CheckpointError(f"{hf} and {mcore} have vocabularies of {sizes} tokens")
    pairs = list(zip(theirs, ours, strict=True))
    return Comparison(
        tokens=len(tokens),
        agreed=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
        # A NaN on one side is no small difference.
        difference=max(float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in pairs),
        largest=max(float(a.abs().max()) for a in theirs),
    )


def _of_transformers(directory: Path, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits [1, s, vocabulary] of each row of token ids [1, s]."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever transformers raises, it is the folder's fault
        raise CheckpointError(f"{directory}: transformers cannot load it: {error}") from None
    model.eval()
    return [model(row).logits.float() for row in rows]


def _of_megatron(step: Path, settings: dict[str, Any], rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    from .parallel.world import process_groups

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)
    layout = Layout(world=1, tensor=1, pipeline=1, sequence=False, micro_batches=1)
    with process_groups(layout, seed=0):
        from .parallel.model import build_model
        from .weights import load_mcore

        exact = ComputeSettings(precision="fp32", flash_attention=False)
        chunks = build_model(settings, layout, exact, initialize=False)
        load_mcore(chunks, step)
        (model,) = chunks
        model.eval()
        device = next(model.parameters()).device
        return [_forward(model, row.to(device))[..., : settings["vocab_size"]].float().cpu() for row in rows]


def _forward(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    size = row.shape[1]
    positions = torch.arange(size, device=row.device)[None]
    later = torch.ones(size, size, dtype=torch.bool, device=row.device).triu(1)[None, None]
    return model(row, positions, later, runtime_gather_output=True)
