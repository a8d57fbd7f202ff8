"""Tiny Qwen2 checkpoints for the conversion tests, written by hand: names and shapes owe nothing to conversion/."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

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
