"""What transformers 5 spells otherwise than transformers 4, said in the older way too.

transformers 4 does not know the newer fields and says nothing: it would compute with its own rotary base. What a
directory says in the older spelling already, both read.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from toolkits.foundation.errors import CheckpointError

from .hf_checkpoint import CONFIG_FILE
from .safe_files import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
_FAST = "PreTrainedTokenizerFast"  # what both call a tokenizer that is all in tokenizer.json


def add_older_spelling(folder: Path) -> list[str]:
    """Let the configs in `folder` be read by transformers 4 too; return a note for each file that changed.

    A file that cannot be read stays as it is, and the note, which is printed too, says so.
    """
    notes = []
    for name, spell in ((CONFIG_FILE, _config), (TOKENIZER_CONFIG, _tokenizer_config)):
        path = folder / name
        try:
            content = read_json(path) if path.is_file() else {}
        except CheckpointError as error:
            notes.append(f"{name} is carried as it is, but it is damaged: {str(error).removeprefix(f'{path} ')}")
            print(f"warning: {notes[-1]}", file=sys.stderr, flush=True)
            continue
        spelled = spell(content)
        if spelled != content:
            path.write_text(json.dumps(spelled, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            notes.append(f"{name} says what transformers 4 reads too")
    return notes


def _config(content: Mapping[str, object]) -> dict[str, object]:
    """Return config.json with the fields that transformers 4 has in the place of `dtype` and `rope_parameters`."""
    older: dict[str, object] = {}
    if "dtype" in content:
        older["torch_dtype"] = content["dtype"]
    rope = content.get("rope_parameters")
    if isinstance(rope, dict):
        local = rope.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            older["rope_local_base_freq"] = local["rope_theta"]
        older |= _rope(rope.get("full_attention", rope))
    said_apart = {name: value for name, value in older.items() if name == "torch_dtype" or name not in content}
    return {**content, **said_apart}


def _rope(parameters: object) -> dict[str, object]:
    if not isinstance(parameters, dict):
        return {}
    fields = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    scaling = {name: value for name, value in parameters.items() if name not in fields}
    return fields if scaling.get("rope_type", "default") == "default" else {**fields, "rope_scaling": scaling}


def _tokenizer_config(content: Mapping[str, object]) -> dict[str, object]:
    older = dict(content)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = _FAST
    if isinstance(older.get("extra_special_tokens"), list):
        older.setdefault("additional_special_tokens", older.pop("extra_special_tokens"))
    return older
