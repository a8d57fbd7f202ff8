"""A HuggingFace tokenizer folder, read without transformers, and its fingerprint.

What a large tokenizer.json says is kept (see kept.py). The encoder itself is built when somebody asks for it: that
takes a second, and the fast one (see encoders.py) does not need it.
"""

import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import AddedToken, Tokenizer

from toolkits.foundation.errors import DataError

from .kept import kept

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES_WITHOUT_JSON = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "qwen.tiktoken")
KEPT_FROM = 1_000_000  # bytes of tokenizer.json that are worth a file in the cache


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what surrounds it.

    `named` holds the texts of bos_token and its like, `control` the texts of all special tokens, `config` the
    content of tokenizer_config.json. `ids` gives the id of each added token, `byte_lengths` int32 [vocabulary]
    how many bytes of text each token stands for, None where a token alone does not tell.
    """

    folder: Path
    named: Mapping[str, str]
    control: Sequence[str]
    config: Mapping[str, Any]
    ids: Mapping[str, int]
    byte_lengths: np.ndarray | None
    normalizes: bool  # to NFC, before anything else
    fingerprint: str
    as_json: str | None  # the tokenizer where tokenizer.json is not all of it

    @cached_property
    def encoder(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` library."""
        if self.as_json is None:
            encoder = _encoder_from_file(self.folder / "tokenizer.json")
        else:
            encoder = Tokenizer.from_str(self.as_json)
        # A tokenizer.json remembers how it was last used; padding or cutting must not creep into a dataset.
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    @property
    def identity(self) -> str:
        """Return a digest of everything that ids follow from.

        The fingerprint is of tokenizer.json as it stands, or of the files that transformers makes one from.
        """
        return hashlib.sha256(orjson.dumps([self.fingerprint, sorted(self.ids.items()), self.as_json])).hexdigest()

    @property
    def control_ids(self) -> list[int]:
        """Return the ids of the control tokens."""
        return [self.ids[token] for token in self.control if token in self.ids]


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Load a tokenizer folder; DataError when it is none.

    Without a tokenizer.json, transformers builds the encoder, and says so: that takes seconds and memory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such tokenizer folder; give the folder that holds tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    named = _named_tokens(config, read_json(folder / "special_tokens_map.json"))
    path = folder / "tokenizer.json"
    if not path.exists() or path.stat().st_size < KEPT_FROM:
        return LoadedTokenizer(folder=folder, named=named, config=config, **_found_out(folder, config, named))
    digests = [hashlib.sha256(one).hexdigest() for one in (path.read_bytes(), Path(__file__).read_bytes())]
    version = importlib.metadata.version("tokenizers")

    def find_out() -> bytes:
        return orjson.dumps(_found_out(folder, config, named), option=orjson.OPT_SERIALIZE_NUMPY)

    found = orjson.loads(kept("tokenizers", [*digests, version, config, named], find_out))
    if found["byte_lengths"] is not None:
        found["byte_lengths"] = np.array(found["byte_lengths"], np.int32)
    return LoadedTokenizer(folder=folder, named=named, config=config, **found)


def _found_out(folder: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    """Return those fields of a LoadedTokenizer that tokenizer.json, or the encoder without one, decides."""
    path, content, fingerprint, as_json = folder / "tokenizer.json", None, None, None
    if path.exists():
        content = read_json(path)
        _require_tokenizer(path, content)
        fingerprint = _fingerprint(content)
    if content is None or _missing_tokens(content, config, named):
        encoder = _encoder_from_transformers(folder) if content is None else _encoder_from_file(path)
        _add_missing_tokens(encoder, config, named)
        as_json = encoder.to_str()
        content = orjson.loads(as_json)
    control = {token["content"] for token in content["added_tokens"] if token["special"]} | set(named.values())
    vocabulary = content["model"]["vocab"]
    ids = {text: vocabulary[text] for text in control if isinstance(vocabulary, dict) and text in vocabulary}
    ids |= {token["content"]: token["id"] for token in content["added_tokens"]}
    return {
        "control": sorted(control),
        "ids": ids,
        "byte_lengths": byte_lengths(content),
        "normalizes": bool(content.get("normalizer")),
        "fingerprint": fingerprint or tokenizer_fingerprint(folder),
        "as_json": as_json,
    }


def byte_lengths(content: Mapping[str, Any]) -> np.ndarray | None:
    """Return how many bytes of text each token of a byte-level tokenizer.json stands for, None for another kind.

    Such a tokenizer loses no byte: the lengths of a text's tokens add up to the text's, in UTF-8.
    """
    model, steps = content["model"], _flattened(content.get("pre_tokenizer"), "pretokenizers")
    normalizers = _flattened(content.get("normalizer"), "normalizers")
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE" or any(model.get(key) for key in odd):
        return None
    if any(step["type"] != "NFC" for step in normalizers) or not steps:
        return None
    *splits, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if any(step["type"] not in ("Split", "Digits") or step.get("behavior") == "Removed" for step in splits):
        return None
    vocabulary, added = model["vocab"], content["added_tokens"]
    ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    greatest = max([int(ids.max(initial=-1)), *(token["id"] for token in added)])
    lengths = np.zeros(greatest + 1, np.int32)
    lengths[ids] = np.fromiter(map(len, vocabulary), np.int32, len(vocabulary))  # a character for each byte
    for token in added:
        lengths[token["id"]] = len(token["content"].encode())
    return lengths


def _flattened(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[inside] for inner in _flattened(part, inside)]
    return [step]


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the sha256 of how a tokenizer makes ids of a text, equal for every re-save of the same tokenizer.

    It is taken over the parts of tokenizer.json that decide that, in one spelling. A folder without one is
    fingerprinted by the bytes of its vocabulary files.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return _fingerprint(read_json(folder / "tokenizer.json"))
    digest = hashlib.sha256()
    found = [folder / name for name in FILES_WITHOUT_JSON if (folder / name).exists()]
    if not found:
        raise DataError(f"{folder}: no tokenizer here; looked for tokenizer.json, {', '.join(FILES_WITHOUT_JSON)}")
    for path in found:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _fingerprint(content: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(_canonical(content), option=orjson.OPT_SORT_KEYS)).hexdigest()


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


def _require_tokenizer(path: Path, content: Mapping[str, Any]) -> None:
    if not isinstance(content.get("model"), dict) or not isinstance(content.get("added_tokens"), list):
        _encoder_from_file(path)  # says what is wrong
        raise DataError(f"{path}: not a tokenizer; copy the file from the model again")


def _named_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name in NAMED_TOKENS:
        token = config[name] if name in config else special_map.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            named[name] = token
    return named


def _missing_tokens(content: Mapping[str, Any], config: Mapping[str, Any], named: Mapping[str, str]) -> set[str]:
    listed = config.get("added_tokens_decoder") or {}
    wanted = {token["content"] for token in listed.values()} | set(named.values())
    return wanted - {token["content"] for token in content["added_tokens"]}


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
