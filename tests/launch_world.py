"""A folder in which the seed's line could start, and calls of the launcher with other words in it."""

import shlex
from pathlib import Path

import pytest

from toolkits.foundation.errors import TemperError
from toolkits.launch.arguments import LAUNCHERS
from toolkits.launch.checks import Launch, check_call

REPOSITORY = Path(__file__).resolve().parents[1]
QWEN = LAUNCHERS["qwen"]
NAMES = [entry.name for entry in QWEN.positions]
SEED_LINE = shlex.split(
    "dsw 7B 1 8 1e-5 1e-6 128 128 bf16 1 1 1 true true true true false false 100 DATA VALID CKPT 1000 100 OUT"
)
NODE = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
    "NPROC_PER_NODE": "2",
}
SEVEN_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}


def line(**changes: str) -> list[str]:
    """The seed's line with other words at some positions."""
    assert set(changes) <= set(NAMES)
    return [changes.get(name, word) for name, word in zip(NAMES, SEED_LINE, strict=True)]


def check(environment: dict[str, str] | None = None, **changes: str) -> Launch:
    return check_call(QWEN, line(**changes), environment or {})


def refusal(environment: dict[str, str] | None = None, **changes: str) -> TemperError:
    with pytest.raises(TemperError) as caught:
        check(environment, **changes)
    return caught.value
