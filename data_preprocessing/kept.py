"""What takes seconds to find out about a tokenizer, kept in the user's cache folder for the next time.

A file is named after a digest of everything that its content follows from, and begins with a digest of the content:
a damaged one is found out again.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import orjson

from toolkits.foundation.publish import write_bytes

DIGEST_BYTES = hashlib.sha256().digest_size


def kept(kind: str, follows_from: object, find_out: Callable[[], bytes]) -> bytes:
    """Return what `find_out` returns, from the cache where it is known.

    `follows_from` is a JSON value that differs whenever the answer might.
    """
    name = hashlib.sha256(orjson.dumps(follows_from)).hexdigest()[:32]
    try:
        path = _cache_folder() / kind / name
    except RuntimeError as error:  # a user without a home
        print(f"{error} This will be found out again", file=sys.stderr)
        return find_out()
    try:
        stored = path.read_bytes()
        content = stored[DIGEST_BYTES:]
        if hashlib.sha256(content).digest() == stored[:DIGEST_BYTES]:
            return content
    except OSError:
        pass
    content = find_out()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        print(f"{path.parent}: {error.strerror}; this will be found out again", file=sys.stderr)
    return content


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "temper"
