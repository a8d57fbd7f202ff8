"""Reward models: decoders with one score a token in place of words, as transformers' sequence classification.

A sequence's score is that of its last token. transformers looks for it from the end of a row, in front of all that is
the pad token of config.json; so that token is part of what the model is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkits.foundation.errors import CheckpointError, UsageError

from .adapters import REWARD_TASK
from .families import family_for
from .hf_checkpoint import CONFIG_FILE
from .mcore_directory import ADAPTER_CONFIG
from .safe_files import read_json
from .settings import is_reward_model

_LABELS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def as_reward_model(hf_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the config.json of a reward model with the decoder of `hf_config`; that of one stays as it is.

    `folder` holds the tokenizer, which says what rows are padded with. Raises CheckpointError for a family of which
    transformers has no such model.
    """
    if is_reward_model(hf_config):
        return dict(hf_config)
    family = family_for(hf_config)
    if not family.reward_architectures:
        raise CheckpointError(f"family {family.name} has no sequence classification in transformers")
    number = family.architectures.index(str(hf_config["architectures"][0]))
    of_causal = ("architectures", "auto_map", "num_labels", "problem_type")
    decoder = {name: value for name, value in hf_config.items() if name not in of_causal}
    pad = pad_token(hf_config, folder)
    said = {"pad_token_id": pad} if pad is not None else {}
    return {"architectures": [family.reward_architectures[number]], **decoder, **_LABELS, **said}


def pad_token(hf_config: Mapping[str, Any], folder: Path) -> int | None:
    """Return the token that fills the end of rows: the tokenizer's, else the config's, else the one that ends texts.

    None: rows cannot be padded, and the last token is the last.
    """
    named = _named_tokens(folder)
    ids = _ids(folder, {named[name] for name in ("pad_token", "eos_token") if name in named})
    for found in (
        ids.get(named.get("pad_token", "")),
        hf_config.get("pad_token_id"),
        ids.get(named.get("eos_token", "")),
    ):
        if type(found) is int and found >= 0:
            return found
    return None


def _named_tokens(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        for name, said in read_json(folder / file).items():
            text = said.get("content") if isinstance(said, dict) else said
            if isinstance(text, str):
                found[name] = text
    return found


def _ids(folder: Path, texts: set[str]) -> dict[str, int]:
    """Return the ids of special tokens by their texts."""
    path = folder / "tokenizer.json"
    content = read_json(path) if texts and path.is_file() else {}
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found = {text: vocabulary[text] for text in texts if isinstance(vocabulary, dict) and text in vocabulary}
    for token in content.get("added_tokens") or ():
        if isinstance(token, dict) and token.get("content") in texts:
            found[token["content"]] = token.get("id")
    return found


def is_classifier(hf_config: Mapping[str, Any]) -> bool:
    """Whether a config.json, of a family that is known or not, is that of a model that scores and writes nothing."""
    architectures = hf_config.get("architectures")
    return isinstance(architectures, list) and str(*architectures[:1]).endswith("ForSequenceClassification")


def is_of_reward_model(adapter: Path) -> bool:
    """Whether the adapter in a folder has a reward model's head."""
    path = Path(adapter) / ADAPTER_CONFIG
    return path.is_file() and read_json(path).get("task_type") == REWARD_TASK


def require_words(hf_config: Mapping[str, Any], folder: Path, *, instead: str) -> None:
    """Raise UsageError for a model that only scores; `instead` says what it can be used for."""
    if is_classifier(hf_config):
        raise UsageError(
            f"{folder / CONFIG_FILE} says {hf_config['architectures'][0]}: a reward model, which gives a score and "
            f"writes nothing; {instead}"
        )
