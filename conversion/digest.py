"""What tells the weights of one folder from those of another without reading them all."""

import hashlib
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".distcp")
HEAD = 1 << 16  # bytes at the front of a weight file that tell it from another of the same size
DIGEST_OF = f"sha256 of the names, sizes and first {HEAD} bytes of the weight files, its first 16 digits"


def weights_digest(folder: Path) -> str:
    """Return a digest of the names, sizes and first bytes of the weight files; a full hash would read them all."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(HEAD))
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that weights lie in, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
