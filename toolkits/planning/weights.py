"""The weights that one rank holds, from the conversion plan's shapes: no model is built and torch is not imported."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from conversion.plan import MERGED_LAYERS, Part, Plan, Step

from ..training.layout import Layout

Method = Literal["full", "lora", "qlora"]

# Axes that tensor parallelism divides, of a matrix the first of them; a vocabulary is padded until it does.
DIVIDED = {"vocab", "query", "kv", "ffn", "shared_ffn", "expert_ffn", "query_nope", "query_rope", "value"}
# And those that it divides in matrices only. Transformer Engine would leave them whole.
DIVIDED_IN_MATRICES = {"query_rank", "kv_rank", "rope"}

# megatron-core's order of a layer's parameters, which is that of the buffers they lie in; the two matrices of an
# expert follow each other.
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
EXPERTS_PLACE = LAYER_ORDER.index("experts.experts.linear_fc1.weight")


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
    expert: bool = False  # of a routed expert, which ranks of their own hold

    def adapters(self, rank: int) -> "Weight":
        """Return what is trained instead of it with LoRA of `rank`."""
        return Weight(f"{self.name}.adapter", self.adapter * rank, expert=self.expert)


@dataclass(frozen=True)
class Experts:
    """The layers with experts, `layers` by number; `chosen` of `number` experts see a token.

    `ffn` is the width of an expert, `shared_ffn` that of the one that sees every token, 0: there is none. `scores` are
    those of all experts, of the chosen ones, or sigmoids; of `groups`, if there are some, `chosen_groups` are left.
    """

    number: int
    chosen: int
    ffn: int
    shared_ffn: int
    shared_gate: bool
    layers: tuple[bool, ...]
    scores: Literal["all", "chosen", "sigmoid"]
    wide_router: bool  # computes in fp32
    groups: int
    chosen_groups: int


@dataclass(frozen=True)
class Latent:
    """Latent attention: widths of the compressed query (0: it is not) and of keys and values together.

    Of a head: the part that is not rotated, the one that is, and the value. `tables` are the positions of which it
    registers cosines and sines.
    """

    query_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    tables: int


@dataclass(frozen=True)
class Sizes:
    """The model's numbers."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocab: int
    qk_norm: bool
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * (self.latent.nope + self.latent.rope if self.latent else self.head)

    @property
    def key(self) -> int:
        """Width of the keys of all heads, or groups of them."""
        return self.query if self.latent else self.groups * self.head

    @property
    def value(self) -> int:
        """Width of their values."""
        return self.heads * self.latent.value if self.latent else self.key

    @property
    def attended(self) -> int:
        """Width of what the attention gives."""
        return self.value if self.latent else self.query

    @property
    def rotated(self) -> int:
        """Width of a head's angles."""
        return self.latent.rope if self.latent else self.head

    @property
    def attention_matrices(self) -> int:
        """Matrices of one attention; a compressed query has two."""
        return 4 + bool(self.latent and self.latent.query_rank)

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether it has experts, layer by layer."""
        return self.experts.layers if self.experts else (False,) * self.layers


def sizes_of(plan: Plan) -> Sizes:
    """Return the numbers of the model that `plan` describes."""
    said = {name: value for name, value in plan.settings.items() if isinstance(value, int)}
    latent = "multi_latent_attention" in said
    return Sizes(
        layers=said["num_layers"],
        hidden=said["hidden_size"],
        ffn=said["ffn_hidden_size"],
        heads=said["num_attention_heads"],
        groups=said["num_query_groups"],
        head=said["kv_channels"],
        vocab=said["vocab_size"],
        qk_norm=bool(said.get("qk_layernorm", False)) and not latent,
        experts=_experts(plan.settings, said) if "num_moe_experts" in said else None,
        latent=_latent(plan.settings, said) if latent else None,
    )


def _experts(settings: Mapping[str, object], said: Mapping[str, int]) -> Experts:
    pattern = settings.get("moe_layer_freq", [1] * said["num_layers"])
    assert isinstance(pattern, list)
    sigmoid = settings.get("moe_router_score_function") == "sigmoid"
    return Experts(
        number=said["num_moe_experts"],
        chosen=said["moe_router_topk"],
        ffn=said["moe_ffn_hidden_size"],
        shared_ffn=said.get("moe_shared_expert_intermediate_size", 0),
        shared_gate=bool(said.get("moe_shared_expert_gate", False)),
        layers=tuple(map(bool, pattern)),
        scores="sigmoid" if sigmoid else "all" if said.get("moe_router_pre_softmax") else "chosen",
        wide_router=settings.get("moe_router_dtype") == "fp32",
        groups=said.get("moe_router_num_groups", 0),
        chosen_groups=said.get("moe_router_group_topk", 0),
    )


def _latent(settings: Mapping[str, object], said: Mapping[str, int]) -> Latent:
    return Latent(
        query_rank=said.get("q_lora_rank", 0),
        kv_rank=said["kv_lora_rank"],
        nope=said["qk_head_dim"],
        rope=said["qk_pos_emb_head_dim"],
        value=said["v_head_dim"],
        tables=said["original_max_position_embeddings"] if settings["rope_type"] == "yarn" else 0,
    )


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
    embedding = [step for step in plan.steps if step.key.startswith("embedding.")]
    ending = [step for step in plan.steps if step.layer is None and step not in embedding]
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


def adapter_parameters(plan: Plan, rank: int) -> int:
    """Return the parameters of LoRA adapters of `rank` on every matrix of the layers: rank x (rows + columns) each."""
    return rank * sum(sum(part.shape) for step in plan.steps if _is_linear(step) for part in step.parts)


def _layers(plan: Plan, layout: Layout) -> list[list[Weight]]:
    """Return the weights of a rank, layer by layer: those with experts are alike, and so are the others."""
    kinds = sizes_of(plan).expert_layers
    of_kind = {kind: _layer(plan, layout, kinds.index(kind)) for kind in set(kinds)}
    return [of_kind[kind] for kind in kinds]


def _layer(plan: Plan, layout: Layout, number: int) -> list[Weight]:
    """Return a layer's weights in megatron-core's order, with the experts of the first expert-parallel rank."""
    steps = [step for step in plan.steps if step.layer == number and not step.key.endswith(ROUTER_BIAS)]
    if experts := sizes_of(plan).experts:
        held = experts.number // layout.expert
        steps = [step for step in steps if not (_is_expert(step) and step.index[-1] >= held)]
    return [_weight(step, layout) for step in sorted(steps, key=_place)]


def _place(step: Step) -> tuple[int, int, int]:
    """Return what orders the steps of a layer: of experts one follows the other, each with its two matrices."""
    place = next(place for place, ending in enumerate(LAYER_ORDER) if step.key.endswith(ending))
    return (EXPERTS_PLACE, step.index[-1], place) if _is_expert(step) else (place, 0, place)


def _weight(step: Step, layout: Layout, *, shared: bool = False) -> Weight:
    expert, linear = _is_expert(step), _is_linear(step)
    ranks = expert_ranks(layout) if expert else layout.tensor
    shapes = [_local(part, ranks) for part in step.parts]
    return Weight(
        name=step.key,
        count=sum(map(math.prod, shapes)),
        linear=linear,
        adapter=sum(map(sum, shapes)) if linear else 0,
        shared=shared,
        expert=expert,
    )


def _is_expert(step: Step) -> bool:
    return ".experts." in step.key


def _is_linear(step: Step) -> bool:
    return step.key.startswith(MERGED_LAYERS) and len(step.shape) == 2


def _local(part: Part, ranks: int) -> tuple[int, ...]:
    """Return the shape of a rank's piece."""
    divided = DIVIDED | DIVIDED_IN_MATRICES if len(part.shape) > 1 else DIVIDED
    axis = next((number for number, axis in enumerate(part.axes) if divided.issuperset(axis.split("+"))), None)
    return tuple(-(-size // ranks) if number == axis else size for number, size in enumerate(part.shape))
