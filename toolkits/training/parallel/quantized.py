"""megatron-core's linear layers with a frozen weight in NF4 or int8 (QLoRA, Dettmers et al., 2023).

A layer holds the codes of its rank's part of the fused weight. They become numbers when they are multiplied, in the
forward pass and again in the backward pass, and are forgotten at once. What is exact in bitsandbytes is so here: a
block of 64 columns is never cut. Where tensor parallelism cuts one, both ranks hold the whole block.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer

from conversion.plan import RowBlock
from conversion.quantized import BLOCK, NESTED_BLOCK, Format, Int8, Nf4, dynamic_values, int8_weights


@dataclass(frozen=True)
class Place:
    """What a layer holds on this rank of matrices that lie fused: their `rows`, one block under the other, and columns.

    `shapes` are those of the whole matrices, by part.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[RowBlock, ...]
    columns: slice

    @property
    def span(self) -> slice:
        """The columns, and before and behind them those of blocks that are cut."""
        return slice(self.columns.start // BLOCK * BLOCK, -(-self.columns.stop // BLOCK) * BLOCK)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return sum(block.rows for block in self.rows)

    @property
    def blocks_of_row(self) -> int:
        """Blocks in a row of a whole matrix."""
        return self.shapes[0][1] // BLOCK

    @property
    def block_starts(self) -> list[tuple[int, int]]:
        """The rows of each block of rows, behind the number of the block of columns that its row 0 here would have.

        Blocks are numbered row after row through the matrices, each of which begins with a multiple of 256.
        """
        found, top = [], 0
        for block in self.rows:
            before = sum(_num_nested(shape) for shape in self.shapes[: block.part]) * NESTED_BLOCK
            first = before + (block.start - top) * self.blocks_of_row + self.span.start // BLOCK
            found.append((first, block.rows))
            top += block.rows
        return found

    def runs(self, part: int) -> list[tuple[slice, slice]]:
        """Return the rows of a part: where they are here, and in the whole matrix."""
        found, top = [], 0
        for block in self.rows:
            if block.part == part:
                found.append((slice(top, top + block.rows), slice(block.start, block.stop)))
            top += block.rows
        return found


class QuantizedLinear(torch.nn.Module):
    """Mixed into a linear layer of megatron-core, of which it takes the weight away.

    All that it holds are buffers of integers that are not saved: Float16Module would cast those of floats.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    starts: torch.Tensor
    nested: torch.Tensor
    place: Place
    kind: Format

    @property
    def weight(self) -> torch.Tensor:
        """The codes, so that megatron-core finds a weight."""
        return self.codes

    def allocate(self, place: Place, kind: Format, device: torch.device) -> None:
        """Make room for what `fill` brings."""
        self.place, self.kind = place, kind
        rows, span = place.num_rows, place.span.stop - place.span.start
        if kind == "int8":
            columns = place.columns.stop - place.columns.start
            self._hold("codes", torch.empty(rows, columns, dtype=torch.int8, device=device))
            self._hold("scales", torch.empty(rows, dtype=torch.int32, device=device))
            return
        self._hold("codes", torch.empty(rows, span // 2, dtype=torch.uint8, device=device))
        self._hold("scales", torch.empty(rows, span // BLOCK, dtype=torch.uint8, device=device))
        self._hold("starts", torch.tensor(place.block_starts, dtype=torch.int32, device=device))
        nested = sum(_num_nested(shape) for shape in place.shapes)
        self._hold("nested", torch.empty(nested, 2, dtype=torch.int32, device=device))

    def _hold(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def fill(self, part: int, matrix: Nf4 | Int8) -> None:
        """Take this rank's share of a whole quantised matrix."""
        if isinstance(matrix, Int8):
            scales = self.scales.view(torch.float32)
            for here, there in self.place.runs(part):
                self.codes[here] = matrix.codes[there, self.place.columns].to(self.codes.device)
                scales[here] = matrix.scales[there].to(scales.device)
            return
        span, device = self.place.span, self.codes.device
        before = sum(_num_nested(shape) for shape in self.place.shapes[:part])
        pairs = torch.stack([matrix.nested, matrix.offset.expand_as(matrix.nested)], 1)
        self.nested.view(torch.float32)[before : before + len(pairs)] = pairs.to(device)
        for here, there in self.place.runs(part):
            self.codes[here] = matrix.codes[there, span.start // 2 : span.stop // 2].to(device)
            self.scales[here] = matrix.scales[there, span.start // BLOCK : span.stop // BLOCK].to(device)

    def weights(self, dtype: torch.dtype) -> torch.Tensor:
        """Return this rank's part of the weight [rows, columns] as numbers of `dtype`."""
        if self.kind == "int8":
            return int8_weights(self.codes, self.scales.view(torch.float32), dtype)
        rows, blocks = self.scales.shape
        pairs = self.nested.view(torch.float32)[self._block_numbers() // NESTED_BLOCK]
        absmax = _values_on(self.codes.device)[self.scales.int()].mul_(pairs[..., 0]).add_(pairs[..., 1])
        whole = _bitsandbytes().dequantize_4bit(
            self.codes.view(-1, 1), absmax.view(-1), BLOCK, "nf4", (rows, blocks * BLOCK), dtype
        )
        span, columns = self.place.span, self.place.columns
        return whole[:, columns.start - span.start : columns.stop - span.start]

    def _block_numbers(self) -> torch.Tensor:
        """Return the number of each block, int32 [rows, blocks], counted so that each matrix begins a nested one."""
        rows, blocks = self.scales.shape
        counting: Any = {"dtype": torch.int32, "device": self.codes.device}
        starts, counts = self.starts.unbind(1)
        first = torch.repeat_interleave(starts, counts, output_size=rows)
        first += torch.arange(rows, **counting) * self.place.blocks_of_row
        return first[:, None] + torch.arange(blocks, **counting)

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **rest: Any,
    ) -> torch.Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        output = _Product.apply(input, self, tp_group if allreduce_dgrad else None)
        return output if bias is None else output + bias


class _Product(torch.autograd.Function):
    """[.., columns] x weight^T of a layer. The gradient is that of the input, summed over the ranks of a group.

    Nothing is saved: the codes are the layer's, and nobody changes them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, layer: QuantizedLinear, group: Any) -> torch.Tensor:
        ctx.layer, ctx.group = layer, group
        return hidden.matmul(layer.weights(hidden.dtype).t())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        before = gradient.matmul(ctx.layer.weights(gradient.dtype))
        if ctx.group is not None:
            torch.distributed.all_reduce(before, group=ctx.group)
        return before, None, None


_CLASSES: dict[type, type] = {}  # by the class without a weight in numbers


class QuantizedLayer(TransformerLayer):
    """megatron-core's layer without the weights of its linear layers, which `QuantizedLinear.allocate` replaces.

    They are let go of layer after layer while a model is built, so that those of one layer exist at a time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                del module.weight
                module.__class__ = _quantized_class(type(module))  # specs of latent attention take no other class


def _quantized_class(kind: type) -> type:
    return _CLASSES.setdefault(kind, type(f"Quantized{kind.__name__}", (QuantizedLinear, kind), {}))


def _num_nested(shape: tuple[int, int]) -> int:
    rows, columns = shape
    return -(-rows * (columns // BLOCK) // NESTED_BLOCK)


@cache
def _values_on(device: torch.device) -> torch.Tensor:
    return dynamic_values().to(device)


@cache
def _bitsandbytes() -> Any:
    import bitsandbytes  # noqa: F401 - registers the operations

    return torch.ops.bitsandbytes
