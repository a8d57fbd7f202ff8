"""Tiny checkpoints for the conversion tests: names and shapes owe nothing to conversion/.

Those of Qwen2 are written by hand; those of the other families by transformers' own models.
"""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import conversion.families

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
_OLDER_ROPE = {"rope_theta": 20000.0, "rope_scaling": None}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LONG = {"max_position_embeddings": 131072}


def _config(model_type, architecture, *changes, **more):
    config = {"architectures": [architecture], "model_type": model_type, **_SIZES}
    for change in changes:
        config |= change
    return config | more


# What megatron-core computes exactly: converted, and held against transformers' logits.
TRAINED = {
    **CONFIGS,
    "qwen3": _config("qwen3", "Qwen3ForCausalLM", _ROPE, head_dim=20),
    "qwen3-tied": _config("qwen3", "Qwen3ForCausalLM", _OLDER_ROPE, head_dim=12, tie_word_embeddings=True),
    "llama2": {
        name: value
        for name, value in _config("llama", "LlamaForCausalLM").items()
        if name != "num_key_value_heads"  # as many as heads; and rope_theta is not said either
    },
    "llama3.1": _config("llama", "LlamaForCausalLM", _LONG, rope_theta=5e5, rope_scaling=_LLAMA3 | {"factor": 8.0}),
    "llama3.2": _config(
        "llama",
        "LlamaForCausalLM",
        _LONG,
        rope_parameters=_LLAMA3 | {"rope_theta": 5e5},
        head_dim=20,
        tie_word_embeddings=True,
    ),
    "mistral": _config("mistral", "MistralForCausalLM", _OLDER_ROPE, head_dim=20, sliding_window=None),
    "phi3": _config("phi3", "Phi3ForCausalLM", _ROPE, sliding_window=64, pad_token_id=0),
    "phi4-mini": _config(
        "phi3", "Phi3ForCausalLM", _OLDER_ROPE, partial_rotary_factor=0.75, tie_word_embeddings=True, pad_token_id=0
    ),
    "glm": _config("glm", "GlmForCausalLM", _OLDER_ROPE, head_dim=20, pad_token_id=0, attention_bias=True),
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
    "qwen2-moe": _config("qwen2_moe", "Qwen2MoeForCausalLM", _ROPE, _EXPERTS, _SHARED),
    "qwen2-moe-every-other": _config(
        "qwen2_moe", "Qwen2MoeForCausalLM", _ROPE, _EXPERTS, _SHARED, decoder_sparse_step=2, qkv_bias=False
    ),
    "qwen3-moe": _config("qwen3_moe", "Qwen3MoeForCausalLM", _OLDER_ROPE, _EXPERTS, head_dim=20),
    "qwen3-moe-mixed": _config(
        "qwen3_moe", "Qwen3MoeForCausalLM", _ROPE, _EXPERTS, head_dim=20, mlp_only_layers=[0, 2], norm_topk_prob=False
    ),
    "mixtral": _config(
        "mixtral", "MixtralForCausalLM", _ROPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "deepseek-v2-lite": _config("deepseek_v2", "DeepseekV2ForCausalLM", _LATENT, _YARN, q_lora_rank=None),
    "deepseek-v2": _config("deepseek_v2", "DeepseekV2ForCausalLM", _LATENT, _ROPE, routed_scaling_factor=4.0),
    "deepseek-v3": _config(
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
# What is converted but not trained.
CONVERTED = {
    "llama-biases": _config("llama", "LlamaForCausalLM", _ROPE, attention_bias=True, mlp_bias=True),
    "qwen3-biases": _config("qwen3", "Qwen3ForCausalLM", _ROPE, head_dim=20, attention_bias=True),
    "glm4": _config("glm4", "Glm4ForCausalLM", _OLDER_ROPE, head_dim=20, pad_token_id=0, attention_bias=True),
    "gemma2": _config("gemma2", "Gemma2ForCausalLM", _OLDER_ROPE, head_dim=20, tie_word_embeddings=True),
    "gemma3": _config("gemma3_text", "Gemma3ForCausalLM", head_dim=20, tie_word_embeddings=True),
}
MODELS = TRAINED | EXPERTS | CONVERTED

# A dense family that this project does not know: all that there is to write.
NEW_FAMILY = '''\
"""Seed-OSS: Llama with biases on query, key and value."""

from conversion.families import dense
from conversion.families.family import ModelFamily

FAMILY = ModelFamily(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    settings=(*dense.SETTINGS, dense.ATTENTION_BIAS),
    constants=dense.CONSTANTS,
    rules=dense.EMBEDDING + dense.ATTENTION + dense.MLP + dense.OUTPUT,
    exact_when=dense.EXACT_WHEN,
)
'''
NEW_MODEL = _config(
    "seed_oss", "SeedOssForCausalLM", _OLDER_ROPE, head_dim=20, attention_bias=True, attention_out_bias=False
)


def tensors_of(config, *, dtype=torch.float32, seed=1):
    """Return the random weights of a config by their HuggingFace names, in the file's order."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (query, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.q_proj.bias": (query,),
            prefix + "self_attn.k_proj.bias": (kv,),
            prefix + "self_attn.v_proj.bias": (kv,),
            prefix + "self_attn.o_proj.weight": (hidden, query),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    random = torch.Generator().manual_seed(seed)
    return {name: (0.1 * torch.randn(shape, generator=random)).to(dtype) for name, shape in shapes.items()}


def register(file: Path) -> None:
    """Add the family in `file` to those that this process knows."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    conversion.families.FAMILIES = (*conversion.families.FAMILIES, module.FAMILY)


def write_model(folder: Path, config, *, seed=1):
    """Let transformers write a model with random weights, every norm and bias among them; return `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

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


def write_hf(folder: Path, config=UNTIED, *, tensors=None, shards=1):
    """Write a HuggingFace directory with `shards` files and stand-ins for the tokenizer's files; return `folder`."""
    tensors = tensors_of(config) if tensors is None else tensors
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(f'{{"file": "{name}"}}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        names = list(tensors)[number::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
