"""The same tokens through transformers and through megatron-core's GPTModel, in fp32: do both compute the same?"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conversion.hf_checkpoint import read_config
from conversion.mcore_directory import find_step, hf_folder
from conversion.settings import is_reward_model, mcore_settings, untrainable_reasons

from ..foundation.errors import CheckpointError, UsageError
from .layout import Layout
from .settings import ComputeSettings

if TYPE_CHECKING:  # it imports megatron-core, which needs a prepared process
    from .parallel.model import Chunks

ROW = 512  # tokens that attend to each other


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart over `tokens` tokens; at `agreed` of them the same next one is most likely."""

    tokens: int
    agreed: int
    difference: float  # the largest, absolute
    largest: float  # the largest logit, absolute
    of_words: bool = True  # False: of a reward model's scores

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
        theirs = of_transformers(hf, rows, scores=is_reward_model(config))
        ours = _of_megatron_alone(step, mcore_settings(config), rows)
    if theirs[0].shape != ours[0].shape:
        sizes = f"{theirs[0].shape[-1]} and {ours[0].shape[-1]}"
        raise CheckpointError(f"{hf} and {mcore} have vocabularies of {sizes} tokens")
    return compared(theirs, ours)


def compared(theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> Comparison:
    """Hold logits [b, s, vocabulary] against those of the truth, row by row."""
    pairs = list(zip(theirs, ours, strict=True))
    return Comparison(
        tokens=sum(a[..., 0].numel() for a in theirs),
        agreed=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
        # A NaN on one side is no small difference.
        difference=max(float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in pairs),
        largest=max(float(a.abs().max()) for a in theirs),
        of_words=theirs[0].shape[-1] > 1,
    )


def of_transformers(directory: Path, rows: Sequence[torch.Tensor], *, scores: bool = False) -> list[torch.Tensor]:
    """Return the logits fp32 [b, s, vocabulary] that transformers computes for each `rows` of token ids [b, s].

    With `scores` it is a reward model, and they are [b, s, 1]. Raises CheckpointError when transformers cannot load
    the directory.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever transformers raises, it is the folder's fault
        raise CheckpointError(f"{directory}: transformers cannot load it: {error}") from None
    model.eval()
    if scores:  # of every token, where the model itself gives that of the last
        return [model.score(model.base_model(row).last_hidden_state).float() for row in rows]
    return [model(row).logits.float() for row in rows]


def _of_megatron_alone(step: Path, settings: dict[str, Any], rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    from .parallel.world import process_groups

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)
    layout = Layout(world=1, tensor=1, pipeline=1, sequence=False, micro_batches=1)
    with process_groups(layout, seed=0):
        return of_megatron(step, settings, layout, rows)


def of_megatron(
    step: Path, settings: dict[str, Any], layout: Layout, rows: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the logits fp32 [b, s, vocabulary] that GPTModel computes for each `rows` of token ids [b, s].

    A reward model gives scores [b, s, 1].
    All ranks of `layout`, whose process groups are up, call it; those that are not of the last pipeline stage get an
    empty list. `step` is a torch_dist folder; raises CheckpointError when it does not fit `settings`.
    """
    from .parallel.model import build_model
    from .weights import load_mcore

    exact = ComputeSettings(precision="fp32", flash_attention=False)
    chunks = build_model(settings, layout, exact, initialize=False)
    load_mcore(chunks, step)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        found = [output.float().cpu() for row in rows for output in forward(chunks, row)]
    return [each[..., None] if settings["reward_head"] else each[..., : settings["vocab_size"]] for each in found]


def forward(chunks: "Chunks", row: torch.Tensor) -> list[torch.Tensor]:
    """Run token ids [b, s] through the pipeline by megatron-core's own schedule.

    Returns one tensor of logits [b, s, padded vocabulary] on the last stage, of a reward model scores [b, s], and
    nothing on the others.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batch, size = row.shape
    ids = row.to(next(chunks[0].parameters()).device)
    positions = torch.arange(size, device=ids.device).expand(batch, size)
    later = torch.ones(size, size, dtype=torch.bool, device=ids.device).triu(1)[None, None]

    def run(_: object, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        return model(ids, positions, later, runtime_gather_output=True), lambda logits, non_loss_data: logits

    return get_forward_backward_func()(
        forward_step_func=run,
        data_iterator=[None] * len(chunks),
        model=list(chunks),
        num_microbatches=1,
        seq_length=size,
        micro_batch_size=batch,
        forward_only=True,
        collect_non_loss_data=True,
    )
