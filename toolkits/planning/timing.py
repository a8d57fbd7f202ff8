"""An estimate of the time of one optimizer step; nothing here is measured, and every assumption has a name.

FLOPs of a token, forward and backward: 6 for each weight that it meets (the input embedding is a look-up and counts
nothing, the output layer counts; of experts the chosen ones and the shared one) and 3 x layers x (width of the queries
+ width of the attended values) x SEQ_LEN of causal attention (Kaplan et al., 2020; half of the full attention's).
Frozen weights take 4 instead of 6; full recomputation runs the forward pass, a third of that, a second time.
"""

import itertools
from dataclasses import dataclass

from conversion.plan import Plan

from ..training.config import TrainConfig
from ..training.layout import Layout
from .layer import micro_batch
from .sizes import Sizes, sizes_of
from .states import ELEMENT, GRADIENT
from .weights import Tuning, Weight, active_parameters, expert_ranks, stage_weights

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
    dispatch_seconds: float  # tokens to the ranks of their experts, and back
    cpu_seconds: float  # AdamW's step in CPU memory


def step_time(
    plan: Plan, config: TrainConfig, layout: Layout, tuning: Tuning, *, peak: float | None = None, on_cpu: int = 0
) -> StepTime:
    """Estimate a step under `layout`; `peak` is the dense FLOP/s of one GPU in the run's number format.

    `on_cpu` is the number of parameters of a rank whose optimizer state lies in CPU memory.
    """
    batch, precision, row = config.batch, config.compute.precision, config.data.row_tokens
    flops = flops_per_token(plan, config.data.seq_len, tuning, recompute=config.compute.recompute == "full")
    mfu = assumed_mfu(layout, tokens=batch.micro_batch_size * layout.padded(row) // layout.context)
    tokens = batch.global_batch_size * row
    busy = tokens * flops / (layout.world * (peak or PEAK_FLOPS[precision]) * mfu)
    bubble = (layout.pipeline - 1) / layout.micro_batches / layout.chunks
    reduce = _reduce_seconds(plan, layout, tuning, element=ELEMENT[precision])
    gather = _gather_seconds(sizes_of(plan), config, layout)
    dispatch = _dispatch_seconds(sizes_of(plan), config, layout)
    on_host = on_cpu / CPU_PARAMETERS
    seconds = (busy + gather + dispatch) * (1 + bubble) + reduce + on_host
    return StepTime(seconds, tokens / seconds / layout.world, flops, mfu, bubble, reduce, gather, dispatch, on_host)


def flops_per_token(plan: Plan, seq_len: int, tuning: Tuning, *, recompute: bool = False) -> float:
    """Return the FLOPs of forward and backward pass for one token of a row of `seq_len`."""
    sizes = sizes_of(plan)
    matrices = active_parameters(plan) - (0 if plan.tied else sizes.vocab * sizes.hidden)
    attention = 3.0 * sizes.layers * (sizes.query + sizes.attended) * seq_len
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

    def sent(weight: Weight) -> float:
        trained = sum(each.count for each in weight.trained(tuning))
        return trained * (1 - 1 / (expert_shards if weight.expert else shards))

    shards = layout.data * layout.context
    expert_shards = shards * layout.tensor // (layout.expert * expert_ranks(layout))
    stages = (itertools.chain(*stage_weights(plan, layout, stage)) for stage in range(layout.pipeline))
    return max(sum(map(sent, weights)) for weights in stages) * (GRADIENT + element) / LINK_BYTES


def _gather_seconds(sizes: Sizes, config: TrainConfig, layout: Layout) -> float:
    """All-gather of keys and values in every layer's forward passes, reduce-scatter of their gradients."""
    tokens = config.batch.micro_batch_size * layout.micro_batches * layout.padded(config.data.row_tokens)
    received = tokens * (layout.context - 1) / layout.context
    layers = sizes.layers / layout.pipeline
    passes = 2 if config.compute.recompute in ("none", "offload") else 3
    numbers = (sizes.key + sizes.value) / layout.tensor * received * layers * passes
    return numbers * ELEMENT[config.compute.precision] / LINK_BYTES


def _dispatch_seconds(sizes: Sizes, config: TrainConfig, layout: Layout) -> float:
    """All-gather of all expert-parallel ranks' tokens and reduce-scatter of what their experts give, both ways."""
    batch = micro_batch(config, layout)
    received = batch.offered * (layout.expert - 1) // layout.expert * layout.micro_batches
    passes = 4 if config.compute.recompute in ("none", "offload") else 6
    layers = sum(sizes.expert_layers) / layout.pipeline
    return received * sizes.hidden * layers * passes * ELEMENT[config.compute.precision] / LINK_BYTES
