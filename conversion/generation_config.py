"""generation_config.json: where generation ends."""

import json
from collections.abc import Mapping
from pathlib import Path

from toolkits.foundation.errors import CheckpointError

from .hf_checkpoint import CONFIG_FILE
from .safe_files import read_json

GENERATION_FILE = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def stop_at(folder: Path, token: int) -> list[int] | None:
    """Let generation with the model in `folder` end at `token` too; return where it ended before.

    Nothing is written, and None returned, when it ended there already. Without a generation_config.json the ids of
    config.json count, as in transformers, and one is written. Raises CheckpointError when a file is damaged.
    """
    path, content = _content(folder)
    ends = _ends(path, content)
    if token in ends:
        return None
    text = json.dumps({**content, "eos_token_id": [token, *ends]}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return ends


def ends_of(folder: Path) -> list[int]:
    """Return the tokens at which generation with the model in `folder` ends; raise CheckpointError as `stop_at`."""
    return _ends(*_content(folder))


def _content(folder: Path) -> tuple[Path, dict[str, object]]:
    path = folder / GENERATION_FILE
    return path, read_json(path) if path.is_file() else _from_config(read_json(folder / CONFIG_FILE))


def _from_config(config: Mapping[str, object]) -> dict[str, object]:
    return {name: config[name] for name in _TOKENS if config.get(name) is not None}


def _ends(path: Path, content: Mapping[str, object]) -> list[int]:
    said = content.get("eos_token_id")
    listed = said if isinstance(said, list) else [] if said is None else [said]
    ends = [end for end in listed if type(end) is int]
    if len(ends) < len(listed):
        raise CheckpointError(f"{path}: eos_token_id is {said!r}, which are no token ids")
    return ends
