"""JSON files and links of a folder that somebody else made: bounded, and never leading out of it."""

import json
import reprlib
from collections import Counter
from pathlib import Path

from toolkits.foundation.errors import CheckpointError

# A JSON text grows at most some hundred times in memory, by what it holds, not by its bytes. The index of the
# largest checkpoints has 15 MB and 300,000 values.
MAX_JSON = 100_000_000
MAX_VALUES = 4_000_000
_FAR = 1 << 62  # no file and no tensor reaches so far


def read_json(path: Path) -> dict:
    """Return the JSON object in a file; raise CheckpointError when it is anything else, or a bomb."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return parse_json(raw, str(path))


def parse_json(raw: bytes, source: str) -> dict:
    """Return the JSON object that `raw` says; `source` names it in errors.

    Raises CheckpointError when it is no JSON object, says a name twice, or is too large or too deep to be honest.
    """
    if len(raw) > MAX_JSON or sum(map(raw.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise CheckpointError(f"{source} is larger than any that belongs to a checkpoint")
    try:
        content = json.loads(raw, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} is not a JSON object")
    return content


def sizes(values: object) -> tuple[int, ...]:
    """Return whole numbers that can be sizes or places; raise ValueError when one cannot."""
    found = tuple(values) if isinstance(values, list | tuple) else (values,)
    if not all(type(size) is int and 0 <= size < _FAR for size in found):
        raise ValueError(f"{shown(values)} are not sizes")
    return found


def shown(value: object) -> str:
    """Return the beginning of what a value looks like, however often its parts hold one another."""
    return reprlib.repr(value)[:80]


def is_plain_name(name: object) -> bool:
    """Whether a name that a checkpoint gives a file is one in its own folder."""
    if not isinstance(name, str) or name in ("", "..") or "\0" in name:
        return False
    return name == Path(name).name and len(name.encode(errors="replace")) <= 255


def stays_inside(folder: Path, path: Path) -> bool:
    """Whether a file in `folder` lies there, links followed; the hub's cache may keep it in MODEL/blobs."""
    home, target = folder.resolve(), path.resolve()
    # The cache has MODEL/snapshots/COMMIT/NAME as links into MODEL/blobs.
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return any(each in target.parents for each in homes)


def _object(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it says {twice!r} twice")
    return content
