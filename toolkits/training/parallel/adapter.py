"""Low-rank adapters beside megatron-core's linear layers (Hu et al., 2021).

A fused layer stands for several HuggingFace layers, and each of them has matrices of its own. With tensor
parallelism the side of the layer that is divided is divided in its adapter too: the rows of B where the layer
divides its outputs, the columns of A where it divides its inputs. What travels between ranks is `rank` numbers
a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch.nn.functional import dropout, linear


@dataclass(frozen=True)
class PartOfLinear:
    """A HuggingFace layer inside a linear layer, on this rank.

    `sections` are the rows of the tensors that lie under each other in it, such as query, key and value; `rank` 0:
    it has no adapter.
    """

    module: str
    sections: tuple[int, ...]
    rank: int
    scale: float


@dataclass(frozen=True)
class Matrices:
    """A [rank, columns] and B, in sections [rows, rank], of one HuggingFace layer, as this rank holds them.

    `names` are those of A and of B's sections in the adapter.
    """

    part: PartOfLinear
    names: tuple[str, ...]
    a: torch.nn.Parameter
    b: tuple[torch.nn.Parameter, ...]


class LoraAdapter(torch.nn.Module):
    """What is added to the output of the linear layer whose child it is.

    The layer's output rows are cut into `shares`; of each, the shares of all sections lie under each other.
    """

    group: torch.distributed.ProcessGroup
    is_off = False  # for a pass of the base alone

    def __init__(self, layer: Any, parts: list[PartOfLinear], *, shares: int, dropout: float) -> None:
        super().__init__()
        self.parts, self.shares, self.dropout = parts, shares, dropout
        self.divides_outputs = isinstance(layer, ColumnParallelLinear)
        assert not (self.divides_outputs and layer.gather_output)
        self.is_expert, self.group = layer.is_expert, layer.tp_group
        self.sequence = layer.sequence_parallel and not self.is_expert
        # All parameters are its own, not those of modules inside it: megatron-core waits for the weights that it
        # gathers where a module that owns some is called.
        self._names = [
            (f"a{number}", *(f"b{number}_{at}" for at in range(len(part.sections)))) if part.rank else ()
            for number, part in enumerate(parts)
        ]
        columns = layer.input_size if self.divides_outputs else layer.input_size_per_partition
        like = {"dtype": layer.config.params_dtype, "device": layer.weight.device}
        for part, names in zip(parts, self._names, strict=True):
            shapes = [(part.rank, columns), *((rows, part.rank) for rows in part.sections)]
            for name, shape in zip(names, shapes, strict=bool(names)):
                self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, **like)))
        for matrices in self.pairs:
            self._mark(matrices, expert_parallel=self.is_expert and layer.expert_parallel)

    @property
    def pairs(self) -> Iterator[Matrices]:
        """The matrices of the parts that have an adapter."""
        for part, names in zip(self.parts, self._names, strict=True):
            if names:
                a, *b = (self.get_parameter(name) for name in names)
                yield Matrices(part, names, a, tuple(b))

    def _mark(self, matrices: Any, *, expert_parallel: bool) -> None:
        """Tell megatron-core's gradient reductions and norm which of these are divided and which repeated."""
        tokens_divided = self.sequence or (self.is_expert and self.group.size() > 1)
        for matrix in (matrices.a, *matrices.b):
            divided = (matrix is not matrices.a) == self.divides_outputs
            matrix.allreduce = not expert_parallel
            matrix.partition_dim, matrix.partition_stride = int(matrix is matrices.a), 1
            # Ranks that share no expert hold different ones: each counts in the norm.
            matrix.tensor_model_parallel = divided or (self.is_expert and self.group.size() == 1)
            # A repeated matrix whose gradient on each rank is a part of the sum.
            matrix.sequence_parallel = not divided and tokens_divided

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [.., rows] for the layer's input [.., columns], both as the layer has them on this rank."""
        inner = self._inner(self._dropped(hidden))
        done, outputs = 0, []
        pairs = self.pairs
        for part in self.parts:
            if not part.rank:
                outputs += [hidden.new_zeros(1).expand(*inner.shape[:-1], rows) for rows in part.sections]
                continue
            own = inner[..., done : done + part.rank] * part.scale
            outputs += [linear(own, b) for b in next(pairs).b]
            done += part.rank
        output = outputs[0]
        if len(outputs) > 1:
            output = torch.cat([rows.unflatten(-1, (self.shares, -1)) for rows in outputs], -1).flatten(-2)
        return output

    def _inner(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return A x of all matrices [.., ranks], summed over what tensor parallelism divides."""
        inputs = [matrices.a for matrices in self.pairs]
        inner = linear(hidden, inputs[0] if len(inputs) == 1 else torch.cat(inputs))
        if self.is_expert or self.group.size() == 1:
            return inner  # what an expert's ranks hold of its tokens is summed behind it
        if self.divides_outputs and self.sequence:
            return gather_from_sequence_parallel_region(inner, group=self.group)
        if self.divides_outputs:
            return copy_to_tensor_model_parallel_region(inner, group=self.group)
        if self.sequence:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self.group)
        return reduce_from_tensor_model_parallel_region(inner, group=self.group)

    def _dropped(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.dropout or not self.training:
            return hidden
        if self.divides_outputs and not self.sequence:  # the same input on all ranks: the same elements
            return dropout(hidden, self.dropout)
        with get_cuda_rng_tracker().fork():
            return dropout(hidden, self.dropout)


def stand_beside(layer: torch.nn.Module, adapter: LoraAdapter) -> None:
    """Let `layer`, a linear layer of megatron-core, add what `adapter` gives to its output from now on.

    Where our own class of layer does something to its columns `behind` the product, so it does to what is added.
    """
    layer.add_module("adapter", adapter)
    layer.register_forward_hook(_add)


def _add(
    layer: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if layer.adapter.is_off:
        return outputs
    output, bias = outputs
    more = layer.adapter(inputs[0])
    return output + (layer.behind(more) if hasattr(layer, "behind") else more), bias
