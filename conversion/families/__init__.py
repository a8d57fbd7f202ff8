"""The registry of model families.

A new dense family is a short diff: a file beside `qwen.py` (or a few lines in it) with one ModelFamily
made of the tuples in `dense.py` and what differs, its name in FAMILIES, and a tiny config in the tests'
list. A tensor of a new kind is a `Rule` in that file: both directions follow from it.
"""

from collections.abc import Mapping

from toolkits.foundation.errors import CheckpointError

from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .family import ModelFamily
from .gemma import GEMMA2, GEMMA3
from .glm import GLM, GLM4
from .llama import LLAMA, MISTRAL, MIXTRAL
from .phi import PHI3
from .qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE

FAMILIES = (
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    PHI3,
    GLM,
    GLM4,
    GEMMA2,
    GEMMA3,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
)


def family_for(hf_config: Mapping[str, object]) -> ModelFamily:
    """Return the family of a config.json; raise CheckpointError when none is known.

    Only `architectures` is looked at: `auto_map` is ignored and remote code is never run.
    """
    architectures = hf_config.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    for family in FAMILIES:
        if named and named[0] in family.architectures + family.reward_architectures:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures + family.reward_architectures)
    said = ", ".join(named) or "(config.json names none)"
    raise CheckpointError(f"architecture {said} is not supported; supported: {supported}")
