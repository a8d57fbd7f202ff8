"""Adapters on this rank's part of the model: attached, given their first values, and what is saved of them.

They are attached when the base's weights are in place. From then on everything else is frozen, and what the
model saves is what is trained: a step folder holds the adapter, and the base by reference.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from conversion.adapters import LinearPart, linear_parts
from conversion.plan import REWARD_HEAD, Plan, Step

from .lora import Lora
from .parallel.adapter import LoraAdapter, Matrices, PartOfLinear, stand_beside
from .parallel.model import Chunks, PaddedVocabularyGPT
from .weights import layer_of, load_slices

OUTPUT = "output_layer"  # megatron-core's name of whatever the model ends with


def attach(chunks: Chunks, lora: Lora, plan: Plan, *, seed: int) -> None:
    """Freeze the model, put its adapters beside their layers, and give them their first values."""
    parts: dict[tuple[str, tuple[int, ...]], list[LinearPart]] = {}
    for part in linear_parts(plan).values():
        parts.setdefault((part.step.key, part.step.index), []).append(part)
    adapted = [group for group in parts.values() if any(part.module in lora.modules for part in group)]
    for chunk in chunks:
        chunk.requires_grad_(False)
        for weight in _whole_weights(chunk, lora):
            weight.requires_grad_(True)
        for group in adapted:
            layer = layer_of(chunk, group[0].step)
            if layer is not None:
                stand_beside(layer, _adapter(layer, group, lora))
        if chunk.pre_process:  # what is computed again in the backward pass needs an input with a gradient
            chunk.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
        chunk.saved = adapter_state
    with torch.no_grad():
        for chunk in chunks:
            for _, adapter in _adapters(chunk):
                for matrices in adapter.pairs:
                    _fill(matrices, adapter, lora, seed)
    if lora.origin is not None and lora.whole:
        load_slices(chunks, _WholeWeights(lora))


@contextlib.contextmanager
def adapters_off(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let the model be its base while the block runs."""
    adapters = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LoraAdapter)]
    for adapter in adapters:
        adapter.is_off = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_off = False


def _adapter(layer: Any, group: list[LinearPart], lora: Lora) -> LoraAdapter:
    step = group[0].step
    divisor = layer.tp_group.size() if isinstance(layer, ColumnParallelLinear) else 1
    parts = [
        PartOfLinear(
            part.module,
            tuple(rows // divisor for rows in part.step.sections(part.part)),
            lora.config.rank_of(part.module) if part.module in lora.modules else 0,
            lora.config.scale_of(part.module),
        )
        for part in group
    ]
    shares = max(1, step.shares // divisor)
    return LoraAdapter(layer, parts, shares=shares, dropout=lora.config.dropout)


def _adapters(chunk: torch.nn.Module) -> Iterator[tuple[str, LoraAdapter]]:
    return ((name, module) for name, module in chunk.named_modules() if isinstance(module, LoraAdapter))


def _whole_weights(chunk: PaddedVocabularyGPT, lora: Lora) -> Iterator[torch.Tensor]:
    keys = {step.key for step in lora.whole.values()}
    if REWARD_HEAD in keys:
        keys.add(f"{OUTPUT}.weight")
    return (weight for name, weight in chunk.named_parameters() if name in keys)


def _fill(matrices: Matrices, adapter: LoraAdapter, lora: Lora, seed: int) -> None:
    """Give A and B the values of the adapter that the run starts from, or A random ones and B zero.

    As PEFT does it, A is uniform within 1 / sqrt(columns), which is Kaiming's rule with a = sqrt(5). The values
    depend on the seed and the layer's name, not on the layout.
    """
    ranks, mine = adapter.group.size(), adapter.group.rank()
    of_rows, of_columns = (ranks, 1) if adapter.divides_outputs else (1, ranks)
    if lora.origin is not None:
        a, b = lora.origin.matrices(matrices.part.module)
    else:
        rank, columns = matrices.a.shape
        a = _random_a(matrices.part.module, (rank, columns * of_columns), seed)
        b = torch.zeros(sum(matrices.part.sections) * of_rows, rank)
    matrices.a.copy_(a.chunk(of_columns, 1)[mine % of_columns])
    sections = b.split([rows * of_rows for rows in matrices.part.sections])
    for whole, section in zip(sections, matrices.b, strict=True):
        section.copy_(whole.chunk(of_rows)[mine % of_rows])


def _random_a(module: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class _WholeWeights:
    """The weights of an adapter that were trained whole, as `weights.load_slices` reads them."""

    lora: Lora

    @property
    def tensors(self) -> dict[str, Step]:
        assert self.lora.origin is not None
        return {step.key: step for step in self.lora.origin.whole.values()}

    def read(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        assert self.lora.origin is not None
        module = next(module for module, step in self.lora.whole.items() if step.key == key)
        return self.lora.origin.whole_weight(module)[start[0] : start[0] + shape[0]]


def adapter_state(chunk: PaddedVocabularyGPT) -> dict[str, Any]:
    """Return the sharded state of what is trained: {parameter: its place in the HuggingFace layer's matrix}."""
    state: dict[str, Any] = {}
    for module in ("embedding.word_embeddings", OUTPUT):
        layer = _submodule(chunk, module)
        if layer is not None and layer.weight is not None and layer.weight.requires_grad:
            whole = layer.sharded_state_dict(f"{module}.", metadata=ensure_metadata_has_dp_cp_group({}))
            state |= {name: tensor for name, tensor in whole.items() if name.endswith(".weight")}
    for name, adapter in _adapters(chunk):
        for matrices in adapter.pairs:
            key, (of_a, *of_b) = matrices.part.module, (f"{name}.{own}" for own in matrices.names)
            state[of_a] = _sharded(f"{key}.lora_A", matrices.a, adapter, axis=1)
            for place, (own, section) in enumerate(zip(of_b, matrices.b, strict=True)):
                state[own] = _sharded(f"{key}.lora_B.{place}", section, adapter, axis=0)
    return state


def _submodule(chunk: torch.nn.Module, name: str) -> Any:
    try:
        return chunk.get_submodule(name)
    except AttributeError:
        return None  # another pipeline stage has it


def _sharded(key: str, matrix: torch.nn.Parameter, adapter: LoraAdapter, *, axis: int) -> ShardedTensor:
    """Return a matrix's place: a part along `axis` where tensor parallelism divides that side of the layer."""
    rank, ranks = adapter.group.rank(), adapter.group.size()
    divided = (axis == 0) == adapter.divides_outputs
    if adapter.is_expert:
        replica = parallel_state.get_expert_data_parallel_rank()
    else:
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    offsets = [(axis, rank, ranks)] if divided else []
    return ShardedTensor.from_rank_offsets(key, matrix, *offsets, replica_id=(0, 0 if divided else rank, replica))
