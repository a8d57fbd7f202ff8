"""Family x config.json -> the ordered steps of a conversion.

Both directions, per-rank slices and parameter counts are derived from this one list. Shape arithmetic
only: no tensor and no torch, so that a launcher can afford to import it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from toolkits.foundation.errors import CheckpointError

from .families import family_for
from .families.family import Copy, FusedQkv, ModelFamily, WeightRule

MERGED_LAYERS = "decoder.layers."
MOST_LAYERS = 10_000  # beyond, a config.json is not believed

# Either spelling of config.json keeps the rotary positions in one of these, or at the top.
ROPE_PLACES = ("rope_parameters", "rope_scaling")

# What to look at in config.json when an axis has another length than expected.
SIZE_FIELDS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "head": "head_dim",
    "query": "num_attention_heads, head_dim",
    "kv": "num_key_value_heads, head_dim",
}


@dataclass(frozen=True)
class Part:
    """One HuggingFace tensor; `axes` are the names of its sizes."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RowBlock:
    """Rows `start` to `stop` of part number `part`."""

    part: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Step:
    """One Megatron-core tensor, or one layer of it, and the HuggingFace tensors that it is made of.

    The rows of `blocks`, one block under the other, are the fused tensor of `shape` (no layer axis);
    `layer` is the index along the layer axis, None for a tensor without one.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    blocks: tuple[RowBlock, ...]

    @property
    def index(self) -> tuple[int, ...]:
        """Where the step starts on the layer axis: `(layer,)` or `()`."""
        return () if self.layer is None else (self.layer,)

    @property
    def is_vocabulary(self) -> bool:
        """Whether the rows are those of the vocabulary, which other tools pad."""
        return self.parts[0].axes[0] == "vocab"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the Megatron-core directory, layer axis included: `[L, rows, columns]`."""

    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion of one model does, in the order of the HuggingFace file."""

    family: ModelFamily
    settings: Mapping[str, object]
    steps: tuple[Step, ...]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The Megatron-core tensors by key, layers merged."""
        num_layers = self.settings["num_layers"]
        assert isinstance(num_layers, int)
        lead = {step.key: () if step.layer is None else (num_layers,) for step in self.steps}
        return {step.key: TensorInfo(lead[step.key] + step.shape) for step in self.steps}

    @cached_property
    def hf_tensors(self) -> dict[str, tuple[Step, int]]:
        """The HuggingFace tensors by name: the step that each belongs to and its part number there."""
        return {part.name: (step, number) for step in self.steps for number, part in enumerate(step.parts)}

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.settings["share_embeddings_and_output_weights"])

    @property
    def num_parameters(self) -> int:
        """Number of weights; an embedding that is the output layer too counts once."""
        return sum(info.numel for info in self.tensors.values())

    @cached_property
    def extra_states(self) -> tuple[str, ...]:
        """Keys of the byte objects that Transformer Engine asks for."""
        num_layers = self.settings["num_layers"]
        assert isinstance(num_layers, int)
        keys = []
        for module in self.family.extra_states:
            count = num_layers if module.startswith(MERGED_LAYERS) else 1
            keys += [f"{module}._extra_state/shard_{index}_{count}" for index in range(count)]
        return tuple(keys)


def plan_for(hf_config: Mapping[str, object]) -> Plan:
    """Return the plan for a config.json; raise CheckpointError when the config cannot be converted."""
    family = family_for(hf_config)
    settings = mcore_settings(hf_config)
    return Plan(family, settings, tuple(_steps(family, settings)))


