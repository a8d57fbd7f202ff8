"""The weights that one rank holds, from the conversion plan's shapes: no model is built and torch is not imported."""

import math
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from conversion.plan import Part, Plan, Step

from ..training.layout import Layout
from .sizes import Sizes, sizes_of

Method = Literal["full", "lora", "qlora"]
Format = Literal["nf4", "int8"]
BLOCK, NESTED_BLOCK = 64, 256  # of NF4: columns with a scale, and scales with one; see conversion/quantized.py

# Axes that tensor parallelism divides, of a matrix the first of them; a vocabulary is padded until it does.
DIVIDED = {"vocab", "query", "kv", "ffn", "shared_ffn", "expert_ffn", "query_nope", "query_rope", "value"}
# And those that it divides in matrices only. Transformer Engine would leave them whole.
DIVIDED_IN_MATRICES = {"query_rank", "kv_rank", "rope"}

# megatron-core's order of a layer's parameters, which is that of the buffers they lie in. The two matrices of an
# expert follow each other, expert after expert.
LAYER_ORDER = (
    "input_layernorm.weight",
    "linear_qkv.layer_norm_weight",
    "linear_proj.weight",
    "linear_proj.bias",
    "linear_proj.post_layernorm.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_q_proj.weight",
    "linear_q_down_proj.weight",
    "linear_q_up_proj.weight",
    "linear_kv_down_proj.weight",
    "linear_kv_up_proj.weight",
    "q_layernorm.weight",
    "k_layernorm.weight",
    "linear_q_up_proj.layer_norm_weight",
    "linear_kv_up_proj.layer_norm_weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias",
    "mlp.linear_fc2.post_layernorm.weight",
    "router.weight",
    "experts.experts.linear_fc1.weight",
    "experts.experts.linear_fc2.weight",
    "shared_experts.gate_weight",
    "shared_experts.linear_fc1.weight",
    "shared_experts.linear_fc2.weight",
)
ROUTER_BIAS = ".router.expert_bias"  # a buffer, which nobody trains


@dataclass(frozen=True)
class Tuning:
    """What is trained: all weights, or low-rank adapters on matrices of the layers (Hu et al., 2021).

    `targets` are the ends of their HuggingFace names; None: every matrix. `quantize` is the format of all matrices of
    the layers when the method is qlora. `whole` are weights by megatron-core's names that are trained beside adapters.
    """

    method: Method = "full"
    lora_rank: int = 16
    targets: frozenset[str] | None = None
    quantize: Format = "nf4"
    whole: frozenset[str] = frozenset()

    def trains(self, name: str) -> bool:
        """Whether the weight that megatron-core calls so is trained itself."""
        return self.method == "full" or name in self.whole

    def takes(self, name: str) -> bool:
        """Whether layers whose HuggingFace name ends like this have an adapter."""
        return self.targets is None or name in self.targets


@dataclass(frozen=True)
class Weight:
    """One weight of a rank; counts are elements."""

    name: str
    count: int
    linear: bool = False  # a matrix of a layer: what adapters stand beside and 4-bit storage takes
    nf4: int = 0  # bytes of a matrix in that format,
    int8: int = 0  # and in that one
    adapter: tuple[tuple[str, tuple[int, ...]], ...] = ()  # of each HuggingFace layer in it: sides of A and of B
    shared: bool = False  # the tied embedding of a pipeline, which two stages hold
    expert: bool = False  # of a routed expert, which ranks of their own hold

    def frozen_bytes(self, tuning: Tuning, element: int) -> int:
        """Return the bytes that it takes where it is not trained; `element` are those of a number of the run."""
        if tuning.trains(self.name):
            return 0
        if self.linear and tuning.method == "qlora":
            return self.nf4 if tuning.quantize == "nf4" else self.int8
        return self.count * element

    def trained(self, tuning: Tuning) -> list["Weight"]:
        """Return what is trained of it, or instead of it, in megatron-core's order."""
        if tuning.trains(self.name):
            return [self]
        return [
            Weight(f"{self.name}.adapter", side * tuning.lora_rank, expert=self.expert)
            for name, sides in self.adapter
            if tuning.takes(name)
            for side in sides
        ]


