"""An estimate of the time of one optimizer step; nothing here is measured, and every assumption has a name.

FLOPs of a token, forward and backward: 6 for each weight of a matrix (the input embedding is a look-up and
counts nothing, the output layer counts) and 6 x layers x query width x SEQ_LEN of causal attention (Kaplan et
al., 2020; half of the full attention's 12). Frozen weights take 4 instead of 6; full recomputation runs the
forward pass, a third of that, a second time.
"""

import itertools
from dataclasses import dataclass

from conversion.plan import Plan

from ..training.config import TrainConfig
from ..training.layout import Layout
from .states import ELEMENT, GRADIENT
from .weights import Sizes, Tuning, model_weights, sizes_of, stage_weights

PEAK_FLOPS = {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12, "fp8": 1979e12}  # dense, of one H100 or H200
# Share of the peak that the matrices reach, by TP: each doubling cuts them smaller and adds collectives.
ASSUMED_MFU = {1: 0.40, 2: 0.36, 4: 0.31, 8: 0.25}
FULL_SPEED_TOKENS = 16384  # of a micro batch; each halving below that is assumed to cost 4%
CPU_PARAMETERS = 1e9  # a second and rank: gradients to CPU memory, AdamW's step there, weights back
LINK_BYTES = 300e9  # a second, between two GPUs of a node; reducing gradients is not hidden behind the backward pass


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and what they are made of."""

    seconds: float
    tokens_per_second_per_gpu: float
    flops_per_token: float
    assumed_mfu: float
    bubble: float  # share of the compute time that pipeline stages wait: (PP - 1) / micro batches / virtual stages
    reduce_seconds: float
    gather_seconds: float  # keys and values of context-parallel ranks
    cpu_seconds: float  # AdamW's step in CPU memory


def step_time(
    plan: Plan, config: TrainConfig, layout: Layout, tuning: Tuning, *, peak: float | None = None, on_cpu: int = 0
) -> StepTime:
    """Estimate a step under `layout`; `peak` is the dense FLOP/s of one GPU in the run's number format.

    `on_cpu` is the number of parameters of a rank whose optimizer state lies in CPU memory.
    """
    batch, precision, seq_len = config.batch, config.compute.precision, config.data.seq_len
    flops = flops_per_token(plan, seq_len, tuning, recompute=config.compute.recompute == "full")
    mfu = assumed_mfu(layout, tokens=batch.micro_batch_size * layout.padded(seq_len) // layout.context)
    tokens = batch.global_batch_size * seq_len
    busy = tokens * flops / (layout.world * (peak or PEAK_FLOPS[precision]) * mfu)
    bubble = (layout.pipeline - 1) / layout.micro_batches / layout.chunks
    reduce = _reduce_seconds(plan, layout, tuning, element=ELEMENT[precision])
    gather = _gather_seconds(sizes_of(plan), config, layout)
    on_host = on_cpu / CPU_PARAMETERS
    seconds = (busy + gather) * (1 + bubble) + reduce + on_host
    return StepTime(seconds, tokens / seconds / layout.world, flops, mfu, bubble, reduce, gather, on_host)


def flops_per_token(plan: Plan, seq_len: int, tuning: Tuning, *, recompute: bool = False) -> float:
    """Return the FLOPs of forward and backward pass for one token of a row of `seq_len`."""
    sizes = sizes_of(plan)
    matrices = sum(weight.count for weight in model_weights(plan) if weight.linear) + sizes.vocab * sizes.hidden
    attention = 6.0 * sizes.layers * sizes.query * seq_len
    again = (2 * matrices + attention / 3) if recompute else 0.0
    return (6 if tuning.method == "full" else 4) * matrices + attention + again


def assumed_mfu(layout: Layout, *, tokens: int) -> float:
    """Return the share of the peak that a rank is assumed to reach with micro batches of `tokens`."""
    mfu = ASSUMED_MFU[max(known for known in ASSUMED_MFU if known <= layout.tensor)]
    while tokens < FULL_SPEED_TOKENS:
        tokens, mfu = tokens * 2, mfu * 0.96
    return mfu


def _reduce_seconds(plan: Plan, layout: Layout, tuning: Tuning, *, element: int) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of the new weights, of the largest stage."""
    full = tuning.method == "full"
    stages = (itertools.chain(*stage_weights(plan, layout, stage)) for stage in range(layout.pipeline))
    trained = max(sum(w.count if full else w.adapter * tuning.lora_rank for w in weights) for weights in stages)
    shards = layout.data * layout.context
    return trained * (GRADIENT + element) * (shards - 1) / shards / LINK_BYTES


def _gather_seconds(sizes: Sizes, config: TrainConfig, layout: Layout) -> float:
    """All-gather of keys and values in every layer's forward passes, reduce-scatter of their gradients."""
    tokens = config.batch.micro_batch_size * layout.micro_batches * layout.padded(config.data.seq_len)
    received = tokens * (layout.context - 1) / layout.context
    layers = sizes.layers / layout.pipeline
    passes = 2 if config.compute.recompute in ("none", "offload") else 3
    numbers = (sizes.key + sizes.value) / layout.tensor * received * layers * passes
    return numbers * ELEMENT[config.compute.precision] / LINK_BYTES
