"""Qwen2 and Qwen2.5: the dense decoder with biases on query, key and value."""

from . import dense
from .family import ModelFamily

QWEN2 = ModelFamily(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    settings=dense.SETTINGS,
    constants={**dense.CONSTANTS, "add_qkv_bias": True},
    rules=dense.EMBEDDING + dense.ATTENTION + dense.QKV_BIAS + dense.MLP + dense.OUTPUT,
    extra_states=dense.EXTRA_STATES,
    exact_when=dense.EXACT_WHEN,
    aliases=dense.ALIASES,
)