def expert_ranks(layout: Layout) -> int:
    """Return how many ranks share each expert."""
    return layout.expert_tensor or layout.tensor


def chunk_layers(layout: Layout, layers: int, *, stage: int, chunk: int = 0) -> range:
    """Return the numbers of the layers of a chunk of pipeline stage `stage`.

    Chunk c of stage s is virtual stage c x PP + s: the stages take turns (Narayanan et al., 2021, section 2.2).
    """
    if not layout.first_stage_layers:
        each = layers // (layout.pipeline * layout.chunks)
        start = (chunk * layout.pipeline + stage) * each
        return range(start, start + each)
    if stage == 0:
        return range(layout.first_stage_layers)
    each = (layers - layout.first_stage_layers) // (layout.pipeline - 1)
    start = layout.first_stage_layers + (stage - 1) * each
    return range(start, start + each)


def stage_weights(plan: Plan, layout: Layout, stage: int) -> list[list[Weight]]:
    """Return the weights of each chunk of a rank of pipeline stage `stage`, in megatron-core's order.

    All ranks of a stage hold the same amount. A tied embedding stands on the first stage and, with more than one,
    on the last too.
    """
    outside = [step for step in plan.steps if step.layer is None]
    embedding = [step for step in outside if step.key.startswith("embedding.")]
    ending = [step for step in outside if step not in embedding]
    tied_pipeline = plan.tied and layout.pipeline > 1
    shared = [_weight(step, layout, shared=tied_pipeline) for step in embedding]
    layers = _layers(plan, layout)
    chunks = [
        list(chain(*(layers[number] for number in chunk_layers(layout, len(layers), stage=stage, chunk=chunk))))
        for chunk in range(layout.chunks)
    ]
    if stage == 0:
        chunks[0] = shared + chunks[0]
    if stage == layout.pipeline - 1:
        chunks[-1] += [_weight(step, layout) for step in ending]
        chunks[-1] += shared if tied_pipeline else []
    return chunks


def registered_elements(plan: Plan, layout: Layout, *, stage: int) -> int:
    """Return the elements of the buffers that modules of a stage register beside their weights, in the same format.

    Each latent attention has tables of YaRN's cosines and sines, each router with a bias that and a count of tokens.
    """
    sizes = sizes_of(plan)
    tables = 2 * sizes.latent.rope * sizes.latent.tables if sizes.latent else 0
    biased = sizes.experts and plan.settings.get("moe_router_enable_expert_bias")
    routers = 2 * sizes.experts.number if sizes.experts and biased else 0
    kinds, chunks = sizes.expert_layers, range(layout.chunks)
    held = chain(*(chunk_layers(layout, sizes.layers, stage=stage, chunk=chunk) for chunk in chunks))
    return sum(tables + routers * kinds[number] for number in held)


def model_weights(plan: Plan) -> list[Weight]:
    """Return the weights of the whole model, each once."""
    return stage_weights(plan, Layout(1, 1, 1, False, 1), 0)[0]


def active_parameters(plan: Plan) -> int:
    """Return the parameters that one token meets: all but the experts that it does not choose."""
    sizes, left_out = sizes_of(plan), 0
    if experts := sizes.experts:
        left_out = sum(experts.layers) * (experts.number - experts.chosen) * 3 * sizes.hidden * experts.ffn
    return plan.num_parameters - left_out


def adapter_parameters(plan: Plan, tuning: Tuning) -> int:
    """Return the parameters of LoRA adapters: rank x (rows + columns) of each matrix that has one."""
    parts = (part for step in plan.steps if step.is_linear for part in step.parts)
    return tuning.lora_rank * sum(sum(part.shape) for part in parts if tuning.takes(_end(part)))


def trained_parameters(plan: Plan, tuning: Tuning) -> int:
    """Return the parameters that a run trains, and whose checkpoints hold."""
    if tuning.method == "full":
        return plan.num_parameters
    whole = sum(math.prod(step.shape) for step in plan.steps if tuning.trains(step.key))
    return whole + adapter_parameters(plan, tuning)


