"""What tells the weights of one folder from those of another without reading them all."""

import hashlib
import os
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".distcp")
# Two tunings of one model have files of the same names, sizes and headers: what tells them apart may be anywhere.
SAMPLES, SAMPLE = 64, 1 << 12  # of each file, spread evenly; bytes of each, and of the file's beginning and end
DIGEST_OF = (
    f"sha256 of the names, sizes and {SAMPLES + 1} samples of {SAMPLE} bytes of the weight files, 16 digits of it"
)


def weights_digest(folder: Path) -> str:
    """Return a digest of the names, sizes and samples of the weight files; a full hash would read them all."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for number in range(SAMPLES + 1):
                digest.update(os.pread(file.fileno(), SAMPLE, max(0, size - SAMPLE) * number // SAMPLES))
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that weights lie in, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
