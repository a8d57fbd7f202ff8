"""The frozen matrices of a model's layers in NF4 or int8: read one by one, quantised, and cut for this rank."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear

from conversion.filling import row_runs
from conversion.hf_checkpoint import HfCheckpoint
from conversion.mcore_as_hf import McoreAsHf
from conversion.plan import Plan, RowBlock, Step
from conversion.quantized import Format, quantized

from ..foundation.errors import MachineError
from .parallel.model import Chunks
from .parallel.quantized import Place, QuantizedLinear
from .sources import ModelSource
from .weights import layer_of


class Matrices(Protocol):
    """A checkpoint's tensors by their HuggingFace names."""

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, possibly as a view of its file."""


class BitsAndBytes:
    """The kernels of bitsandbytes, on the device that the rows are on; see `conversion.quantized.Kernels`."""

    def nf4(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes uint8 [rows, columns / 2] and the largest of each block fp32 [rows, columns / 64]."""
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(rows.contiguous(), quant_type="nf4")
        return codes.view(len(rows), -1), state.absmax.view(len(rows), -1)

    def dynamic(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes uint8 of fp32 values [n], and the largest of every 256 of them."""
        from bitsandbytes.functional import quantize_blockwise

        codes, state = quantize_blockwise(values, blocksize=256)
        return codes, state.absmax


def require_bitsandbytes() -> None:
    """Raise MachineError when bitsandbytes is not there."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MachineError(
            f"--quantize nf4 needs bitsandbytes ({error}): pip install 'temper-mcore[qlora]', or --quantize int8"
        ) from error


def matrices_of(source: ModelSource) -> Matrices:
    """Return the matrices of the checkpoint that a run starts from."""
    if source.hf_weights is not None:
        return HfCheckpoint(source.hf_weights)
    assert source.mcore_weights is not None, "adapters have a base"
    return McoreAsHf(source.mcore_weights)


def allocate(chunks: Chunks, plan: Plan, kind: Format) -> None:
    """Give every linear layer of this rank the room that its quantised weight needs."""
    for step, layer in _layers(chunks, plan):
        layer.allocate(_place(layer, step), kind, _device())


def load(chunks: Chunks, plan: Plan, matrices: Matrices) -> None:
    """Fill the layers of this rank, matrix after matrix: of the numbers, those of one are in memory at a time.

    Ranks that divide a matrix each quantise the whole of it.
    """
    kernels = BitsAndBytes()
    for step, layer in _layers(chunks, plan):
        for number, part in enumerate(step.parts):
            matrix = quantized(_runs(matrices.read(part.name)), layer.kind, kernels, dtype=layer.config.params_dtype)
            layer.fill(number, matrix)


def _layers(chunks: Chunks, plan: Plan) -> Iterator[tuple[Step, Any]]:
    for chunk in chunks:
        for step in plan.steps:
            if step.is_linear and (layer := layer_of(chunk, step)) is not None:
                assert isinstance(layer, QuantizedLinear), step.key
                yield step, layer


def _runs(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    for start, stop in row_runs(tuple(matrix.shape), matrix.dtype.itemsize):
        yield matrix[start:stop].to(_device())


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _place(layer: Any, step: Step) -> Place:
    """Return what a rank holds of a step's matrices."""
    ranks, rank = layer.tp_group.size(), layer.tp_group.rank()
    shapes = tuple((part.shape[0], part.shape[1]) for part in step.parts)
    columns = step.shape[1]
    if isinstance(layer, ColumnParallelLinear):
        place = Place(shapes, tuple(_held_rows(step, ranks=ranks, rank=rank)), slice(0, columns))
        assert place.num_rows == layer.output_size_per_partition, step.key
        return place
    each = columns // ranks
    assert each == layer.input_size_per_partition, step.key
    return Place(shapes, step.blocks, slice(rank * each, (rank + 1) * each))


def _held_rows(step: Step, *, ranks: int, rank: int) -> Iterator[RowBlock]:
    """Yield the rows of a rank: its shares where the matrices lie interleaved, else its piece of each section."""
    if step.shares > 1:
        each = len(step.blocks) // ranks
        yield from step.blocks[rank * each : (rank + 1) * each]
        return
    for part in range(len(step.parts)):
        top = 0
        for rows in step.sections(part):
            each = rows // ranks
            yield RowBlock(part, top + rank * each, top + (rank + 1) * each)
            top += rows