def _layers(plan: Plan, layout: Layout) -> list[list[Weight]]:
    """Return the weights of a rank, layer by layer: those with experts are alike, and so are the others."""
    sizes = sizes_of(plan)
    kinds, of_kind = sizes.expert_layers, {}
    for experts in set(kinds):
        number = kinds.index(experts)
        of_kind[experts] = _layer([step for step in plan.steps if step.layer == number], layout, sizes)
    return [of_kind[experts] for experts in kinds]


def _layer(steps: list[Step], layout: Layout, sizes: Sizes) -> list[Weight]:
    """Return a layer's weights in megatron-core's order; every expert has the same."""
    once = [step for step in steps if not (_is_expert(step) and step.index[-1]) and not step.key.endswith(ROUTER_BIAS)]
    weights = [_weight(step, layout) for step in sorted(once, key=_place)]
    expert = [weight for weight in weights if weight.expert]
    if not expert or sizes.experts is None:
        return weights
    first = weights.index(expert[0])
    return weights[:first] + expert * (sizes.experts.number // layout.expert) + weights[first + len(expert) :]


def _place(step: Step) -> int:
    return next(place for place, ending in enumerate(LAYER_ORDER) if step.key.endswith(ending))


def _weight(step: Step, layout: Layout, *, shared: bool = False) -> Weight:
    expert, linear = _is_expert(step), step.is_linear
    ranks = expert_ranks(layout) if expert else layout.tensor
    shapes = [_local(part, ranks) for part in step.parts]
    return Weight(
        name=step.key,
        count=sum(map(math.prod, shapes)),
        linear=linear,
        nf4=_nf4_bytes(step, shapes, ranks=ranks) if linear else 0,
        int8=_int8_bytes(shapes) if linear else 0,
        adapter=tuple(_sides(step, number, ranks=ranks) for number in range(len(step.parts))) if linear else (),
        shared=shared,
        expert=expert,
    )


def _nf4_bytes(step: Step, shapes: list[tuple[int, ...]], *, ranks: int) -> int:
    """Return the bytes of a step's matrices, of which a rank holds `shapes`, in NF4; of the fullest rank.

    A rank holds whole blocks, also those that it shares with another. Codes take half a byte a weight and scales one
    a block. Scales of scales and their offsets, all on every rank, take 8 bytes for 256 blocks, and rows that lie
    together 8 to say where they are counted from.
    """
    rows, each = sum(shape[0] for shape in shapes), shapes[0][1]
    starts = range(0, step.shape[1], each)
    columns = max(_up(start + each, BLOCK) - start // BLOCK * BLOCK for start in starts)
    nested = sum(-(-part.shape[0] * (part.shape[1] // BLOCK) // NESTED_BLOCK) for part in step.parts)
    sections = sum(len(step.sections(number)) for number in range(len(step.parts)))
    runs = len(step.blocks) // ranks if step.shares > 1 else sections
    return rows * (columns // 2 + columns // BLOCK) + 8 * (nested + runs)


def _int8_bytes(shapes: list[tuple[int, ...]]) -> int:
    """Return the bytes of matrices in int8: one a weight, and four a row."""
    return sum(rows * (columns + 4) for rows, columns in shapes)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _sides(step: Step, number: int, *, ranks: int) -> tuple[str, tuple[int, ...]]:
    """Return the end of a part's name, the columns of its A, and the rows of each section of its B on a rank."""
    part = step.parts[number]
    rows, columns = _local(part, ranks)
    sections = step.sections(number)
    return _end(part), (columns, *(section * rows // part.shape[0] for section in sections))


def _end(part: Part) -> str:
    return part.name.removesuffix(".weight").rpartition(".")[2]


def _is_expert(step: Step) -> bool:
    return ".experts." in step.key


def _local(part: Part, ranks: int) -> tuple[int, ...]:
    """Return the shape of a rank's piece."""
    divided = DIVIDED | DIVIDED_IN_MATRICES if len(part.shape) > 1 else DIVIDED
    axis = next((number for number, axis in enumerate(part.axes) if divided.issuperset(axis.split("+"))), None)
    return tuple(-(-size // ranks) if number == axis else size for number, size in enumerate(part.shape))
