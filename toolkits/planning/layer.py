"""Bytes that one layer keeps for its backward pass, from the shapes of our layers without Transformer Engine.

Every term is a tensor that autograd saves in `training/parallel/{norm,attention}.py` or in megatron-core's linears,
SwiGLU, latent attention, router, token dispatcher (all-gather) and experts one by one; a test holds the sums against
autograd, to the byte. On a GPU norms, SwiGLU and the rotations of plain attention are compiled, and compute again in
the backward pass what is cheap: `fused`. `element` is 2 for bf16 and 4 for fp32. Tokens are those of one micro batch
on one rank.

How many tokens choose a rank's experts is the data's business: with EP what is said here is the mean over the ranks
that share the experts, and a rank whose experts are popular keeps more. At EP = 1 it is exact.
"""

from dataclasses import dataclass

from ..training.config import TrainConfig
from ..training.layout import Layout
from .sizes import Experts, Sizes
from .states import ELEMENT
from .weights import Tuning, expert_ranks

WIDE = 4  # bytes of a number inside the norm, the softmax and the loss
INDEX = 8  # bytes of a token id, or of a key's place


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch of a rank, and what is kept of it.

    `inside` are the tokens between the matrices, which sequence parallelism divides; `gathered` the keys of other
    context-parallel ranks and its own that its queries attend to, 0 without context parallelism; `offered` the tokens
    of all ranks that share experts, among which those of a rank find theirs. `recompute` is as in the settings, `unit`
    the layers that are recomputed together.
    """

    tokens: int
    inside: int
    gathered: int
    offered: int
    element: int
    layout: Layout
    fused: bool
    recompute: str = "none"
    unit: int = 1

    @property
    def tensor(self) -> int:
        """Ranks that share a layer."""
        return self.layout.tensor


def micro_batch(config: TrainConfig, layout: Layout, *, fused: bool = True) -> MicroBatch:
    """Return the micro batch of a run whose rows are full; `fused` as on a GPU.

    Of a conversation's 2 CP pieces a rank holds one from the front and one from the back, which together attend
    to 2 CP + 1 pieces.
    """
    whole, context = config.batch.micro_batch_size * layout.padded(config.data.row_tokens), layout.context
    tokens = whole // context
    inside = tokens // layout.tensor if layout.sequence else tokens
    return MicroBatch(
        tokens=tokens,
        inside=inside,
        gathered=whole // (2 * context) * (2 * context + 1) if context > 1 else 0,
        offered=inside * expert_ranks(layout) * layout.expert,
        element=ELEMENT[config.compute.precision],
        layout=layout,
        fused=fused,
        recompute=config.compute.recompute,
        unit=config.compute.recompute_layers,
    )


def layer_bytes(sizes: Sizes, batch: MicroBatch, *, experts: bool = False) -> int:
    """Return what one layer saves when all weights are trained and nothing is recomputed in one piece."""
    inside = 2 * norm_bytes(batch, sizes.hidden) + attention_bytes(sizes, batch)
    if experts and sizes.experts:
        return inside + experts_bytes(sizes.hidden, sizes.experts, batch)
    return inside + _gated_bytes(batch, sizes.ffn)


def tuned_layer_bytes(sizes: Sizes, batch: MicroBatch, tuning: Tuning, *, experts: bool = False) -> int:
    """Return what one layer saves under `tuning`; of adapters, when every matrix has one."""
    whole = layer_bytes(sizes, batch, experts=experts)
    if tuning.method == "full":
        return whole
    widths = 2 * sizes.hidden + (sizes.latent.query_rank + sizes.latent.kv_rank if sizes.latent else 0)
    normed = 0 if batch.fused else batch.inside * batch.element * widths  # not kept by frozen norms
    return whole - normed + _adapter_numbers(sizes, batch, experts=experts) * batch.element * tuning.lora_rank


def _adapter_numbers(sizes: Sizes, batch: MicroBatch, *, experts: bool) -> int:
    """Return what the adapters of a layer save, for each unit of their rank.

    That is each A x, behind the reduction where ranks divide the inputs; and the matrices A of layers that are one
    in Megatron-core, one under the other.
    """
    divided = sizes.attention_matrices - 1  # their outputs, by tensor parallelism; of the last its inputs
    stacked = 0 if sizes.latent else 3 * sizes.hidden
    attention = divided * batch.tokens + batch.inside + stacked
    if not (experts and sizes.experts):
        return attention + 2 * batch.tokens + batch.inside + 2 * sizes.hidden
    local = sizes.experts.number // batch.layout.expert
    mlps = 3 * _rows(sizes.experts, batch) + local * 2 * sizes.hidden
    if sizes.experts.shared_ffn:
        mlps += 2 * batch.tokens + batch.inside + 2 * sizes.hidden
    return attention + mlps


def norm_bytes(batch: MicroBatch, width: int, *, cut_from: int | None = None) -> int:
    """Return what a norm saves: its input, its output (a matrix's input) and 1/rms.

    Not compiled, it saves the input in fp32, and the normed input too. An input that is not copied to fp32 keeps the
    tensor that it was cut from, of `cut_from` elements.
    """
    copied = not batch.fused and batch.element < WIDE
    numbers = batch.inside * width
    input_ = numbers if cut_from is None or copied else cut_from
    outputs = numbers * batch.element * (1 if batch.fused else 2)
    return input_ * (WIDE if copied else batch.element) + outputs + batch.inside * WIDE


def attention_bytes(sizes: Sizes, batch: MicroBatch) -> int:
    """Return what the attention saves between the norm in front of it and the residual stream.

    Its kernel keeps its output, beside the output matrix's input, and the log-sum-exp. Without context
    parallelism it keeps the keys, rotated, and the values; these are a view of the fused q, k and v, which is kept
    whole. Latent attention's lie by themselves.
    """
    e, recomputed = batch.element, batch.recompute == "selective"
    own_keys = recomputed or not batch.gathered
    each = e * (sizes.query + sizes.attended)  # rotated queries; the output matrix's input
    each += e * sizes.key if own_keys else 0
    if sizes.latent:
        each += e * sizes.value if own_keys else 0
    else:
        whole = own_keys or (sizes.qk_norm and batch.fused)
        each += e * (sizes.query + sizes.key + sizes.value) if whole else 0
    if not recomputed:
        each += e * sizes.attended + WIDE * sizes.heads
    if sizes.qk_norm:
        # Exact in bf16; in fp32 part of the inputs lies in the fused q, k and v already.
        each += e * sizes.query if batch.fused else (WIDE + e) * (sizes.query + sizes.key)
        each += WIDE * (sizes.heads + sizes.groups)
    gathered = 0 if recomputed else batch.gathered * e * (sizes.key + sizes.value)
    kept = (batch.tokens * each + gathered) // batch.tensor + WIDE * recomputed  # the mask's kind
    return kept + _rotary_bytes(sizes, batch) + _latent_norms_bytes(sizes, batch)


def _rotary_bytes(sizes: Sizes, batch: MicroBatch) -> int:
    """Return the cosines and sines, for queries and for keys; a compiled rotation computes them again."""
    again = batch.fused and not sizes.latent
    return 0 if again else 4 * batch.tokens * batch.element * sizes.rotated


def _latent_norms_bytes(sizes: Sizes, batch: MicroBatch) -> int:
    if (latent := sizes.latent) is None:
        return 0
    query, kv = latent.query_rank, latent.kv_rank
    kept = norm_bytes(batch, kv, cut_from=batch.tokens * (kv + latent.rope))
    return kept + (norm_bytes(batch, query, cut_from=batch.tokens * query) if query else 0)


def experts_bytes(hidden: int, experts: Experts, batch: MicroBatch) -> int:
    """Return what the router, the dispatch, the routed and the shared experts save of the normed tokens."""
    e = batch.element
    probability = WIDE if experts.wide_router else e
    choice = batch.inside * _choice_bytes(experts)
    # Of all tokens on offer, for each of the rank's experts: how probable, and whether chosen.
    map_ = batch.offered * experts.number // batch.layout.expert * (probability + 1)
    activated = (
        (3 if batch.fused else 6) * e * experts.ffn // expert_ranks(batch.layout)
    )  # not compiled, also before the probability
    rows = _rows(experts, batch) * (e * hidden + activated + probability + INDEX)
    shared = _gated_bytes(batch, experts.shared_ffn)
    if experts.shared_gate:
        shared += batch.inside * e * (hidden + 1)
    return choice + map_ + rows + shared


def dispatched_bytes(sizes: Sizes, batch: MicroBatch) -> int:
    """Return what a layer with experts needs for a moment: all tokens on offer, its own in rows, their gradients."""
    if sizes.experts is None:
        return 0
    offered = batch.offered if batch.offered > batch.inside else 0
    return 2 * (offered + _rows(sizes.experts, batch)) * batch.element * sizes.hidden


def _rows(experts: Experts, batch: MicroBatch) -> int:
    """Return the tokens that a rank's experts see, each as often as it chose one; the mean over ranks."""
    return batch.offered * experts.chosen // batch.layout.expert


def _choice_bytes(experts: Experts) -> int:
    """Return what choosing the experts of one token saves, by megatron-core's ways of scoring them."""
    places = INDEX * experts.chosen
    if experts.scores != "sigmoid":
        return WIDE * (experts.number if experts.scores == "all" else experts.chosen) + places
    found = WIDE * (experts.number + experts.chosen + 1) + places  # and the sum of the chosen ones' scores
    if experts.groups:  # the best of each, the groups that are left, and a mask of the others' experts
        best = experts.groups * (experts.chosen // experts.chosen_groups)
        found += INDEX * (best + experts.chosen_groups) + experts.number
    return found


def _gated_bytes(batch: MicroBatch, width: int) -> int:
    """Return what an MLP saves: gate, up and their product; not compiled, silu(gate) and up + 0 too."""
    return batch.tokens * ((3 if batch.fused else 5) * batch.element * width // batch.tensor)
