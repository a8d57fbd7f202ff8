"""The numbers of a model, from the settings of its conversion plan: widths, heads, experts, latent attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from conversion.plan import Plan


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
    reward_head: bool = False  # one score a token in the place of the words

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
        reward_head=plan.is_reward_model,
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
