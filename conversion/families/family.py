"""What is known of a model family, as frozen data: no behaviour, no imports.

A rule names one Megatron-core tensor and the HuggingFace tensors that it is made of. Its sizes are names, which
`plan.py` gives their numbers from config.json:

    vocab   rows of the embedding          hidden  width of the residual stream
    ffn     width of the MLP               head    width of one attention head
    query   num heads x head               kv      num key/value groups x head

and more of them for experts and latent attention. `query+kv+kv` is an axis on which three tensors lie one behind
the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

REQUIRED = object()  # a setting without a default: config.json has to say it


@dataclass(frozen=True)
class Ratio:
    """A default that is made of other settings: `of`, or the whole number `of` / `by`."""

    of: str
    by: str | None = None


@dataclass(frozen=True)
class Setting:
    """A setting of Megatron-core and where config.json says it.

    `hf` is a field, dots lead into nested objects; several are the spellings of several releases, the newest
    first.
    """

    hf: str | tuple[str, ...]
    mcore: str
    kind: Literal["size", "count", "number", "flag"] = "size"  # counts are sizes that something is repeated by
    default: object = REQUIRED  # what transformers takes when the field is absent
    null: object = REQUIRED  # and when it is null; REQUIRED: the same as when it is absent
    values: tuple[tuple[object, object], ...] = ()  # (what the field says, what the setting then is); None for others
    times: str | None = None  # a setting by which the field is multiplied


@dataclass(frozen=True)
class Condition:
    """What config.json has to say for training to be exact; conversion never asks.

    The field, in each of its spellings and divided by the field `over`, is one of `allowed` (a list: each of its
    elements is), or at least as large as the field `at_least`. `default` is what transformers takes when it is
    absent. The condition is asked only where `when` says that value, and not where `unless` does.
    """

    hf: str | tuple[str, ...]
    allowed: tuple[object, ...]
    reason: str
    default: object = None
    at_least: str | None = None
    when: tuple[str | tuple[str, ...], object] | None = None
    unless: tuple[str | tuple[str, ...], object] | None = None
    over: str | None = None


@dataclass(frozen=True)
class Rule:
    """One Megatron-core tensor: the rows of its parts, one part under the other.

    `parts` are HuggingFace names with the sizes of their axes. With `{layer}` or `{expert}` in them the rule
    stands for one tensor each, which Megatron-core merges into leading axes. `shares` names a number: every
    tensor on the row axis is cut into so many equal shares, and the first shares of all lie above the second ones.
    """

    mcore: str
    parts: Mapping[str, tuple[str, ...]]
    shares: str | None = None
    only_if: str | None = None  # a setting without which the tensor does not exist
    unless: str | None = None  # a setting with which it does not
    layers: Literal["all", "dense", "experts"] = "all"  # in which layers: with one MLP, with experts
    tied_to: str | None = None  # the Megatron-core tensor that it is when embeddings are tied, and then not stored


@dataclass(frozen=True)
class ExpertLayers:
    """Fields of config.json that say which layers have experts: all from `first` on, every `step`-th, not `dense`."""

    first: str | None = None  # a layer number
    step: str | None = None  # of `step` layers the last one
    dense: str | None = None  # a list of layer numbers


@dataclass(frozen=True)
class PredictionLayers:
    """Layers behind the last one that predict further tokens (multi-token prediction); a checkpoint may lack them.

    Each is a layer like the last one, with `rules` beside it: their Megatron-core names start inside it. `copies`
    are HuggingFace tensors of such a layer that repeat a tensor of the model, by its Megatron-core name.
    """

    count: str  # the field of config.json that says how many there are
    rules: tuple[Rule, ...]
    copies: Mapping[str, str]


@dataclass(frozen=True)
class ModelFamily:
    """Everything that tells one family of models from another."""

    name: str
    architectures: tuple[str, ...]  # as config.json names them
    settings: tuple[Setting, ...]
    constants: Mapping[str, object]  # Megatron-core settings that every member shares
    rules: tuple[Rule, ...]  # in the order of the HuggingFace file
    reward_architectures: tuple[str, ...] = ()  # with one score in place of the words, one for each architecture
    expert_layers: ExpertLayers | None = None  # None: no layer has experts
    prediction_layers: PredictionLayers | None = None
    exact_when: tuple[Condition, ...] = ()
    never_exact: tuple[str, ...] = ()  # why no member can be trained: what megatron-core 0.16.1 does not compute
    ignored_hf: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)  # patterns of tensors that are not weights
