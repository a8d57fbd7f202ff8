"""Context parallelism: which tokens of a packed row a rank holds, and what each of them attends to.

Every conversation is cut into 2 * CP pieces of the same length. Rank r holds piece r and piece 2 * CP - 1 - r,
one from the front and one from the back, so that all ranks have as much to attend to; megatron-core's rotary
positions and Transformer Engine expect the same. Without Transformer Engine each layer gathers keys and values
of all ranks (Dubey et al., 2024, section 3.3.2) and takes the ones that its own pieces need.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from ..batches import MicroBatch


@dataclass
class PackedShare(PackedSeqParams):
    """A rank's share of a packed row: queries in pieces, each with the keys from its conversation's beginning.

    `cu_seqlens_q` and the other inherited fields describe the whole row. `query_bounds` and `key_bounds` are
    int32 [pieces + 1]; `keys` int64 [key_bounds[-1]] are places in the keys of all ranks, rank by rank.
    """

    query_bounds: torch.Tensor | None = None
    key_bounds: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    longest_query: int = 0
    longest_key: int = 0


def share_of(batch: MicroBatch, *, rank: int, size: int) -> MicroBatch:
    """Return the part of `batch` that context-parallel rank `rank` of `size` holds, [1, t / size] each.

    The conversations' lengths must be multiples of 2 * size.
    """
    if size == 1:
        return batch
    bounds = batch.packed.cu_seqlens_q.numpy().astype(np.int64)
    starts, piece = bounds[:-1], np.diff(bounds) // (2 * size)
    assert not (np.diff(bounds) % (2 * size)).any()
    own = np.array([rank, 2 * size - 1 - rank])
    pieces = np.repeat(piece, 2)
    queries = _ranges((starts[:, None] + own * piece[:, None]).ravel(), pieces)
    key_lengths = ((own + 1) * piece[:, None]).ravel()
    keys = _place_among_ranks(starts, piece, size)[_ranges(np.repeat(starts, 2), key_lengths)]
    index = torch.from_numpy(queries)
    whole = {field.name: getattr(batch.packed, field.name) for field in fields(PackedSeqParams)}
    return replace(
        batch,
        **{name: getattr(batch, name)[:, index] for name in ("tokens", "labels", "loss_mask", "positions")},
        others=batch.others and share_of(batch.others, rank=rank, size=size),
        packed=PackedShare(
            **whole,
            query_bounds=_bounds(pieces),
            key_bounds=_bounds(key_lengths),
            keys=torch.from_numpy(keys),
            longest_query=int(pieces.max()),
            longest_key=int(key_lengths.max()),
        ),
    )


def _place_among_ranks(starts: np.ndarray, piece: np.ndarray, size: int) -> np.ndarray:
    """Return, for each place of the row, where it is when the ranks' shares lie one behind the other."""
    length = 2 * size * piece
    total = int(length.sum())
    start, part = np.repeat(starts, length), np.repeat(piece, length)
    number, offset = np.divmod(np.arange(total) - start, part)
    from_the_back = number >= size
    owner = np.where(from_the_back, 2 * size - 1 - number, number)
    return owner * (total // size) + start // size + from_the_back * part + offset


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ... of each length, one behind the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _bounds(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32))
