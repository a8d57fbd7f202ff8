"""Family x config.json -> the ordered steps of a conversion.

Both directions, per-rank slices and parameter counts are derived from this one list. Shape arithmetic
only: no tensor and no torch, so that a launcher can afford to import it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from toolkits.foundation.errors import CheckpointError

from .families import family_for
from .families.family import ModelFamily, PredictionLayers, Rule
from .settings import MOST, mcore_settings, places, settings_of

MERGED_LAYERS = "decoder.layers."
REWARD_HEAD = "reward_head.weight"
MOST_PARTS = 100_000  # experts or key/value heads in all layers; the largest models have 25,000

# The sizes that rules name, each the product of these settings.
SIZES = {
    "layers": ("num_layers",),
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size",),
    "ffn": ("ffn_hidden_size",),
    "groups": ("num_query_groups",),
    "head": ("kv_channels",),
    "query": ("num_attention_heads", "kv_channels"),
    "kv": ("num_query_groups", "kv_channels"),
    "experts": ("num_moe_experts",),
    "expert_ffn": ("moe_ffn_hidden_size",),
    "shared_ffn": ("moe_shared_expert_intermediate_size",),
    "one": (),
    # Latent attention: heads x the parts of a head that are not rotated, are rotated, and are the value.
    "query_nope": ("num_attention_heads", "qk_head_dim"),
    "query_rope": ("num_attention_heads", "qk_pos_emb_head_dim"),
    "value": ("num_attention_heads", "v_head_dim"),
    "rope": ("qk_pos_emb_head_dim",),
    "query_rank": ("q_lora_rank",),
    "kv_rank": ("kv_lora_rank",),
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
    """One Megatron-core tensor, or one layer or expert of it, and the HuggingFace tensors that it is made of.

    The rows of `blocks`, one block under the other, are the fused tensor of `shape` (no layer axis). It stands
    at `index` of the leading axes of `key`, whose lengths are `lead`: layers, experts, or none.
    """

    name: str  # as the rule says it
    key: str
    layer: int | None
    lead: tuple[int, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    blocks: tuple[RowBlock, ...]

    @property
    def is_vocabulary(self) -> bool:
        """Whether the rows are those of the vocabulary, which other tools pad."""
        return self.parts[0].axes[0] == "vocab"

    @property
    def is_linear(self) -> bool:
        """Whether it is a matrix of a layer's attention, MLP or experts: what adapters stand beside."""
        return self.key.startswith(MERGED_LAYERS) and ".linear_" in self.key and len(self.shape) == 2

    def sections(self, part: int) -> tuple[int, ...]:
        """Return the rows of the tensors that lie under each other in a part, which ranks divide one by one."""
        rows = self.parts[part].shape[0]
        if len(self.parts) > 1:
            return (rows,)
        if self.shares > 1:
            return tuple(block.rows * self.shares for block in self.blocks[: len(self.blocks) // self.shares])
        return (rows // 2,) * 2 if ".linear_fc1." in self.key else (rows,)

    @property
    def shares(self) -> int:
        """Into how many equal shares its tensors are cut, which lie interleaved; 1 when they lie whole."""
        sections = sum(len(part.axes[0].split("+")) for part in self.parts)
        return max(1, len(self.blocks) // sections)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the Megatron-core directory, layer axis included: `[L, rows, columns]`."""

    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Repeat:
    """A tensor that a tied checkpoint need not have: `step` is, bit for bit, what `original` is."""

    step: Step
    original: Step


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion of one model does, in the order of the HuggingFace file."""

    family: ModelFamily
    settings: Mapping[str, object]
    steps: tuple[Step, ...]
    repeats: tuple[Repeat, ...] = ()
    copies: Mapping[str, Step] = field(default_factory=dict)  # HuggingFace tensors that repeat a step's only part

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The Megatron-core tensors by key, layers merged."""
        return {step.key: TensorInfo(step.lead + step.shape) for step in self.steps}

    @cached_property
    def hf_tensors(self) -> dict[str, tuple[Step, int]]:
        """The HuggingFace tensors by name: the step that each belongs to and its part number there."""
        tensors = {part.name: (step, number) for step in self.steps for number, part in enumerate(step.parts)}
        return tensors | {name: (step, 0) for name, step in self.copies.items()}

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.settings["share_embeddings_and_output_weights"])

    @property
    def is_reward_model(self) -> bool:
        """Whether the model gives a score, and no words."""
        return bool(self.settings["reward_head"])

    @property
    def num_parameters(self) -> int:
        """Number of weights; an embedding that is the output layer too counts once."""
        return sum(info.numel for info in self.tensors.values())

    @cached_property
    def extra_states(self) -> tuple[str, ...]:
        """Keys of the byte objects that Transformer Engine asks for, one for each layer and expert of a module.

        The superset of what its releases do: nobody is refused for one too many.
        """
        states: dict[str, None] = {}  # in order, each once
        for step in self.steps:
            for module in _modules_with_state(step.key):
                places = [".".join(map(str, axes)) for axes in (step.index or (0,), step.lead or (1,))]
                states[f"{module}._extra_state/shard_{'_'.join(places)}"] = None
        return tuple(states)

    def config_fields(self, axis: str) -> str:
        """Return the fields of config.json that decide the length of an axis: `num_attention_heads, head_dim`."""
        settings = settings_of(self.family)
        names = [name for size in axis.split("+") for name in SIZES[size] if name in settings]
        return ", ".join(dict.fromkeys(places(settings[name].hf)[-1] for name in names))


def plan_for(hf_config: Mapping[str, object], *, predicts: bool = False) -> Plan:
    """Return the plan for a config.json; raise CheckpointError when the config cannot be converted.

    With `predicts` it has the layers that predict further tokens, if the config speaks of some.
    """
    family = family_for(hf_config)
    settings = mcore_settings(hf_config)
    sizes = {
        name: math.prod(_whole(settings[factor]) for factor in factors)
        for name, factors in SIZES.items()
        if all(settings.get(factor) is not None for factor in factors)
    }
    if (parts := sizes["layers"] * max(sizes["groups"], sizes.get("experts", 1))) > MOST_PARTS:
        raise CheckpointError(f"config.json describes {parts:,} experts or key/value heads, which is not believed")
    rules = [rule for rule in family.rules if _exists(rule, settings)]
    tied = [rule for rule in rules if rule.tied_to and settings["share_embeddings_and_output_weights"]]
    stored = [rule for rule in rules if rule not in tied]
    steps = list(_steps(stored, settings, sizes))
    by_key = {step.key: step for step in steps}
    copies: dict[str, Step] = {}
    layers = family.prediction_layers if predicts else None
    for number in range(sizes["layers"], sizes["layers"] + _number_of(layers, hf_config)):
        assert layers is not None
        steps += _prediction_steps(layers, stored, sizes, number)
        copies |= {name.format(layer=number): by_key[key] for name, key in layers.copies.items()}
    repeats = tuple(Repeat(_step(rule, sizes), by_key[str(rule.tied_to)]) for rule in tied)
    return Plan(family, settings, tuple(steps), repeats, copies)


def plan_of_checkpoint(hf_config: Mapping[str, object], *, hf: Iterable[str] = (), mcore: Iterable[str] = ()) -> Plan:
    """Return the plan for a checkpoint with these tensors: layers that predict may have been left out, all of them."""
    plain = plan_for(hf_config)
    if plain.family.prediction_layers is None or plain.is_reward_model:  # without words nothing further is predicted
        return plain
    whole = plan_for(hf_config, predicts=True)
    more = (whole.hf_tensors.keys() - plain.hf_tensors.keys()) | (whole.tensors.keys() - plain.tensors.keys())
    return plain if more.isdisjoint((*hf, *mcore)) else whole


def _number_of(layers: PredictionLayers | None, hf_config: Mapping[str, object]) -> int:
    count = hf_config.get(layers.count) if layers is not None else None
    return count if type(count) is int and 0 < count <= MOST else 0


def _prediction_steps(
    layers: PredictionLayers, rules: list[Rule], sizes: Mapping[str, int], layer: int
) -> Iterator[Step]:
    inside = f"mtp.layers.{layer - sizes['layers']}."
    for rule in layers.rules:
        yield from _layer_steps(replace(rule, mcore=inside + rule.mcore), sizes, layer, merged=False)
    kind = "experts" if "experts" in sizes else "dense"
    for rule in rules:
        if rule.mcore.startswith(MERGED_LAYERS) and rule.layers in ("all", kind):
            key = rule.mcore.replace(MERGED_LAYERS, inside + "transformer_layer.", 1)
            yield from _layer_steps(replace(rule, mcore=key), sizes, layer, merged=False)


def _exists(rule: Rule, settings: Mapping[str, object]) -> bool:
    wanted = rule.only_if is None or bool(settings[rule.only_if])
    return wanted and not (rule.unless and settings[rule.unless])


def _modules_with_state(key: str) -> Iterator[str]:
    """Yield the modules of Transformer Engine that a tensor makes known: its linear layers, norms and attention."""
    module, _, tensor = key.rpartition(".")
    if tensor == "weight" and module.startswith(("decoder.", "mtp.")) and not module.endswith(".router"):
        yield module
        if module.endswith(".linear_proj"):
            yield module.replace("linear_proj", "core_attention")


def layer_key(name: str, layer: int) -> str:
    """Return the key that one layer's own tensor has where layers are not merged."""
    return name.replace(MERGED_LAYERS, f"{MERGED_LAYERS}{layer}.", 1)


def _whole(value: object) -> int:
    assert isinstance(value, int)
    return value


def _steps(rules: list[Rule], settings: Mapping[str, object], sizes: Mapping[str, int]) -> Iterator[Step]:
    """Expand the rules: the run of per-layer rules once for every layer, the others as they stand."""
    layered = [rule for rule in rules if rule.mcore.startswith(MERGED_LAYERS)]
    # A 1 for each layer that has experts; absent when all layers are alike.
    pattern = settings.get("moe_layer_freq")
    kinds = ("dense", "experts")
    for rule in rules:
        if rule not in layered:
            yield _step(rule, sizes)
        elif rule is layered[0]:
            for layer in range(sizes["layers"]):
                kind = kinds["experts" in sizes if pattern is None else pattern[layer]]  # type: ignore[index]
                for each in layered:
                    if each.layers in ("all", kind):
                        yield from _layer_steps(each, sizes, layer, merged=pattern is None)


def _layer_steps(rule: Rule, sizes: Mapping[str, int], layer: int, *, merged: bool) -> Iterator[Step]:
    per_expert = any("{expert}" in name for name in rule.parts)
    for expert in range(sizes["experts"]) if per_expert else (None,):
        yield _step(rule, sizes, layer=layer, expert=expert, merged=merged)


def _step(
    rule: Rule,
    sizes: Mapping[str, int],
    *,
    layer: int | None = None,
    expert: int | None = None,
    merged: bool = True,
) -> Step:
    """Return one step of a rule; Megatron-core merges layers only when they are all alike, experts always."""
    parts = tuple(
        Part(name.format(layer=layer, expert=expert), axes, tuple(_length(axis, sizes) for axis in axes))
        for name, axes in rule.parts.items()
    )
    if rule.shares is None:
        blocks = stacked_blocks([part.shape[0] for part in parts])
    else:
        sections = tuple(tuple(sizes[size] for size in part.axes[0].split("+")) for part in parts)
        blocks = shared_blocks(sections, sizes[rule.shares])
    leading = [(layer, sizes["layers"])] if layer is not None and merged else []
    leading += [(expert, sizes["experts"])] if expert is not None else []
    return Step(
        name=rule.mcore,
        key=rule.mcore if merged or layer is None else layer_key(rule.mcore, layer),
        layer=layer,
        lead=tuple(length for _, length in leading),
        index=tuple(index for index, _ in leading),
        shape=(sum(block.rows for block in blocks), *parts[0].shape[1:]),
        parts=parts,
        blocks=blocks,
    )


def _length(axis: str, sizes: Mapping[str, int]) -> int:
    return sum(sizes[size] for size in axis.split("+"))


def stacked_blocks(rows: list[int]) -> tuple[RowBlock, ...]:
    """Return the blocks of tensors of `rows` rows each that lie whole under each other."""
    return tuple(RowBlock(part, 0, count) for part, count in enumerate(rows))


@lru_cache(maxsize=16)  # the layers share one
def shared_blocks(sections: tuple[tuple[int, ...], ...], shares: int) -> tuple[RowBlock, ...]:
    """Return the blocks when each of several tensors is cut into equal shares, and equal shares lie together.

    `sections[part]` are the rows of the tensors that lie under each other in a part: query, key and value
    are three parts of one section each, or one part of three.
    """
    places = []  # (part, first row, rows of a share)
    for part, rows in enumerate(sections):
        starts = [sum(rows[:number]) for number in range(len(rows))]
        places += [(part, start, count // shares) for start, count in zip(starts, rows, strict=True)]
    return tuple(
        RowBlock(part, start + share * rows, start + (share + 1) * rows)
        for share in range(shares)
        for part, start, rows in places
    )
