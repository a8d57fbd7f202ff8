"""The weights that one rank holds, from the conversion plan's shapes: no model is built and torch is not imported."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from conversion.plan import MERGED_LAYERS, Part, Plan, Step

from ..training.layout import Layout

Method = Literal["full", "lora", "qlora"]

# Axes that tensor parallelism divides; the vocabulary is padded until it does.
DIVIDED = {"vocab", "query", "kv", "ffn"}

# megatron-core's order of a layer's parameters, which is that of the buffers they lie in.
LAYER_ORDER = (
    "linear_qkv.layer_norm_weight",
    "linear_proj.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "q_layernorm.weight",
    "k_layernorm.weight",
    "linear_fc1.layer_norm_weight",
    "linear_fc1.weight",
    "linear_fc2.weight",
)


@dataclass(frozen=True)
class Tuning:
    """What is trained: all weights, or low-rank adapters on every matrix of the layers (Hu et al., 2021)."""

    method: Method = "full"
    lora_rank: int = 16


@dataclass(frozen=True)
class Weight:
    """One weight of a rank; counts are elements."""

    name: str
    count: int
    linear: bool = False  # a matrix of a layer: what adapters stand beside and 4-bit storage takes
    adapter: int = 0  # elements of its adapters, for each unit of LoRA rank
    shared: bool = False  # the tied embedding of a pipeline, which two stages hold


@dataclass(frozen=True)
class Sizes:
    """The model's numbers; `query` and `kv` are heads and key/value groups times the width of a head."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocab: int
    qk_norm: bool

    @property
    def query(self) -> int:
        return self.heads * self.head

    @property
    def kv(self) -> int:
        return self.groups * self.head


def sizes_of(plan: Plan) -> Sizes:
    """Return the numbers of the model that `plan` describes."""
    said = {name: value for name, value in plan.settings.items() if isinstance(value, int)}
    return Sizes(
        layers=said["num_layers"],
        hidden=said["hidden_size"],
        ffn=said["ffn_hidden_size"],
        heads=said["num_attention_heads"],
        groups=said["num_query_groups"],
        head=said["kv_channels"],
        vocab=said["vocab_size"],
        qk_norm=bool(said.get("qk_layernorm", False)),
    )


def stage_layers(layout: Layout, layers: int, stage: int) -> range:
    """Return the numbers of the layers that pipeline stage `stage` runs."""
    if not layout.first_stage_layers:
        each = layers // layout.pipeline
        return range(stage * each, (stage + 1) * each)
    if stage == 0:
        return range(layout.first_stage_layers)
    each = (layers - layout.first_stage_layers) // (layout.pipeline - 1)
    start = layout.first_stage_layers + (stage - 1) * each
    return range(start, start + each)


def stage_weights(plan: Plan, layout: Layout, stage: int) -> list[Weight]:
    """Return the weights of a rank of pipeline stage `stage`, in megatron-core's order.

    All tensor-parallel ranks of a stage hold the same amount. A tied embedding stands on the first stage
    and, with more than one, on the last too.
    """
    here = stage_layers(layout, sizes_of(plan).layers, stage)
    first, last = stage == 0, stage == layout.pipeline - 1
    embedding = [step for step in plan.steps if step.key.startswith("embedding.")]
    layer = sorted((step for step in plan.steps if step.layer == 0), key=_place)  # all layers are alike
    ending = [step for step in plan.steps if step.layer is None and step not in embedding]
    tied_pipeline = plan.tied and layout.pipeline > 1
    weights = [_weight(step, layout.tensor, shared=tied_pipeline) for step in embedding] if first else []
    weights += [_weight(step, layout.tensor) for step in layer] * len(here)
    if last:
        weights += [_weight(step, layout.tensor) for step in ending]
        if tied_pipeline:
            weights += [_weight(step, layout.tensor, shared=True) for step in embedding]
    return weights


def adapter_parameters(plan: Plan, rank: int) -> int:
    """Return the parameters of LoRA adapters of `rank` on every matrix of the layers: rank x (rows + columns) each."""
    return rank * sum(sum(part.shape) for step in plan.steps if _is_linear(step) for part in step.parts)


def _place(step: Step) -> int:
    return next(place for place, ending in enumerate(LAYER_ORDER) if step.key.endswith(ending))


def _weight(step: Step, tensor: int, *, shared: bool = False) -> Weight:
    shapes = [tuple(_local(part, tensor)) for part in step.parts]
    linear = _is_linear(step)
    return Weight(
        name=step.key,
        count=sum(map(math.prod, shapes)),
        linear=linear,
        adapter=sum(map(sum, shapes)) if linear else 0,
        shared=shared,
    )


def _is_linear(step: Step) -> bool:
    return step.key.startswith(MERGED_LAYERS) and len(step.shape) == 2


def _local(part: Part, tensor: int) -> Iterator[int]:
    for axis, size in zip(part.axes, part.shape, strict=True):
        yield -(-size // tensor) if axis in DIVIDED else size
