"""What decoders with experts share, beside `dense.py`."""

from .family import Rule, Setting

_MLP = "decoder.layers.mlp."
_HF_LAYER = "model.layers.{layer}."
_HF_MLP = _HF_LAYER + "mlp."

# Probabilities of all experts, of which the chosen ones are taken as they are; else they add up to 1.
NORM_TOPK = Setting("norm_topk_prob", "moe_router_pre_softmax", default=True, values=((True, False), (False, True)))
SETTINGS = (
    Setting(("num_experts", "num_local_experts"), "num_moe_experts", "count"),
    Setting("moe_intermediate_size", "moe_ffn_hidden_size"),
    Setting("num_experts_per_tok", "moe_router_topk", "count"),
    NORM_TOPK,
)
CONSTANTS = {"moe_router_load_balancing_type": "none"}

NORM = (
    Rule(
        "decoder.layers.pre_mlp_layernorm.weight",
        {_HF_LAYER + "post_attention_layernorm.weight": ("hidden",)},
        layers="experts",
    ),
)
ROUTER = (Rule(_MLP + "router.weight", {_HF_MLP + "gate.weight": ("experts", "hidden")}, layers="experts"),)
EXPERTS = (
    Rule(
        _MLP + "experts.experts.linear_fc1.weight",
        {
            _HF_MLP + "experts.{expert}.gate_proj.weight": ("expert_ffn", "hidden"),
            _HF_MLP + "experts.{expert}.up_proj.weight": ("expert_ffn", "hidden"),
        },
        layers="experts",
    ),
    Rule(
        _MLP + "experts.experts.linear_fc2.weight",
        {_HF_MLP + "experts.{expert}.down_proj.weight": ("hidden", "expert_ffn")},
        layers="experts",
    ),
)
SHARED_EXPERT = (
    Rule(
        _MLP + "shared_experts.linear_fc1.weight",
        {
            _HF_MLP + "shared_expert.gate_proj.weight": ("shared_ffn", "hidden"),
            _HF_MLP + "shared_expert.up_proj.weight": ("shared_ffn", "hidden"),
        },
        layers="experts",
    ),
    Rule(
        _MLP + "shared_experts.linear_fc2.weight",
        {_HF_MLP + "shared_expert.down_proj.weight": ("hidden", "shared_ffn")},
        layers="experts",
    ),
    Rule(
        _MLP + "shared_experts.gate_weight",
        {_HF_MLP + "shared_expert_gate.weight": ("one", "hidden")},
        layers="experts",
    ),
)
