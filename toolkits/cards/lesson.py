"""Twenty steps of fine-tuning: what a run is told, and the losses of the same steps in plain transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from ..training.rows import Rows

STEPS = 20
LEARNT = 0.3  # by which the loss has to fall: two runs that learn nothing would agree too
LOSS_TOLERANCE = 1e-4


def lesson(checkpoint: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    """Return the settings of STEPS steps in fp32 that validate on what they train on, with `changes`."""
    settings = {
        "checkpoint": str(checkpoint),
        "data": str(data),
        "valid_data": str(data),
        "seq_len": 64,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "train_iters": STEPS,
        "precision": "fp32",
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup_iters": 3,
        "output": output,
    }
    return TrainConfig.from_values(settings | changes)


def plain_losses(config: TrainConfig, network: "torch.nn.Module | None" = None, *, shift: int = 0) -> list[float]:
    """Train as `config` says with transformers and torch alone, each conversation by itself; return the losses.

    The rows of a step are those that a run takes; nothing else is shared with it. `network` is the checkpoint's
    model unless it is given, for its weights to be looked at; `shift` moves the loss mask, which has to be seen.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from ..training.optimizer import learning_rate

    rows, numbers = _rows(config)
    if network is None:
        network = AutoModelForCausalLM.from_pretrained(config.model.checkpoint, dtype=torch.float32)
    optimizer = _adamw(network, config)
    dataset, told, losses = rows.parts[0].dataset, config.optimizer, []
    for step, taken in enumerate(numbers):
        total, trained = torch.zeros(()), 0
        for document, *_ in (segment for number in taken for segment in rows.parts[0].segments(number)):
            tokens = torch.from_numpy(dataset.tokens(document).astype(np.int64))
            mask = torch.from_numpy(np.roll(dataset.weights(document), shift)[1:])
            logits = network(tokens[None, :-1]).logits[0]
            total = total + (torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none") * mask).sum()
            trained += int(mask.count_nonzero())
        optimizer.zero_grad()
        (total / trained).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), told.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step + 1, steps=len(numbers), warmup=told.warmup_iters, peak=told.lr, floor=told.min_lr
            )
        optimizer.step()
        losses.append(float(total.detach()) / trained)
    return losses


def _rows(config: TrainConfig) -> tuple["Rows", list[list[int]]]:
    """Return the rows of a run, and the numbers of those that each of its steps takes."""
    from ..training.batches import Batches
    from ..training.layout import Layout
    from ..training.sources import find_data, find_model

    rows = find_data(config.data, find_model(config.model)).training
    size = config.batch.global_batch_size
    batches = Batches(rows, config.batch, Layout(1, 1, 1, False, size), replica=0, seed=config.data.seed)
    return rows, [batches.row_numbers(step * size) for step in range(config.batch.train_iters)]


def _adamw(network: "torch.nn.Module", config: TrainConfig) -> "torch.optim.AdamW":
    import torch

    told, trained = config.optimizer, [weight for weight in network.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.dim() > 1], "weight_decay": told.weight_decay},
        {"params": [weight for weight in trained if weight.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(told.adam_beta1, told.adam_beta2), eps=told.adam_eps)
