"""Tiny checkpoints for the conversion tests: names and shapes owe nothing to conversion/.

Those of Qwen2 are written by hand; those of the other families by transformers' own models. Their configs are
`toolkits/cards/models.py`.
"""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import conversion.families
from toolkits.cards.models import (  # noqa: F401 - most are here for the tests
    CONFIGS,
    CONVERTED,
    EXPERTS,
    MODELS,
    OLDER_ROPE,
    TIED,
    TRAINED,
    UNTIED,
    tiny_config,
    write_model,
)

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
NEW_MODEL = tiny_config(
    "seed_oss", "SeedOssForCausalLM", OLDER_ROPE, head_dim=20, attention_bias=True, attention_out_bias=False
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
