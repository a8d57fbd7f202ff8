"""Phi-3, Phi-3.5 and Phi-4: Llama's arithmetic, with query, key and value, and gate and up, in one tensor each."""

from . import dense
from .family import ModelFamily

PHI3 = ModelFamily(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    reward_architectures=("Phi3ForSequenceClassification",),
    settings=(*dense.SETTINGS, dense.PARTIAL_ROTARY),
    constants=dense.CONSTANTS,
    rules=dense.EMBEDDING
    + (dense.INPUT_NORM + dense.FUSED_QKV + dense.PROJ)
    + (dense.MLP_NORM + dense.FUSED_GATE_UP + dense.DOWN)
    + dense.OUTPUT,
    exact_when=(*dense.EXACT_WHEN, dense.NO_SHORT_WINDOW),
)
