"""The registry of model families.

A new dense family is a short diff: a file beside `qwen.py` (or a few lines in it) with one ModelFamily
made of the tuples in `dense.py` and what differs, its line in FAMILIES, and a tiny config in the tests'
list. A tensor of a new kind is a `Copy` in that file; a new way of fusing is a rule class in `family.py`
and one function in `plan.py` that says which rows go where: both directions follow from it.
"""

from collections.abc import Mapping

from toolkits.foundation.errors import CheckpointError

from .family import ModelFamily
from .qwen import QWEN2

FAMILIES = (QWEN2,)


def family_for(hf_config: Mapping[str, object]) -> ModelFamily:
    """Return the family of a config.json; raise CheckpointError when none is known.

    Only `architectures` is looked at: `auto_map` is ignored and remote code is never run.
    """
    architectures = hf_config.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    for family in FAMILIES:
        if named and named[0] in family.architectures:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    said = ", ".join(named) or "(config.json names none)"
    raise CheckpointError(f"architecture {said} is not supported; supported: {supported}")
