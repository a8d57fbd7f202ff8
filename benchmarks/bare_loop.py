"""Megatron-core's own training step and nothing else: what ours is measured against."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from toolkits.training.batches import MicroBatch
from toolkits.training.loop import Training
from toolkits.training.parallel.model import build_model
from toolkits.training.sources import find_model


class BareLoop:
    """A second model with the weights of a run that has not begun, trained on batches that are ready."""

    def __init__(self, run: Training) -> None:
        (model,) = build_model(find_model(run.config.model).settings, run.layout, run.config.compute)
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), run.chunks[0].parameters(), strict=True):
                mine.copy_(theirs)
        settings = run.config.optimizer
        communication = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(model.config, communication, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                adam_eps=settings.adam_eps,
                clip_grad=settings.clip_grad,
                params_dtype=torch.float32,
                use_distributed_optimizer=True,
            ),
            [self.model],
        )
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss
        self.forward_backward = get_forward_backward_func()

    def step(self, batches: list[MicroBatch]) -> float:
        """Take one optimizer step; return the mean loss of the trained tokens."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self.forward_backward(
            forward_step_func=_forward,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step()
        return float(sum(each["loss"] for each in results)) / float(sum(each["tokens"] for each in results))


def _forward(
    batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    batch = next(batches)
    output = model(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)

    def summed(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total, tokens = (losses * batch.loss_mask).sum(), batch.loss_mask.count_nonzero().int()
        return total, tokens, {"loss": total.detach().clone(), "tokens": tokens.clone()}

    return output, summed
