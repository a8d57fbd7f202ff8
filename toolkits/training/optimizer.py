"""AdamW as megatron-core shards it, and the learning rate of each step."""

import math

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from .config import TrainConfig
from .parallel.model import DTYPES


def build_optimizer(config: TrainConfig, model: DistributedDataParallel) -> MegatronOptimizer:
    """Return the optimizer of `model`; biases and norm weights have no weight decay."""
    settings, precision = config.optimizer, config.batch.precision
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=precision == "bf16",
            params_dtype=DTYPES[precision],
            use_distributed_optimizer=config.layout.distributed_optimizer,
        ),
        [model],
    )
    # megatron-core marks the groups and leaves it to its scheduler to apply the mark.
    for group in optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    return optimizer


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Return the rate of step 1..steps: linear up to `peak` at `warmup`, then a cosine that ends at `floor`.

    The last step gets exactly `floor`. Source of the cosine: Loshchilov and Hutter, 2017 (SGDR), one cycle.
    """
    if step < warmup:
        return peak * step / warmup
    if step >= steps:
        return floor
    part = (step - warmup) / (steps - warmup)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * part))


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
