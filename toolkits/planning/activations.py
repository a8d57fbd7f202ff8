"""Bytes that the forward pass keeps for the backward pass on one rank: all layers and micro batches, and the loss."""

from collections.abc import Iterable

from ..training.layout import LOSS_TOKENS, Layout
from .layer import INDEX, WIDE, MicroBatch, norm_bytes, tuned_layer_bytes
from .sizes import Sizes
from .weights import Tuning, chunk_layers

# What is kept depends on whether they are trained. A tied head is the embedding: neither is trained beside adapters.
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def kept_layers_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning, *, layers: Iterable[int]) -> int:
    """Return what the layers with these numbers keep of one micro batch until its backward pass, on the GPU."""
    kinds = [sizes.expert_layers[number] for number in layers]
    angles = 0 if sizes.latent else batch.tokens * WIDE * sizes.rotated  # of all layers
    if batch.recompute == "full":
        return angles + -(-len(kinds) // batch.unit) * batch.inside * batch.element * sizes.hidden  # inputs of units
    if batch.recompute == "offload":
        return 0
    return angles * batch.fused + _layers_bytes(sizes, batch, tuning, kinds=kinds)


def _layers_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning, *, kinds: list[bool]) -> int:
    return sum(
        kinds.count(experts) * tuned_layer_bytes(sizes, batch, tuning, experts=experts) for experts in set(kinds)
    )


def in_flight(layout: Layout, *, stage: int) -> list[int]:
    """Return, for each chunk of a rank of `stage`, of how many micro batches it keeps activations at the worst moment.

    With 1F1B stage i of PP starts PP - i micro batches before the first one goes back. Virtual stages are
    interleaved in groups of PP micro batches, and stage i starts 2 (PP - i - 1) + (chunks - 1) PP + 1
    (Narayanan et al., 2021, section 2.2; megatron-core's get_pp_rank_microbatches).
    """
    pipeline, chunks = layout.pipeline, layout.chunks
    if chunks == 1:
        return [min(pipeline - stage, layout.micro_batches)]
    started = min(2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1, chunks * layout.micro_batches)
    order = [number // pipeline % chunks for number in range(started)]
    return [order.count(chunk) for chunk in range(chunks)]


def stage_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning, *, stage: int) -> int:
    """Return what all micro batches in flight on a pipeline stage keep on the GPU, without the loss."""
    kept = sum(
        count * _chunk_bytes(sizes, batch, tuning, stage=stage, chunk=chunk)
        for chunk, count in enumerate(in_flight(batch.layout, stage=stage))
    )
    working = {"full": batch.unit, "offload": 1}.get(batch.recompute, 0)  # layers that are there in full for a moment
    return kept + working * largest_layer_bytes(sizes, batch, tuning, stage=stage)


def largest_layer_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning, *, stage: int) -> int:
    """Return what the layer of a pipeline stage that saves most does."""
    held = (chunk_layers(batch.layout, sizes.layers, stage=stage, chunk=n) for n in range(batch.layout.chunks))
    kinds = {sizes.expert_layers[number] for layers in held for number in layers}
    return max(tuned_layer_bytes(sizes, batch, tuning, experts=experts) for experts in kinds)


def host_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning, *, stage: int) -> int:
    """Return what is kept in CPU memory instead."""
    if batch.recompute != "offload":
        return 0
    kinds = [
        sizes.expert_layers[number]
        for chunk, count in enumerate(in_flight(batch.layout, stage=stage))
        for number in count * list(chunk_layers(batch.layout, sizes.layers, stage=stage, chunk=chunk))
    ]
    return _layers_bytes(sizes, batch, tuning, kinds=kinds)


def _chunk_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning, *, stage: int, chunk: int) -> int:
    """Return what a chunk keeps of one micro batch."""
    layout = batch.layout
    first = stage == 0 and chunk == 0
    last = stage == layout.pipeline - 1 and chunk == layout.chunks - 1
    hidden = batch.inside * batch.element * sizes.hidden
    layers = chunk_layers(layout, sizes.layers, stage=stage, chunk=chunk)
    kept = kept_layers_bytes(sizes, batch, tuning, layers=layers)
    if batch.recompute == "none":
        kept += batch.gathered * INDEX  # where they are among the keys of all ranks
    frozen = tuning.method != "full"
    if first and tuning.trains(EMBEDDING):
        kept += batch.tokens * (INDEX + (batch.tensor > 1))  # which tokens' embeddings this rank holds
    if last:
        kept += norm_bytes(batch, sizes.hidden) - hidden * (frozen and not batch.fused)
    # A sent tensor; a received one is what the first layer keeps, unless that is in CPU memory.
    return kept + hidden * ((not last) + (not first and batch.recompute == "offload"))


def loss_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning) -> int:
    """Return what the loss saves: labels, the log of the softmax's sum, the final norm's output of all tokens.

    With a frozen output layer it is the gradient of that output, which is as large, and nothing else. A reward model's
    head keeps what the final norm gave this rank.
    """
    if sizes.reward_head:
        return 0
    others = (batch.tokens - batch.inside) * batch.element * sizes.hidden  # of tensor-parallel ranks
    return others + (batch.tokens * (INDEX + WIDE) if tuning.trains(HEAD) else 0)


def logits_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning) -> int:
    """Return the peak of the loss: what it saves, logits and their gradient of some tokens, the weight's gradient.

    That gradient is summed in fp32, and beside the sum there is the part that is added.
    """
    if sizes.reward_head:  # the hidden states of some tokens in fp32, and as much for their gradient; all scores
        some = -(-batch.inside // -(-batch.inside // LOSS_TOKENS))
        return WIDE * (2 * some * sizes.hidden + batch.tokens)
    parts = -(-batch.tokens // LOSS_TOKENS)
    rows = -(-sizes.vocab // batch.tensor)
    logits = 2 * batch.element * rows * -(-batch.tokens // parts)
    gradient = (WIDE + batch.element) * rows * sizes.hidden if tuning.trains(HEAD) else 0
    return loss_bytes(sizes, batch, tuning) + logits + gradient
