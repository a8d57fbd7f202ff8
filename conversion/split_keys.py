"""Keys that megatron-core may split further: an expert's own, and the halves of a gated layer.

With `singleton_local_shards` in a save's metadata it writes `experts.3.linear_fc1.weight_w` and `..._v` where it
else merges the experts into the leading axis of `experts.experts.linear_fc1.weight`, gate above up. Here such
tensors are put together again; what does not make up a whole stays as it is, for the accounting to name.
"""

import re
from collections.abc import Mapping

from .safe_pickle import StoredChunk, StoredTensor

_HALF = re.compile(r"(.+\.linear_fc1\.(?:weight|bias))_([wv])")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(linear_fc[12]\.(?:weight|bias))")


def merged(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors under the keys that they have where nothing is split."""
    halves: dict[str, dict[int, str]] = {}
    for key in tensors:
        if match := _HALF.fullmatch(key):
            halves.setdefault(match[1], {})["wv".index(match[2])] = key
    tensors = _put_together(tensors, halves, stacked=False)
    experts: dict[str, dict[int, str]] = {}
    for key in tensors:
        if match := _EXPERT.fullmatch(key):
            experts.setdefault(f"{match[1]}.experts.{match[3]}", {})[int(match[2])] = key
    return _put_together(tensors, experts, stacked=True)


def _put_together(
    tensors: Mapping[str, StoredTensor], groups: Mapping[str, Mapping[int, str]], *, stacked: bool
) -> dict[str, StoredTensor]:
    result = dict(tensors)
    for key, numbered in groups.items():
        parts = [tensors[numbered[number]] for number in range(len(numbered)) if number in numbered]
        alike = len({(part.dtype, part.shape) for part in parts}) == 1 and len(parts) == len(numbered)
        if key in tensors or not alike or (not stacked and len(parts) != 2):
            continue
        shape = parts[0].shape
        chunks = [
            _moved(chunk, number, shape[0], stacked) for number, part in enumerate(parts) for chunk in part.chunks
        ]
        whole = (len(parts), *shape) if stacked else (len(parts) * shape[0], *shape[1:])
        result[key] = StoredTensor(parts[0].dtype, whole, chunks)
        for name in numbered.values():
            del result[name]
    return result


def _moved(chunk: StoredChunk, number: int, rows: int, stacked: bool) -> StoredChunk:
    if stacked:
        offsets, sizes = (number, *chunk.offsets), (1, *chunk.sizes)
    else:
        offsets, sizes = (chunk.offsets[0] + number * rows, *chunk.offsets[1:]), chunk.sizes
    return StoredChunk(offsets, sizes, chunk.file, chunk.start, chunk.length)
