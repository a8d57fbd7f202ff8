"""The tiny models that every family is checked on: configs only, weights are random.

Sizes and names owe nothing to conversion/: transformers' own models write the weights.
"""

import json
from pathlib import Path
from typing import Any

from conversion.families import family_for

Config = dict[str, Any]

# How people call the members of a family.
TITLES = {
    "qwen2": "Qwen2, Qwen2.5, QwQ",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "llama": "Llama 2, 3, 3.1, 3.2",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "phi3": "Phi-3, Phi-4",
    "glm": "GLM-4",
    "glm4": "GLM-4-0414",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 text",
    "deepseek_v2": "DeepSeek-V2, V2-Lite",
    "deepseek_v3": "DeepSeek-V3",
}

# Sizes are pairwise distinct, so that no swapped axis goes unseen; 251 is a vocabulary that TP=2 does not divide.
UNTIED = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 251,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "dtype": "float32",
}
# The older spelling, tied, and heads that do not make up the hidden size.
TIED = {
    **{name: value for name, value in UNTIED.items() if name not in ("rope_parameters", "dtype")},
    "hidden_size": 40,
    "intermediate_size": 104,
    "head_dim": 12,
    "tie_word_embeddings": True,
    "rope_theta": 20000.0,
    "torch_dtype": "float32",
}
CONFIGS = {"untied": UNTIED, "tied": TIED}

_SIZES = {
    "vocab_size": 251,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
OLDER_ROPE = {"rope_theta": 20000.0, "rope_scaling": None}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LONG = {"max_position_embeddings": 131072}


def tiny_config(model_type: str, architecture: str, *changes: Config, **more: object) -> Config:
    """Return the config.json of a tiny model: the sizes of all, then `changes` and `more`."""
    config: Config = {"architectures": [architecture], "model_type": model_type, **_SIZES}
    for change in changes:
        config |= change
    return config | more


# What megatron-core computes exactly: converted, and held against transformers' logits.
TRAINED = {
    **CONFIGS,
    "qwen3": tiny_config("qwen3", "Qwen3ForCausalLM", _ROPE, head_dim=20),
    "qwen3-tied": tiny_config("qwen3", "Qwen3ForCausalLM", OLDER_ROPE, head_dim=12, tie_word_embeddings=True),
    "llama2": {
        name: value
        for name, value in tiny_config("llama", "LlamaForCausalLM").items()
        if name != "num_key_value_heads"  # as many as heads; and rope_theta is not said either
    },
    "llama3.1": tiny_config("llama", "LlamaForCausalLM", _LONG, rope_theta=5e5, rope_scaling=_LLAMA3 | {"factor": 8.0}),
    "llama3.2": tiny_config(
        "llama",
        "LlamaForCausalLM",
        _LONG,
        rope_parameters=_LLAMA3 | {"rope_theta": 5e5},
        head_dim=20,
        tie_word_embeddings=True,
    ),
    "mistral": tiny_config("mistral", "MistralForCausalLM", OLDER_ROPE, head_dim=20, sliding_window=None),
    "phi3": tiny_config("phi3", "Phi3ForCausalLM", _ROPE, sliding_window=64, pad_token_id=0),
    "phi-partial-rotary": tiny_config(
        "phi3", "Phi3ForCausalLM", OLDER_ROPE, partial_rotary_factor=0.75, tie_word_embeddings=True, pad_token_id=0
    ),
    "glm": tiny_config("glm", "GlmForCausalLM", OLDER_ROPE, head_dim=20, pad_token_id=0, attention_bias=True),
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "norm_topk_prob": True}
_SHARED = {"shared_expert_intermediate_size": 60, "norm_topk_prob": False}
# Three experts in the shared one's width, so that no factor goes unseen.
_LATENT = {
    "num_key_value_heads": 6,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 28,
    "n_routed_experts": 4,
    "n_shared_experts": 3,
    "num_experts_per_tok": 2,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "q_lora_rank": 36,
    "kv_lora_rank": 44,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
}
_YARN = {
    "max_position_embeddings": 1280,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
    },
}
EXPERTS = {
    "qwen2-moe": tiny_config("qwen2_moe", "Qwen2MoeForCausalLM", _ROPE, _EXPERTS, _SHARED),
    "qwen2-moe-every-other": tiny_config(
        "qwen2_moe", "Qwen2MoeForCausalLM", _ROPE, _EXPERTS, _SHARED, decoder_sparse_step=2, qkv_bias=False
    ),
    "qwen3-moe": tiny_config("qwen3_moe", "Qwen3MoeForCausalLM", OLDER_ROPE, _EXPERTS, head_dim=20),
    "qwen3-moe-mixed": tiny_config(
        "qwen3_moe", "Qwen3MoeForCausalLM", _ROPE, _EXPERTS, head_dim=20, mlp_only_layers=[0, 2], norm_topk_prob=False
    ),
    "mixtral": tiny_config(
        "mixtral", "MixtralForCausalLM", _ROPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "deepseek-v2-lite": tiny_config("deepseek_v2", "DeepseekV2ForCausalLM", _LATENT, _YARN, q_lora_rank=None),
    "deepseek-v2": tiny_config("deepseek_v2", "DeepseekV2ForCausalLM", _LATENT, _ROPE, routed_scaling_factor=4.0),
    "deepseek-v3": tiny_config(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _LATENT,
        _YARN,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 5.0, 9.0]}
# What is converted but not trained. Windows, long rope and groups are those of published checkpoints of these names.
CONVERTED = {
    "mistral-0.1": tiny_config("mistral", "MistralForCausalLM", OLDER_ROPE, sliding_window=32),
    "phi3-mini-4k": tiny_config("phi3", "Phi3ForCausalLM", OLDER_ROPE, sliding_window=32, pad_token_id=0),
    "phi3.5-mini": tiny_config(
        "phi3",
        "Phi3ForCausalLM",
        rope_theta=10000.0,
        rope_scaling=_LONGROPE,
        original_max_position_embeddings=32,
        sliding_window=None,
        pad_token_id=0,
    ),
    "deepseek-v2-236b": tiny_config(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        _LATENT,
        _YARN,
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
        routed_scaling_factor=16.0,
    ),
    "llama-biases": tiny_config("llama", "LlamaForCausalLM", _ROPE, attention_bias=True, mlp_bias=True),
    "qwen3-biases": tiny_config("qwen3", "Qwen3ForCausalLM", _ROPE, head_dim=20, attention_bias=True),
    "glm4": tiny_config("glm4", "Glm4ForCausalLM", OLDER_ROPE, head_dim=20, pad_token_id=0, attention_bias=True),
    "gemma2": tiny_config("gemma2", "Gemma2ForCausalLM", OLDER_ROPE, head_dim=20, tie_word_embeddings=True),
    "gemma3": tiny_config("gemma3_text", "Gemma3ForCausalLM", head_dim=20, tie_word_embeddings=True),
}
MODELS = TRAINED | EXPERTS | CONVERTED


def models_of(family: str) -> dict[str, Config]:
    """Return the tiny models of a family by their name."""
    return {name: config for name, config in MODELS.items() if family_for(config).name == family}


def write_model(folder: Path, config: Config, *, seed: int = 1) -> Path:
    """Let transformers write a model with random weights, every norm and bias among them; return `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.state_dict().values():  # the biases of a router are no parameters
            noise = 0.1 * torch.randn_like(weight)
            weight.copy_(weight + noise if weight.ndim == 1 else noise)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # transformers said it its own way
    return folder
