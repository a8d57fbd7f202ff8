"""The settings and rules that Llama-shaped dense decoders share; a family takes the tuples that it needs."""

from .family import Condition, Ratio, Rule, Setting

# Either spelling of config.json keeps the rotary positions in one of two objects, or at the top.
ROPE_TYPE = ("rope_parameters.rope_type", "rope_scaling.rope_type", "rope_parameters.type", "rope_scaling.type")
ROPE_THETA = ("rope_parameters.rope_theta", "rope_scaling.rope_theta", "rope_theta")

SETTINGS = (
    Setting("num_hidden_layers", "num_layers", "count"),
    Setting("hidden_size", "hidden_size"),
    Setting("intermediate_size", "ffn_hidden_size"),
    Setting("num_attention_heads", "num_attention_heads", "count"),
    Setting("num_key_value_heads", "num_query_groups", "count", null=Ratio("num_attention_heads")),
    Setting("head_dim", "kv_channels", default=Ratio("hidden_size", by="num_attention_heads")),
    Setting("rms_norm_eps", "layernorm_epsilon", "number"),
    Setting("vocab_size", "vocab_size"),
    Setting("max_position_embeddings", "max_position_embeddings"),
    Setting("tie_word_embeddings", "share_embeddings_and_output_weights", "flag", default=False),
    Setting("initializer_range", "init_method_std", "number", default=0.02),
    Setting(ROPE_THETA, "rotary_base", "number"),
)
ATTENTION_BIAS = Setting("attention_bias", "add_qkv_bias", "flag", default=False)
PARTIAL_ROTARY = Setting(
    ("rope_parameters.partial_rotary_factor", "partial_rotary_factor"), "rotary_percent", "number", default=1.0
)

CONSTANTS = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation": "silu",
    "add_bias_linear": False,
    "add_qkv_bias": False,
}

SWIGLU_ONLY = Condition("hidden_act", ("silu", None), "only the SwiGLU MLP is built")
PLAIN_ROPE = Condition(ROPE_TYPE, ("default", None), "only the default rotary positions are built")
FULL_ATTENTION = Condition("layer_types", ("full_attention", None), "only full attention is built")
NO_WINDOW = Condition("use_sliding_window", (False, None), "sliding-window attention is not built")
WINDOW_REASON = "attention over a window shorter than max_position_embeddings is not built"
NO_SHORT_WINDOW = Condition("sliding_window", (None,), WINDOW_REASON, at_least="max_position_embeddings")
NO_PROJ_BIAS = Condition("attention_bias", (False, None), "megatron-core has no bias on the output projection alone")
NO_POST_NORMS = "it norms what attention and MLP give, which megatron-core 0.16.1 does not do"
EXACT_WHEN = (SWIGLU_ONLY, PLAIN_ROPE, FULL_ATTENTION)

_ATTENTION, _MLP = "decoder.layers.self_attention.", "decoder.layers.mlp."
_HF_LAYER = "model.layers.{layer}."
_HF_ATTENTION, _HF_MLP = _HF_LAYER + "self_attn.", _HF_LAYER + "mlp."
_EMBEDDING = "embedding.word_embeddings.weight"

EMBEDDING = (Rule(_EMBEDDING, {"model.embed_tokens.weight": ("vocab", "hidden")}),)
OUTPUT = (
    Rule("decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)}),
    Rule("output_layer.weight", {"lm_head.weight": ("vocab", "hidden")}, tied_to=_EMBEDDING, unless="reward_head"),
    Rule("reward_head.weight", {"score.weight": ("one", "hidden")}, only_if="reward_head"),
)

INPUT_NORM = (Rule(_ATTENTION + "linear_qkv.layer_norm_weight", {_HF_LAYER + "input_layernorm.weight": ("hidden",)}),)
QKV = (
    Rule(
        _ATTENTION + "linear_qkv.weight",
        {
            _HF_ATTENTION + "q_proj.weight": ("query", "hidden"),
            _HF_ATTENTION + "k_proj.weight": ("kv", "hidden"),
            _HF_ATTENTION + "v_proj.weight": ("kv", "hidden"),
        },
        shares="groups",
    ),
    Rule(
        _ATTENTION + "linear_qkv.bias",
        {
            _HF_ATTENTION + "q_proj.bias": ("query",),
            _HF_ATTENTION + "k_proj.bias": ("kv",),
            _HF_ATTENTION + "v_proj.bias": ("kv",),
        },
        shares="groups",
        only_if="add_qkv_bias",
    ),
)
FUSED_QKV = (
    Rule(
        _ATTENTION + "linear_qkv.weight",
        {_HF_ATTENTION + "qkv_proj.weight": ("query+kv+kv", "hidden")},
        shares="groups",
    ),
)
QK_NORM = (
    Rule(_ATTENTION + "q_layernorm.weight", {_HF_ATTENTION + "q_norm.weight": ("head",)}),
    Rule(_ATTENTION + "k_layernorm.weight", {_HF_ATTENTION + "k_norm.weight": ("head",)}),
)
PROJ = (Rule(_ATTENTION + "linear_proj.weight", {_HF_ATTENTION + "o_proj.weight": ("hidden", "query")}),)
PROJ_BIAS = (
    Rule(_ATTENTION + "linear_proj.bias", {_HF_ATTENTION + "o_proj.bias": ("hidden",)}, only_if="add_qkv_bias"),
)
ATTENTION = INPUT_NORM + QKV + PROJ

MLP_NORM = (
    Rule(
        _MLP + "linear_fc1.layer_norm_weight",
        {_HF_LAYER + "post_attention_layernorm.weight": ("hidden",)},
        layers="dense",
    ),
)
GATE_UP = (
    Rule(
        _MLP + "linear_fc1.weight",
        {_HF_MLP + "gate_proj.weight": ("ffn", "hidden"), _HF_MLP + "up_proj.weight": ("ffn", "hidden")},
        layers="dense",
    ),
)
FUSED_GATE_UP = (
    Rule(_MLP + "linear_fc1.weight", {_HF_MLP + "gate_up_proj.weight": ("ffn+ffn", "hidden")}, layers="dense"),
)
DOWN = (Rule(_MLP + "linear_fc2.weight", {_HF_MLP + "down_proj.weight": ("hidden", "ffn")}, layers="dense"),)
MLP_BIAS = (
    Rule(
        _MLP + "linear_fc1.bias",
        {_HF_MLP + "gate_proj.bias": ("ffn",), _HF_MLP + "up_proj.bias": ("ffn",)},
        only_if="add_bias_linear",
        layers="dense",
    ),
    Rule(
        _MLP + "linear_fc2.bias",
        {_HF_MLP + "down_proj.bias": ("hidden",)},
        only_if="add_bias_linear",
        layers="dense",
    ),
)
MLP = MLP_NORM + GATE_UP + DOWN

# Norms of what attention and MLP give, before it is added to the residual stream; named as Megatron-Bridge does.
POST_ATTENTION_NORM = _ATTENTION + "linear_proj.post_layernorm.weight"
POST_MLP_NORM = _MLP + "linear_fc2.post_layernorm.weight"
