"""Context parallelism in one process: the shares of a row, and attention over them."""

from types import SimpleNamespace

import pytest
import torch

from toolkits.training.batches import MicroBatch, packed_params
from toolkits.training.parallel import attention
from toolkits.training.parallel.context import share_of

ENDS = [12, 24, 60, 72]  # multiples of 2 * CP for CP 2 and 3
LONGEST = 36


def row():
    tokens = torch.arange(100, 172)[None]
    mask = (torch.arange(72) % 3 > 0).float()[None]
    return MicroBatch(tokens, tokens + 1, mask, torch.arange(72)[None], packed_params(ENDS, longest=LONGEST))


@pytest.mark.parametrize("size", [2, 3])
def test_the_shares_of_a_row_hold_every_token_once(size):
    shares = [share_of(row(), rank=rank, size=size) for rank in range(size)]
    assert all(share.tokens.shape == (1, 72 // size) for share in shares)
    assert sorted(torch.cat([share.tokens[0] for share in shares]).tolist()) == row().tokens[0].tolist()
    for share in shares:
        assert torch.equal(share.labels, share.tokens + 1)
        assert torch.equal(share.positions, share.tokens - 100)
        assert torch.equal(share.loss_mask[0], row().loss_mask[0][share.positions[0]])
        assert torch.equal(share.packed.cu_seqlens_q, row().packed.cu_seqlens_q), "rotary positions need the whole row"
    front, back = shares[0].tokens[0, :1], shares[0].tokens[0, 12 // size - 1 : 12 // size]
    assert (front.item(), back.item()) == (100, 111), "rank 0 has the first and the last piece of a conversation"


def test_one_rank_has_the_row_itself():
    whole = row()
    assert share_of(whole, rank=0, size=1) is whole


@pytest.mark.parametrize("kind", ["PackedAttention", "ReferenceAttention"])
@pytest.mark.parametrize("size", [2, 3])
def test_attention_over_shares_is_attention_over_the_row(kind, size, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(72, heads, 10, generator=generator) for heads in (6, 2, 2))
    core = getattr(attention, kind)(SimpleNamespace(), 1, None, "self")
    expected = core(q, k, v, packed_seq_params=row().packed)
    shares = [share_of(row(), rank=rank, size=size) for rank in range(size)]
    places = [share.positions[0] for share in shares]
    # What the ranks send one another: their shares of the keys, then of the values, one behind the other.
    sent = iter([torch.cat([tensor[place] for place in places]) for tensor in (k, v)] * size)
    monkeypatch.setattr(attention, "_of_all_ranks", lambda _: next(sent))
    for share, place in zip(shares, places, strict=True):
        found = core(q[place], k[place], v[place], packed_seq_params=share.packed)
        torch.testing.assert_close(found, expected[place], atol=1e-6, rtol=1e-5)


def test_ranks_have_equally_much_to_attend_to():
    keys = [share_of(row(), rank=rank, size=3).packed.key_bounds[-1] for rank in range(3)]
    assert len({int(count) for count in keys}) == 1
