"""AdamW as megatron-core shards it, and the learning rate of each step."""

import math
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)

from .config import TrainConfig
from .parallel.fused import has_transformer_engine
from .parallel.model import DTYPES, Chunks, sharded_state

# Of fp16: halved at every overflow, doubled after a thousand good steps. What is scaled is the loss summed over
# the tokens of a micro batch, hence less than the customary 2^16.
INITIAL_LOSS_SCALE = 2.0**12


def build_optimizer(
    config: TrainConfig, chunks: list[DistributedDataParallel], *, offload: float = 0.0
) -> MegatronOptimizer:
    """Return the optimizer of all chunks; biases and norm weights have no weight decay.

    `offload` is the share of its state that lies and is stepped in CPU memory.
    """
    settings, dtype = config.optimizer, DTYPES[config.compute.precision]
    own = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        initial_loss_scale=INITIAL_LOSS_SCALE,
        hysteresis=1,
        params_dtype=dtype,
        **_offload_fields(config, offload),
        use_distributed_optimizer=config.layout.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(own, chunks, _group_overrides(config, own))
    # megatron-core marks the groups and leaves it to its scheduler to apply the mark.
    for group in optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    for one in _inner(optimizer):
        _allocate_moments(one.optimizer)
    return optimizer


def _group_overrides(config: TrainConfig, own: OptimizerConfig) -> dict[ParamKey, Any] | None:
    """Return megatron-core's rules for groups, and that of B's learning rate (LoRA+, Hayou et al., 2024)."""
    if config.lora.lora_plus == 1:
        return None
    return {**get_standard_config_overrides(own), ParamKey(name="*.adapter.b*"): {"lr_mult": config.lora.lora_plus}}


def _offload_fields(config: TrainConfig, offload: float) -> dict[str, Any]:
    if not offload:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": offload,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "pin_cpu_grads": torch.cuda.is_available(),
        "pin_cpu_params": torch.cuda.is_available(),
        # Without it the fp32 weights stay on the GPU beside their copies, and only the moments leave it.
        "use_precision_aware_optimizer": config.layout.distributed_optimizer and has_transformer_engine(),
    }


def optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, sharding: str | None, is_loading: bool = False
) -> dict[str, Any]:
    """Return the sharded state of `optimizer` for the model's sharded state `model_state`.

    `sharding` is how the distributed optimizer is laid out; None is the plain one.
    """
    metadata = {"distrib_optim_sharding_type": sharding} if sharding else {}
    return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)


def restore_optimizer(optimizer: MegatronOptimizer, chunks: Chunks, step_folder: Path, *, sharding: str | None) -> None:
    """Load the state that `optimizer_state` described from a step folder; all ranks call it.

    megatron-core 0.16.1 by itself loads the moments of the distributed optimizer, without Transformer
    Engine or Apex, with a step count of zero.
    """
    inner = _inner(optimizer)
    wanted = optimizer_state(optimizer, sharded_state(chunks), sharding=sharding, is_loading=True)
    loaded = dist_checkpointing.load({"optimizer": wanted}, str(step_folder))["optimizer"]
    for number, one in enumerate(inner):
        state = loaded if len(inner) == 1 else loaded[number]
        moments, how = state.pop("param_state", None), state.pop("param_state_sharding_type", None)
        one.load_state_dict(state)
        if how is not None:
            _load_moments(one, moments, how)


def _inner(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _allocate_moments(inner: torch.optim.Optimizer) -> None:
    """Give torch's AdamW the state of step 0, which it makes at its first step: it can be saved and loaded then."""
    if not isinstance(inner, torch.optim.AdamW):  # Transformer Engine's has a way of its own
        return
    gpu = torch.cuda.is_available()
    for group in inner.param_groups:
        group["fused"] = gpu  # reads and writes every number once; it keeps its step counters on the GPU
        for weight in group["params"]:
            inner.state[weight] = {
                "step": torch.zeros((), device=weight.device if gpu else "cpu"),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }


def _load_moments(optimizer: MegatronOptimizer, moments: Any, sharding: str) -> None:
    states = list(optimizer.optimizer.state.values())
    steps = [state.pop("step") for state in states]  # the loader below takes every entry for a moment
    with torch.no_grad():
        getattr(optimizer, f"load_parameter_state_from_{sharding}")(moments)
    for state, step in zip(optimizer.optimizer.state.values(), steps, strict=True):
        state["step"] = step.clone()  # loading left all weights one shared counter


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Return the rate of step 1..steps: linear up to `peak` at `warmup`, then a cosine that ends at `floor`.

    The last step gets exactly `floor`. Source of the cosine: Loshchilov and Hutter, 2017 (SGDR), one cycle.
    """
    if step >= steps:
        return floor
    if step < warmup:
        return peak * step / warmup
    part = (step - warmup) / (steps - warmup)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * part))


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`, or its own multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
