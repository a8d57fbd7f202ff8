"""What takes seconds to find out about a tokenizer, kept in the user's cache folder for the next time.

A file is named after a digest of everything that its content follows from, and begins with a digest of the content:
a damaged one is found out again.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import orjson

DIGEST_BYTES = hashlib.sha256().digest_size


def kept(kind: str, follows_from: object, find_out: Callable[[], bytes]) -> bytes:
    """Return what `find_out` returns, from the cache where it is known.

    `follows_from` is a JSON value that differs whenever the answer might.
    """
    name = hashlib.sha256(orjson.dumps(follows_from)).hexdigest()[:32]
    folder = None
    try:
        folder = _cache_folder() / kind
        stored = (folder / name).read_bytes()
        content = stored[DIGEST_BYTES:]
        if hashlib.sha256(content).digest() == stored[:DIGEST_BYTES]:
            return content
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    content = find_out()
    try:
        _store(_cache_folder() / kind, name, content)
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        print(f"{folder or 'no cache folder'}: {why}; this will be found out again", file=sys.stderr)
    return content


def _store(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with open(number, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, folder / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "temper"
