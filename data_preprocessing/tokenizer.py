"""A HuggingFace tokenizer folder, loaded without transformers, and its fingerprint."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from tokenizers import AddedToken, Tokenizer

from toolkits.foundation.errors import DataError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES_WITHOUT_JSON = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "qwen.tiktoken")


@dataclass(frozen=True)
class LoadedTokenizer:
    """An encoder with what surrounds it.

    `named` holds the texts of bos_token and its like, `control` the texts of all special tokens, `config`
    the content of tokenizer_config.json.
    """

    folder: Path
    encoder: Tokenizer
    named: Mapping[str, str]
    control: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def control_ids(self) -> list[int]:
        """Return the ids of the control tokens."""
        ids = map(self.encoder.token_to_id, self.control)
        return [token for token in ids if token is not None]


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Load a tokenizer folder; DataError when it is none.

    Without a tokenizer.json, transformers builds the encoder, and says so: that takes seconds and memory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such tokenizer folder; give the folder that holds tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        encoder = _encoder_from_file(folder / "tokenizer.json")
    else:
        encoder = _encoder_from_transformers(folder)
    # A tokenizer.json remembers how it was last used; padding or cutting must not creep into a dataset.
    encoder.no_truncation()
    encoder.no_padding()
    named = _named_tokens(config, read_json(folder / "special_tokens_map.json"))
    _add_missing_tokens(encoder, config, named)
    control = {token.content for token in encoder.get_added_tokens_decoder().values() if token.special}
    control |= set(named.values())
    return LoadedTokenizer(folder, encoder, named, tuple(sorted(control)), config)


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the sha256 of how a tokenizer makes ids of a text, equal for every re-save of the same tokenizer.

    It is taken over the parts of tokenizer.json that decide that, in one spelling. A folder without one is
    fingerprinted by the bytes of its vocabulary files.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    if (folder / "tokenizer.json").exists():
        content = _canonical(read_json(folder / "tokenizer.json"))
        digest.update(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
        return digest.hexdigest()
    found = [folder / name for name in FILES_WITHOUT_JSON if (folder / name).exists()]
    if not found:
        raise DataError(f"{folder}: no tokenizer here; looked for tokenizer.json, {', '.join(FILES_WITHOUT_JSON)}")
    for path in found:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _canonical(content: dict[str, Any]) -> dict[str, Any]:
    """Return what decides ids, without what re-saving changes.

    Left out are truncation, padding and post-processor (a chat template writes its special tokens itself),
    the decoder, the `special` flag, which transformers sets for the tokens it has names for, and settings
    of the model that are off, which older files do not spell out.
    """
    model = {key: value for key, value in content.get("model", {}).items() if value or key in ("vocab", "merges")}
    if "merges" in model:
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    added = [{key: value for key, value in token.items() if key != "special"} for token in content["added_tokens"]]
    steps = {key: content.get(key) for key in ("normalizer", "pre_tokenizer")}
    return {"model": model, "added_tokens": sorted(added, key=lambda token: token["id"]), **steps}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, empty when there is no such file; DataError when it holds anything else."""
    if not path.exists():
        return {}
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}); copy the file from the model again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object; copy the file from the model again")
    return content


def _encoder_from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise DataError(f"{path}: not a tokenizer ({error}); copy the file from the model again") from None


def _encoder_from_transformers(folder: Path) -> Tokenizer:
    tokenizer_fingerprint(folder)  # says that there is no tokenizer before seconds are spent on importing
    print(f"{folder} has no tokenizer.json: loading it with transformers, which takes longer", file=sys.stderr)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises, it is the folder's fault
        raise DataError(f"{folder}: transformers cannot load this tokenizer: {error}") from None
    encoder = getattr(loaded, "backend_tokenizer", None)
    if encoder is None:
        raise DataError(f"{folder}: {type(loaded).__name__} has no fast version; save it with a tokenizer.json")
    return encoder


def _named_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name in NAMED_TOKENS:
        token = config[name] if name in config else special_map.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            named[name] = token
    return named


def _add_missing_tokens(encoder: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Give the encoder the tokens that only tokenizer_config.json knows, as transformers does."""
    known = {token.content for token in encoder.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for index in sorted(listed, key=int):
        token = AddedToken(**{key: value for key, value in listed[index].items() if not key.startswith("_")})
        if token.content in known:
            continue
        encoder.add_tokens([token])
        known.add(token.content)
        if encoder.token_to_id(token.content) != int(index):
            raise DataError(
                f"tokenizer_config.json gives {token.content!r} the id {index}, which tokenizer.json cannot"
            )
    encoder.add_special_tokens([token for token in dict.fromkeys(named.values()) if token not in known])
