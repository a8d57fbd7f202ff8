"""Helpers of the generation tests: a tiny model whose answers vary, changed copies of it, adapters, rows."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from training_world import write_model

from conversion.adapters import AdapterConfig, linear_parts, write_adapter
from conversion.plan import plan_for
from toolkits.generation.answering import Generator
from toolkits.generation.decoding import Decoding
from toolkits.generation.loading import Source
from toolkits.generation.prompts import question_of

ASKED = ("hi", "what is a much longer question good for?", "né 你好", "x" * 70, "two\nlines")
END = 256  # <|im_end|>, which the template and the tokenizer end an answer with
CONTEXT, MOST = 192, 16
ROWS = {
    "messages": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "uq", "a"),
    "waiting": ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}, "ss uq", None),
    "two turns": (
        {"conversations": [{"from": role, "value": role[0]} for role in ("human", "gpt", "human", "gpt")]},
        "uh ag uh",
        "g",
    ),
    "alpaca": ({"instruction": "q", "input": "i", "output": "a", "system": "s"}, "ss uq\ni", "a"),
    "alpaca asks": ({"instruction": "q"}, "uq", None),
    "completion": ({"prompt": "q", "completion": "a"}, "uq", "a"),
    "prompt": ({"prompt": "q", "answer": "7"}, "uq", None),
    "pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "uq", "a"),
    "good": ({"prompt": "q", "completion": "a", "label": True}, "uq", "a"),
    "bad": ({"prompt": "q", "completion": "a", "label": False}, "uq", None),
    "text": ({"text": "q"}, "uq", None),
}


def write_base(folder):
    return write_model(folder, tied=False, max_position_embeddings=CONTEXT, seed=20)  # one whose answers vary


def generator_of(base):
    return Generator(Source(base), Decoding(max_new_tokens=MOST))


def questions():
    return [question_of(text) for text in ASKED]


def copied(base, folder, *, tensors=None, **config):
    """A copy of a checkpoint with another config.json, or with tensors changed by a function."""
    shutil.copytree(base, folder)
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    if tensors is not None:
        content = load_file(folder / "model.safetensors")
        tensors(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_adapter(base, folder, **changes):
    """An adapter of ours on every linear layer of a checkpoint, experts too."""
    plan = plan_for(json.loads((base / "config.json").read_text()))
    torch.manual_seed(3)
    tensors = []
    for module, part in linear_parts(plan).items():
        rows, columns = part.shape
        tensors.append((f"{module}.lora_A.weight", torch.randn(5, columns) * 0.2))
        tensors.append((f"{module}.lora_B.weight", torch.randn(rows, 5) * 0.2))
    ends = tuple(sorted({module.rpartition(".")[2] for module in linear_parts(plan)}))
    write_adapter(folder, AdapterConfig(5, 20, ends, **changes), tensors, base="base", weights=base)
    return folder
