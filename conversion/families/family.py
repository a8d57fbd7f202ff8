"""What is known of a model family, as frozen data.

A weight rule names one Megatron-core tensor and the HuggingFace tensors that it is made of. Sizes are
names, not numbers (`plan.py` gives them their numbers from config.json):

    vocab   rows of the embedding          hidden  width of the residual stream
    ffn     width of the MLP               head    width of one attention head
    query   num heads x head               kv      num key/value groups x head

A name with `{layer}` stands for one tensor a layer; Megatron-core merges them into a leading layer axis.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setting:
    """A Megatron-core setting and the config.json field that says it."""

    hf: str
    mcore: str
    default: object = None  # what transformers takes when the field is absent; None: the field must be there


@dataclass(frozen=True)
class Condition:
    """A config.json field that has to hold one of `allowed` (or be absent) for training to be exact."""

    hf: str
    allowed: tuple[object, ...]
    reason: str


@dataclass(frozen=True)
class Copy:
    """`mcore` is `hf`, unchanged. `only_if` is a (setting, value) without which the tensor does not exist."""

    mcore: str
    hf: str
    shape: tuple[str, ...]
    only_if: tuple[str, object] | None = None


@dataclass(frozen=True)
class FusedQkv:
    """`mcore` has, for each key/value group in turn, the rows of its queries, of its key and of its value."""

    mcore: str
    q: str
    k: str
    v: str
    columns: tuple[str, ...]
    only_if: tuple[str, object] | None = None


@dataclass(frozen=True)
class FusedGateUp:
    """`mcore` has the rows of the gate above those of the up projection."""

    mcore: str
    gate: str
    up: str
    columns: tuple[str, ...]
    only_if: tuple[str, object] | None = None


WeightRule = Copy | FusedQkv | FusedGateUp


@dataclass(frozen=True)
class ModelFamily:
    """Everything that tells one family of models from another."""

    name: str
    architectures: tuple[str, ...]  # as config.json names them
    settings: tuple[Setting, ...]
    constants: Mapping[str, object]  # Megatron-core settings that every member shares
    rules: tuple[WeightRule, ...]  # in the order of the HuggingFace file
    extra_states: tuple[str, ...]  # modules for which Transformer Engine stores a byte object, one a layer
    exact_when: tuple[Condition, ...] = ()
    ignored_hf: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)  # patterns of tensors that are not weights
    aliases: Mapping[str, str] = field(default_factory=dict)  # our mcore key -> how a plain local spec says it
