"""Bytes that the forward pass keeps for the backward pass, from the shapes of our layers without Transformer Engine.

Every term is a tensor that autograd saves in `training/parallel/{norm,attention}.py` or in megatron-core's
linears, unfused SwiGLU and vocabulary-parallel cross entropy; a test holds the sums against autograd, to the byte.
`element` is 2 for bf16 and 4 for fp32. Tokens are those of one micro batch on one data-parallel rank.
"""

from dataclasses import dataclass

from ..training.config import TrainConfig
from ..training.layout import Layout
from .states import ELEMENT
from .weights import Sizes, Tuning, stage_layers

WIDE = 4  # bytes of a number inside the norm, the softmax and the loss
INDEX = 8  # bytes of a token id
LORA_MATRICES = 7  # q, k, v, o, gate, up, down


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch of a rank, and what is kept of it.

    `inside` are the tokens between the matrices, which sequence parallelism divides. `recompute` is as in the
    settings, `unit` the layers that are recomputed together.
    """

    row: int  # tokens of a row
    tokens: int
    inside: int
    element: int
    tensor: int
    recompute: str = "none"
    unit: int = 1


def micro_batch(config: TrainConfig, layout: Layout) -> MicroBatch:
    """Return the micro batch of a run; a row is rounded up to a multiple of TP."""
    row = -(-config.data.seq_len // layout.tensor) * layout.tensor
    tokens = config.batch.micro_batch_size * row
    inside = tokens // layout.tensor if layout.sequence else tokens
    compute = config.compute
    return MicroBatch(
        row, tokens, inside, ELEMENT[compute.precision], layout.tensor, compute.recompute, compute.recompute_layers
    )


def layer_bytes(sizes: Sizes, batch: MicroBatch) -> int:
    """Return what one layer saves when all weights are trained."""
    e, tensor, query, kv = batch.element, batch.tensor, sizes.query, sizes.kv
    rotary = 4 * e * sizes.head  # cosine and sine, for queries and for keys, on every tensor-parallel rank
    fused_qkv = e * (query + 2 * kv)  # kept whole by the values, which are a view of it
    attention = fused_qkv + e * (query + kv) + 2 * e * query + WIDE * sizes.heads  # rotated; output, twice; log-sum-exp
    if sizes.qk_norm:  # exact in bf16; in fp32 part of the inputs lies in fused_qkv already
        attention += (WIDE + e) * (query + kv) + WIDE * (sizes.heads + sizes.groups)
    mlp = 5 * e * sizes.ffn  # gate and up, silu(gate), up + 0, their product
    return 2 * norm_bytes(sizes, batch) + batch.tokens * (rotary + (attention + mlp) // tensor)


def norm_bytes(sizes: Sizes, batch: MicroBatch) -> int:
    """Return what a norm saves: its input in fp32, the normed input, its output (a matrix's input), 1/rms."""
    return batch.inside * ((WIDE + 2 * batch.element) * sizes.hidden + WIDE)


def tuned_layer_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning) -> int:
    """Return what one layer saves under `tuning` without recomputation.

    Of adapters it is derived and not measured: they are not built yet.
    """
    whole = layer_bytes(sizes, batch)
    if tuning.method == "full":
        return whole
    frozen_norms = 2 * batch.inside * batch.element * sizes.hidden  # a frozen norm does not keep the normed input
    return whole - frozen_norms + LORA_MATRICES * batch.tokens * batch.element * tuning.lora_rank


def kept_layers_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning, *, layers: int) -> int:
    """Return what `layers` layers keep of one micro batch until its backward pass."""
    one = tuned_layer_bytes(sizes, batch, tuning)
    if batch.recompute == "full":
        inputs = -(-layers // batch.unit) * batch.inside * batch.element * sizes.hidden  # of the units
        return inputs + WIDE * sizes.head * batch.row  # the rotary angles, once
    if batch.recompute == "offload":
        return 0
    if batch.recompute == "selective":  # without the kernel's own output and log-sum-exp; with the mask's kind
        one += WIDE - batch.tokens * (batch.element * sizes.query + WIDE * sizes.heads) // batch.tensor
    return layers * one


def stage_bytes(sizes: Sizes, batch: MicroBatch, layout: Layout, tuning: Tuning, *, stage: int) -> int:
    """Return what all micro batches in flight on a pipeline stage keep, without the logits.

    With 1F1B, stage i of PP holds the activations of PP - i micro batches (Narayanan et al., 2021).
    """
    layers, last = len(stage_layers(layout, sizes.layers, stage)), stage == layout.pipeline - 1
    hidden = batch.inside * batch.element * sizes.hidden
    one = kept_layers_bytes(sizes, batch, tuning, layers=layers)
    if stage == 0:
        one += batch.tokens * (INDEX + (batch.tensor > 1))  # which tokens' embeddings this rank holds
    if last:
        one += norm_bytes(sizes, batch)
    one += hidden * ((stage > 0) + (not last))  # received and sent tensors
    working = {"full": batch.unit, "offload": 1}.get(batch.recompute, 0)  # layers that are there in full for a moment
    in_flight = min(layout.pipeline - stage, layout.micro_batches)
    return in_flight * one + working * tuned_layer_bytes(sizes, batch, tuning)


def loss_bytes(sizes: Sizes, batch: MicroBatch) -> int:
    """Return what the loss saves: the softmax in fp32, the labels and whether each is on this rank."""
    return batch.tokens * (WIDE * -(-sizes.vocab // batch.tensor) + INDEX + 1)


def logits_bytes(sizes: Sizes, batch: MicroBatch) -> int:
    """Return the peak of the loss: what it saves, and beside the fp32 softmax the bf16 logits or their gradient."""
    copies = 0 if batch.element == WIDE else batch.element
    return loss_bytes(sizes, batch) + batch.tokens * copies * -(-sizes.vocab // batch.tensor)
