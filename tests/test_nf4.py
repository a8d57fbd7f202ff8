"""NF4 and int8 of our reference are those of bitsandbytes, bit for bit, on every type and shape that a layer has."""

import pytest
import torch

from conversion.quantized import (
    NESTED_BLOCK,
    Reference,
    dynamic_values,
    int8_weights,
    nf4_levels,
    quantize_int8,
    quantize_nf4,
    quantized,
)

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows and columns: blocks that do and do not fill whole nested blocks, and more than 32,768 blocks (2M weights).
SHAPES = [(1, 64), (7, 192), (96, 448), (129, 1024), (2085, 1088)]


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is compared with: pip install '.[qlora]'")


def matrix(shape, dtype, *, seed=0):
    """Weights as layers have them, with a block of zeros, a row of zeros, ties and an outlier."""
    weights = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weights[0, :64] = 0
    if shape[0] > 1:
        weights[1] = 0
        weights[2, :32], weights[2, 32:64] = 0.5, -1.0
        weights[3, 5] = 3.0
    return weights.to(dtype)


def runs(weights, rows):
    return (weights[start : start + rows] for start in range(0, len(weights), rows))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_has_the_codes_scales_and_values_of_bitsandbytes(bnb, shape, dtype):
    weights = matrix(shape, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its mean of the scales depends on that from 32,768 blocks on; ours does not
    packed, state = bnb.functional.quantize_4bit(weights, compress_statistics=True, quant_type="nf4")
    torch.set_num_threads(3)
    ours = quantize_nf4(runs(weights, 40), Reference(grid=True))
    torch.set_num_threads(threads)
    assert torch.equal(ours.codes.flatten(), packed.flatten())
    assert torch.equal(ours.scales.flatten(), state.absmax)
    assert torch.equal(ours.nested, state.state2.absmax) and torch.equal(ours.offset, state.offset)
    for kind in TYPES:
        state.dtype = kind
        expected = bnb.functional.dequantize_4bit(packed, state)
        assert torch.equal(ours.rows(0, len(weights), kind), expected)
        middle = slice(len(weights) // 3, len(weights) // 2 + 1)
        assert torch.equal(ours.rows(middle.start, middle.stop, kind), expected[middle])


def test_the_tables_are_those_of_bitsandbytes(bnb):
    assert torch.equal(nf4_levels(), bnb.functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_values(), bnb.functional.create_dynamic_map())


def test_scales_are_looked_up_as_bitsandbytes_does(bnb):
    """On values of every size, and constant ones, which come out as zeros."""
    for power in (1, 2, 5):
        values = torch.rand(300_001, generator=torch.Generator().manual_seed(power)) ** power - 0.4
        values[:NESTED_BLOCK] = 0
        codes, state = bnb.functional.quantize_blockwise(values, blocksize=NESTED_BLOCK)
        ours = Reference(grid=True).dynamic(values)
        assert torch.equal(ours[0], codes) and torch.equal(ours[1], state.absmax)
        nearest = Reference().dynamic(values)[0]
        apart = (dynamic_values()[nearest.long()] - dynamic_values()[codes.long()]).abs()[NESTED_BLOCK:]
        assert 0 < float((apart > 0).float().mean()) < 0.003 and apart.max() < 0.02


def test_codes_without_the_grid_are_the_nearest():
    values = torch.rand(2560, generator=torch.Generator().manual_seed(3)) - 0.3
    codes, absmax = Reference().dynamic(values)
    scaled = values.double().view(-1, NESTED_BLOCK) / absmax[:, None]
    distance = (scaled[..., None] - dynamic_values().double()).abs()
    chosen = distance.gather(-1, codes.long().view(-1, NESTED_BLOCK, 1))[..., 0]
    assert torch.allclose(chosen, distance.amin(-1), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_int8_has_the_codes_scales_and_values_of_bitsandbytes(bnb, dtype):
    weights = matrix((129, 452), dtype)
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weights.to(torch.float16))
    ours = quantize_int8(runs(weights, 40))
    some = absmax > 0  # its own zeros are divided by zero
    assert torch.equal(ours.codes[some], codes[some]) and torch.equal(ours.scales, absmax)
    assert not ours.rows(1, 2, dtype).any()
    layer = bnb.nn.Linear8bitLt(452, 129, bias=False, has_fp16_weights=False).train()
    layer.weight, layer.state.CB, layer.state.SCB = bnb.nn.Int8Params(codes, requires_grad=False), codes, absmax
    expected = layer(torch.eye(452).to(dtype)).T
    assert torch.equal(ours.rows(0, 129, dtype)[some], expected[some])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_lost_is_what_the_format_promises(kind):
    weights = matrix((96, 512), torch.float32)
    lost = (quantized([weights], kind, Reference()).rows(0, 96, torch.float32) - weights).abs()
    if kind == "int8":  # half a step of 1 / 127 of the row's largest, and half an fp16 step
        assert bool((lost <= (0.5 / 127 + 2**-11) * weights.abs().amax(1, keepdim=True) + 1e-7).all())
        return
    widest = (nf4_levels()[1:] - nf4_levels()[:-1]).max() / 2
    largest = weights.abs().unflatten(1, (-1, 64)).amax(-1)
    spread = (largest - largest.mean()).abs().max()
    limit = (widest * largest + 0.05 * spread)[..., None] + 1e-7
    assert bool((lost.unflatten(1, (-1, 64)) <= limit).all()) and lost.max() > 0


def test_a_cast_comes_first():
    weights = matrix((9, 128), torch.float32)
    cast = quantized([weights], "nf4", Reference(), dtype=torch.bfloat16)
    direct = quantized([weights.bfloat16()], "nf4", Reference())
    without = quantized([weights], "nf4", Reference())
    assert torch.equal(cast.codes, direct.codes) and torch.equal(cast.scales, direct.scales)
    assert not torch.equal(cast.nested, without.nested)


def test_int8_rounds_once():
    codes, scales = torch.tensor([[127, -3]], dtype=torch.int8), torch.tensor([0.3])
    exact = torch.tensor([[0.3, -3 * 0.3 / 127]]).bfloat16()
    assert torch.equal(int8_weights(codes, scales, torch.bfloat16), exact)
