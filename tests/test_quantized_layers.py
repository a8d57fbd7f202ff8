"""What a rank holds of quantised matrices is, bit for bit, its part of the whole ones, wherever they are cut."""

import pytest
import torch

from conversion.plan import RowBlock, shared_blocks, stacked_blocks
from conversion.quantized import Reference, quantized

pytest.importorskip("bitsandbytes", reason="its kernel makes the numbers: pip install '.[qlora]'")

TYPES = [torch.float32, torch.bfloat16]
# Matrices of one layer: several nested blocks of scales in the first, which is no multiple of 256 blocks.
ROWS, COLUMNS = (96, 24, 24), 448


@pytest.fixture(scope="module")
def whole():
    """{format: (quantised matrices, their numbers by type)}."""
    generator = torch.Generator().manual_seed(5)
    weights = [0.02 * torch.randn(rows, COLUMNS, generator=generator) for rows in ROWS]
    found = {}
    for kind in ("nf4", "int8"):
        matrices = [quantized([each], kind, Reference()) for each in weights]
        numbers = {
            dtype: [one.rows(0, rows, dtype) for one, rows in zip(matrices, ROWS, strict=True)] for dtype in TYPES
        }
        found[kind] = matrices, numbers
    return found


def layer_of(place, matrices, kind):
    from toolkits.training.parallel.quantized import QuantizedLinear

    layer = QuantizedLinear()
    layer.allocate(place, kind, torch.device("cpu"))
    for part, matrix in enumerate(matrices):
        layer.fill(part, matrix)
    return layer


def place_of(rows, columns=slice(0, COLUMNS)):
    from toolkits.training.parallel.quantized import Place

    return Place(tuple((count, COLUMNS) for count in ROWS), tuple(rows), columns)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 7, 8, 14, 16])
def test_columns_may_be_cut_anywhere(whole, kind, ranks, dtype):
    """Shares of 448, 224, 112, 64, 56, 32 and 28 columns: whole blocks, halves, and more."""
    matrices, numbers = whole[kind]
    expected, each = torch.cat(numbers[dtype]), COLUMNS // ranks
    for rank in range(ranks):
        columns = slice(rank * each, (rank + 1) * each)
        layer = layer_of(place_of(stacked_blocks(list(ROWS)), columns), matrices, kind)
        assert torch.equal(layer.weights(dtype), expected[:, columns])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_may_lie_interleaved_and_be_divided(whole, kind, ranks):
    """Query, key and value in four shares, as fused attention has them."""
    matrices, numbers = whole[kind]
    blocks = shared_blocks(tuple((rows,) for rows in ROWS), 4)
    each = len(blocks) // ranks
    for rank in range(ranks):
        own = blocks[rank * each : (rank + 1) * each]
        layer = layer_of(place_of(own), matrices, kind)
        expected = torch.cat([numbers[torch.float32][block.part][block.start : block.stop] for block in own])
        assert torch.equal(layer.weights(torch.float32), expected)


def test_any_rows_in_any_order(whole):
    matrices, numbers = whole["nf4"]
    rows = [RowBlock(2, 5, 24), RowBlock(0, 90, 96), RowBlock(0, 0, 1), RowBlock(1, 3, 4)]
    layer = layer_of(place_of(rows, slice(100, 260)), matrices, "nf4")
    expected = torch.cat([numbers[torch.bfloat16][each.part][each.start : each.stop, 100:260] for each in rows])
    assert torch.equal(layer.weights(torch.bfloat16), expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_product_and_its_gradient_are_those_of_the_numbers(whole, kind):
    from toolkits.training.parallel.quantized import _Product

    matrices, numbers = whole[kind]
    layer = layer_of(place_of(stacked_blocks(list(ROWS)), slice(32, 160)), matrices, kind)
    hidden = torch.randn(5, 3, 128, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda each: each):
        output = _Product.apply(hidden, layer, None)
    weight = torch.cat(numbers[torch.float32])[:, 32:160]
    gradient = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, hidden, gradient)
    assert torch.allclose(output, hidden @ weight.T, atol=1e-5) and torch.allclose(found, gradient @ weight, atol=1e-5)
    assert not kept, "neither the input nor the numbers are needed again"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_run_quantises_as_bitsandbytes_does_whole_matrices(dtype):
    """The run's own way, run of rows after run of rows, and the reference."""
    from bitsandbytes.functional import quantize_4bit

    from toolkits.training.quantize import BitsAndBytes

    weights = (0.02 * torch.randn(300, COLUMNS, generator=torch.Generator().manual_seed(6))).to(dtype)
    packed, state = quantize_4bit(weights, compress_statistics=True, quant_type="nf4")
    for kernels in (BitsAndBytes(), Reference(grid=True)):
        found = quantized(weights.split(77), "nf4", kernels)
        assert torch.equal(found.codes.flatten(), packed.flatten())
        assert torch.equal(found.scales.flatten(), state.absmax)
        assert torch.equal(found.nested, state.state2.absmax) and torch.equal(found.offset, state.offset)


def test_half_precision_casts_nothing_that_is_held(whole):
    """Float16Module does so to every float parameter and buffer; none is saved either."""
    matrices, numbers = whole["nf4"]
    layer = layer_of(place_of(stacked_blocks(list(ROWS))), matrices, "nf4").bfloat16()
    assert torch.equal(layer.weights(torch.float32), torch.cat(numbers[torch.float32]))
    assert not layer.state_dict() and not list(layer.parameters())
