"""What a config.json says of a model, in Megatron-core's words, and whether megatron-core computes the same.

No torch: a launcher can afford to import it.
"""

import math
from collections.abc import Iterable, Mapping

from toolkits.foundation.errors import CheckpointError

from .families import family_for
from .families.family import REQUIRED, Condition, ModelFamily, Ratio, Setting

MOST = 10_000  # layers, heads, experts: beyond, a config.json is not believed

_ABSENT = object()


def mcore_settings(hf_config: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of Megatron-core's TransformerConfig and GPTModel that config.json decides.

    Raises CheckpointError that names the family and every field that is missing or cannot be.
    """
    family = family_for(hf_config)
    settings: dict[str, object] = {**family.constants, "reward_head": is_reward_model(hf_config)}
    missing, wrong = [], []
    for setting in settings_of(family).values():
        place, value = _value(setting, hf_config)
        if value is REQUIRED:
            missing.append(" or ".join(places(setting.hf)))
        elif place and setting.values:
            value = next((ours for theirs, ours in setting.values if theirs == value), None)
        elif place and not _can_be(value, setting.kind):
            wrong.append(f"{place}={value!r}")
        settings[setting.mcore] = value
    if missing:
        raise CheckpointError(f"config.json of family {family.name} lacks {', '.join(missing)}")
    if not wrong and _product(settings, "num_layers", "num_moe_experts") > 100 * MOST:
        wrong.append("more experts than a model has")
    if wrong:
        raise CheckpointError(f"config.json of family {family.name} says what cannot be: {', '.join(wrong)}")
    settings = _derived(family, settings)
    if settings["reward_head"]:
        settings["share_embeddings_and_output_weights"] = False  # there are no words to share a matrix with
    pattern = _expert_pattern(family, hf_config, settings)
    return settings if pattern is None else {**settings, "moe_layer_freq": pattern}


def is_reward_model(hf_config: Mapping[str, object]) -> bool:
    """Whether a config.json is that of a decoder with one score in place of words; CheckpointError: with several."""
    family, architectures = family_for(hf_config), hf_config["architectures"]
    assert isinstance(architectures, list)
    if architectures[0] not in family.reward_architectures:
        return False
    if (labels := label_count(hf_config)) != 1:
        raise CheckpointError(
            f"config.json describes {architectures[0]} with {labels} labels (id2label): only reward models, which have "
            "one score, are converted"
        )
    return True


def label_count(hf_config: Mapping[str, object]) -> object:
    """Return how many labels a classifier has; without a word, transformers takes two."""
    said = hf_config.get("id2label", hf_config.get("num_labels", 2))
    return len(said) if isinstance(said, Mapping) else said


def config_dtype(hf_config: Mapping[str, object]) -> str | None:
    """Return the weights' type as config.json says it (`bfloat16`), in either spelling."""
    said = hf_config.get("dtype", hf_config.get("torch_dtype"))
    return None if said is None else str(said).removeprefix("torch.")


def untrainable_reasons(hf_config: Mapping[str, object]) -> list[str]:
    """Return why training of this model would not be exact; an empty list when it is. Conversion always is."""
    family = family_for(hf_config)
    reasons = [f"family {family.name}: {reason}" for reason in family.never_exact]
    for condition in family.exact_when:
        reasons += _objections(condition, hf_config)
    for setting in settings_of(family).values():
        said = _said(hf_config, setting.hf)
        if any(value != next(iter(said.values())) for value in said.values()):
            name = places(setting.hf)[-1].rpartition(".")[2]
            listed = ", ".join(f"{place} {value}" for place, value in said.items())
            reasons.append(f"config.json contradicts itself on {name}: {listed}")
    return list(dict.fromkeys(reasons))


def settings_of(family: ModelFamily) -> dict[str, Setting]:
    """Return a family's settings by their Megatron-core name: of two with the same, the later one counts."""
    return {setting.mcore: setting for setting in family.settings}


def places(hf: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the fields of config.json that may say something, the newest spelling first."""
    return (hf,) if isinstance(hf, str) else hf


def _objections(condition: Condition, hf_config: Mapping[str, object]) -> Iterable[str]:
    if condition.when is not None and not _says(hf_config, condition.when):
        return
    if condition.unless is not None and _says(hf_config, condition.unless):
        return
    found = {place: _find(hf_config, place) for place in places(condition.hf)}
    found = {place: value for place, value in found.items() if value is not _ABSENT}
    for place, value in (found or {places(condition.hf)[0]: condition.default}).items():
        compared = _divided(value, condition.over, hf_config)
        each_allowed = all(
            each in condition.allowed for each in (compared if isinstance(compared, list) else [compared])
        )
        if not (each_allowed or _is_at_least(value, condition.at_least, hf_config)):
            yield f"config.json says {place}={value}: {condition.reason}"


def _says(hf_config: Mapping[str, object], claim: tuple[str | tuple[str, ...], object]) -> bool:
    hf, expected = claim
    return expected in _said(hf_config, hf).values()


def _divided(value: object, field: str | None, hf_config: Mapping[str, object]) -> object:
    if field is None:
        return value
    by = _find(hf_config, field)
    return value // by if isinstance(value, int) and isinstance(by, int) and by > 0 else None


def _is_at_least(value: object, field: str | None, hf_config: Mapping[str, object]) -> bool:
    least = None if field is None else _find(hf_config, field)
    return isinstance(value, int | float) and isinstance(least, int | float) and value >= least


def _value(setting: Setting, hf_config: Mapping[str, object]) -> tuple[str, object]:
    """Return what config.json says and where, or the default and ""."""
    for place, value in _said(hf_config, setting.hf).items():
        return place, value
    null = setting.null is not REQUIRED and any(_find(hf_config, place) is None for place in places(setting.hf))
    return "", setting.null if null else setting.default


def _product(settings: Mapping[str, object], *names: str) -> int:
    return math.prod(value for value in map(settings.get, names) if isinstance(value, int))


def _find(hf_config: Mapping[str, object], place: str) -> object:
    value: object = hf_config
    for name in place.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return _ABSENT
        value = value[name]
    return value


def _said(hf_config: Mapping[str, object], hf: str | tuple[str, ...]) -> dict[str, object]:
    """Return what each place says, null left out."""
    values = {place: _find(hf_config, place) for place in places(hf)}
    return {place: value for place, value in values.items() if value is not _ABSENT and value is not None}


def _can_be(value: object, kind: str) -> bool:
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    return type(value) is int and value >= 1 and (kind == "size" or value <= MOST)


def _expert_pattern(
    family: ModelFamily, hf_config: Mapping[str, object], settings: Mapping[str, object]
) -> list[int] | None:
    """Return a 1 for each layer with experts and a 0 for each without; None when all layers are alike."""
    where = family.expert_layers
    if where is None:
        return None
    said = {name: hf_config.get(name) for name in (where.first, where.step, where.dense) if name}
    first, step, dense = (
        default if name is None or said[name] is None else said[name]
        for name, default in ((where.first, 0), (where.step, 1), (where.dense, []))
    )
    if not (type(first) is int and type(step) is int and step > 0 and isinstance(dense, list)):
        listed = ", ".join(f"{name}={value!r}" for name, value in said.items())
        raise CheckpointError(f"config.json of family {family.name} says {listed}: which layers have experts?")
    layers = settings["num_layers"]
    assert isinstance(layers, int)
    pattern = [int(layer >= first and (layer + 1) % step == 0 and layer not in dense) for layer in range(layers)]
    return pattern if 0 in pattern else None


def _derived(family: ModelFamily, settings: dict[str, object]) -> dict[str, object]:
    """Give the settings that are made of others their values, and hold heads against groups."""
    for name, setting in settings_of(family).items():
        value = settings[name]
        if isinstance(value, Ratio):
            whole, parts = settings[value.of], settings[value.by] if value.by else 1
            assert isinstance(whole, int) and isinstance(parts, int), name
            if whole % parts:
                raise CheckpointError(
                    f"config.json: {value.of} {whole} is no multiple of {value.by} {parts}, and {name} is not given"
                )
            settings[name] = whole // parts
        elif setting.times:
            times = settings[setting.times]
            assert isinstance(value, int) and isinstance(times, int), name
            settings[name] = value * times
    heads, groups = settings["num_attention_heads"], settings["num_query_groups"]
    assert isinstance(heads, int) and isinstance(groups, int)
    if heads % groups:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {groups} key/value heads")
    return settings
