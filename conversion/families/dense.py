"""The settings and rules that every Llama-shaped dense decoder shares."""

from .family import Condition, Copy, FusedGateUp, FusedQkv, Setting

SETTINGS = (
    Setting("num_hidden_layers", "num_layers"),
    Setting("hidden_size", "hidden_size"),
    Setting("intermediate_size", "ffn_hidden_size"),
    Setting("num_attention_heads", "num_attention_heads"),
    Setting("num_key_value_heads", "num_query_groups"),
    Setting("rms_norm_eps", "layernorm_epsilon"),
    Setting("vocab_size", "vocab_size"),
    Setting("max_position_embeddings", "max_position_embeddings"),
    Setting("tie_word_embeddings", "share_embeddings_and_output_weights", default=False),
    Setting("initializer_range", "init_method_std", default=0.02),
)

CONSTANTS = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation": "silu",
    "add_bias_linear": False,
    "add_qkv_bias": False,
}

EXACT_WHEN = (
    Condition("use_sliding_window", (False, None), "sliding-window attention is not built"),
    Condition("hidden_act", ("silu", None), "only the SwiGLU MLP is built"),
)

_ATTENTION = "decoder.layers.self_attention."
_MLP = "decoder.layers.mlp."
_HF_LAYER = "model.layers.{layer}."

EMBEDDING = (Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden")),)

QKV_BIAS = (
    FusedQkv(
        _ATTENTION + "linear_qkv.bias",
        q=_HF_LAYER + "self_attn.q_proj.bias",
        k=_HF_LAYER + "self_attn.k_proj.bias",
        v=_HF_LAYER + "self_attn.v_proj.bias",
        columns=(),
    ),
)

ATTENTION = (
    Copy(_ATTENTION + "linear_qkv.layer_norm_weight", _HF_LAYER + "input_layernorm.weight", ("hidden",)),
    FusedQkv(
        _ATTENTION + "linear_qkv.weight",
        q=_HF_LAYER + "self_attn.q_proj.weight",
        k=_HF_LAYER + "self_attn.k_proj.weight",
        v=_HF_LAYER + "self_attn.v_proj.weight",
        columns=("hidden",),
    ),
    Copy(_ATTENTION + "linear_proj.weight", _HF_LAYER + "self_attn.o_proj.weight", ("hidden", "query")),
)

MLP = (
    Copy(_MLP + "linear_fc1.layer_norm_weight", _HF_LAYER + "post_attention_layernorm.weight", ("hidden",)),
    FusedGateUp(
        _MLP + "linear_fc1.weight",
        gate=_HF_LAYER + "mlp.gate_proj.weight",
        up=_HF_LAYER + "mlp.up_proj.weight",
        columns=("hidden",),
    ),
    Copy(_MLP + "linear_fc2.weight", _HF_LAYER + "mlp.down_proj.weight", ("hidden", "ffn")),
)

OUTPUT = (
    Copy("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    Copy(
        "output_layer.weight",
        "lm_head.weight",
        ("vocab", "hidden"),
        only_if=("share_embeddings_and_output_weights", False),
    ),
)

# The superset of what releases of Transformer Engine ask for: nobody is refused for one too many.
EXTRA_STATES = (
    _ATTENTION + "core_attention",
    _ATTENTION + "linear_qkv",
    _ATTENTION + "linear_proj",
    _MLP + "linear_fc1",
    _MLP + "linear_fc2",
    "decoder.final_layernorm",
)

ALIASES = {
    _ATTENTION + "linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
    _MLP + "linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
}