def mcore_settings(hf_config: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of Megatron-core's TransformerConfig and GPTModel that config.json decides.

    Raises CheckpointError that names the family and every field that is missing.
    """
    family = family_for(hf_config)
    settings: dict[str, object] = dict(family.constants)
    missing = []
    for setting in family.settings:
        value = hf_config.get(setting.hf, setting.default)
        if value is None and setting.hf == "num_key_value_heads" and setting.hf in hf_config:
            value = hf_config.get("num_attention_heads")  # null means one key a query
        if value is None:
            missing.append(setting.hf)
        settings[setting.mcore] = value
    rotary_base = next(iter(_rope_bases(hf_config).values()), None)
    if rotary_base is None:
        missing.append("rope_theta (or rope_parameters.rope_theta)")
    if missing:
        raise CheckpointError(f"config.json of family {family.name} lacks {', '.join(missing)}")
    settings["rotary_base"] = rotary_base
    _check_numbers(family, hf_config, rotary_base)
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    assert isinstance(heads, int) and isinstance(hidden, int)
    settings["kv_channels"] = hf_config.get("head_dim") or hidden // heads
    _check_heads(settings, has_head_dim=bool(hf_config.get("head_dim")))
    return settings


def config_dtype(hf_config: Mapping[str, object]) -> str | None:
    """Return the weights' type as config.json says it (`bfloat16`), in either spelling."""
    said = hf_config.get("dtype", hf_config.get("torch_dtype"))
    return None if said is None else str(said).removeprefix("torch.")


def untrainable_reasons(hf_config: Mapping[str, object]) -> list[str]:
    """Return why training of this model would not be exact; an empty list when it is. Conversion always is."""
    reasons = []
    for condition in family_for(hf_config).exact_when:
        value = hf_config.get(condition.hf)
        if value not in condition.allowed:
            reasons.append(f"config.json says {condition.hf}={value}: {condition.reason}")
    for place in ROPE_PLACES:
        nested = hf_config.get(place)
        kind = (nested.get("rope_type") or nested.get("type")) if isinstance(nested, dict) else None
        if kind not in (None, "default"):
            reasons.append(f"config.json asks for {kind} rotary positions in {place}: only the default ones are built")
    bases = _rope_bases(hf_config)
    if len(set(bases.values())) > 1:
        said = ", ".join(f"{place} {base}" for place, base in bases.items())
        reasons.append(f"config.json contradicts itself on rope_theta: {said}")
    layer_types = hf_config.get("layer_types")
    if isinstance(layer_types, list) and set(layer_types) - {"full_attention"}:
        reasons.append("config.json asks for layer_types other than full_attention: they are not built")
    return reasons


def _rope_bases(hf_config: Mapping[str, object]) -> dict[str, object]:
    """Return the base of the rotary positions from each place of config.json that says it."""
    places = {place: nested for place in ROPE_PLACES if isinstance(nested := hf_config.get(place), dict)}
    bases = {f"{place}.rope_theta": nested.get("rope_theta") for place, nested in places.items()}
    bases["rope_theta"] = hf_config.get("rope_theta")
    return {place: base for place, base in bases.items() if base is not None}


def _check_numbers(family: ModelFamily, hf_config: Mapping[str, object], rotary_base: object) -> None:
    whole = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    wrong = [name for name in whole if type(hf_config.get(name)) is not int or int(str(hf_config[name])) < 1]
    head_dim = hf_config.get("head_dim")
    if head_dim is not None and (type(head_dim) is not int or head_dim < 1):
        wrong.append("head_dim")
    if not wrong and int(str(hf_config["num_hidden_layers"])) > MOST_LAYERS:
        wrong.append("num_hidden_layers")
    if not _is_positive(hf_config.get("rms_norm_eps", 1.0)):
        wrong.append("rms_norm_eps")
    said = [f"{name}={hf_config.get(name)!r}" for name in wrong]
    if not _is_positive(rotary_base):
        said.append(f"rope_theta={rotary_base!r}")
    if said:
        raise CheckpointError(
            f"config.json of family {family.name} needs sensible positive numbers, it says {', '.join(said)}"
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _check_heads(settings: Mapping[str, object], *, has_head_dim: bool) -> None:
    heads, groups = settings["num_attention_heads"], settings["num_query_groups"]
    hidden = settings["hidden_size"]
    assert isinstance(heads, int) and isinstance(hidden, int)
    if not isinstance(groups, int) or groups < 1 or heads % groups:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {groups!r} key/value heads")
    if not has_head_dim and hidden % heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden} is no multiple of {heads} heads and head_dim is absent"
        )


def _steps(family: ModelFamily, settings: Mapping[str, object]) -> Iterator[Step]:
    """Expand the rules: the run of per-layer rules once for every layer, the others as they stand."""
    sizes = _sizes(settings)
    rules = [rule for rule in family.rules if rule.only_if is None or settings[rule.only_if[0]] == rule.only_if[1]]
    layered = [rule for rule in rules if rule.mcore.startswith(MERGED_LAYERS)]
    for rule in rules:
        if rule not in layered:
            yield _step(rule, None, sizes)
        elif rule is layered[0]:
            for layer in range(sizes["layers"]):
                yield from (_step(each, layer, sizes) for each in layered)


def _sizes(settings: Mapping[str, object]) -> dict[str, int]:
    numbers = {name: value for name, value in settings.items() if isinstance(value, int)}
    head = numbers["kv_channels"]
    return {
        "layers": numbers["num_layers"],
        "vocab": numbers["vocab_size"],
        "hidden": numbers["hidden_size"],
        "ffn": numbers["ffn_hidden_size"],
        "groups": numbers["num_query_groups"],
        "head": head,
        "query": numbers["num_attention_heads"] * head,
        "kv": numbers["num_query_groups"] * head,
    }


def _step(rule: WeightRule, layer: int | None, sizes: Mapping[str, int]) -> Step:
    parts = tuple(
        Part(name.format(layer=layer), axes, tuple(sizes[axis] for axis in axes)) for name, axes in _sources(rule)
    )
    rows = [part.shape[0] for part in parts]
    blocks = qkv_blocks(rows, sizes["groups"]) if isinstance(rule, FusedQkv) else stacked_blocks(rows)
    return Step(rule.mcore, layer, (sum(rows), *parts[0].shape[1:]), parts, blocks)


def _sources(rule: WeightRule) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the (name, sizes) of the HuggingFace tensors that a rule reads."""
    if isinstance(rule, Copy):
        return ((rule.hf, rule.shape),)
    if isinstance(rule, FusedQkv):
        return tuple(
            (name, (rows, *rule.columns)) for name, rows in ((rule.q, "query"), (rule.k, "kv"), (rule.v, "kv"))
        )
    return tuple((name, ("ffn", *rule.columns)) for name in (rule.gate, rule.up))


def stacked_blocks(rows: list[int]) -> tuple[RowBlock, ...]:
    """Return the blocks of tensors of `rows` rows each that lie whole under each other."""
    return tuple(RowBlock(part, 0, count) for part, count in enumerate(rows))


def qkv_blocks(rows: list[int], groups: int) -> tuple[RowBlock, ...]:
    """Return the blocks of query, key and value when each group's rows of the three lie together."""
    shares = [count // groups for count in rows]
    return tuple(
        RowBlock(part, group * share, (group + 1) * share)
        for group in range(groups)
        for part, share in enumerate(shares)
    )
