"""Weights into the model of this rank, from a HuggingFace or a Megatron-core directory, at any layout."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling

from conversion.hf_as_mcore import HfAsMcore
from conversion.mcore_directory import is_weight
from conversion.plan import MERGED_LAYERS, Step
from conversion.safe_pickle import scan_directory

from ..foundation.errors import CheckpointError, raise_all
from .parallel.model import Chunks, PaddedVocabularyGPT, sharded_state


class Slices(Protocol):
    """Tensors by key, each with a `shape`, of which slices can be read."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The tensors by their Megatron-core keys."""

    def read(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Return the slice of `shape` that begins at `start`."""


def load_huggingface(chunks: Chunks, directory: Path, *, elsewhere: Collection[str] = ()) -> None:
    """Fill this rank's weights from a HuggingFace directory, reading only the slices it holds.

    Those of the keys `elsewhere` come another way.
    """
    source = HfAsMcore(directory)
    tensors = _sharded_tensors(chunks)
    unknown = sorted({tensor.key for tensor in tensors} - set(source.tensors) - set(elsewhere))
    raise_all(CheckpointError, f"{directory} has nothing for", unknown)
    load_slices(chunks, source)


def load_slices(chunks: Chunks, source: Slices) -> None:
    """Fill those of this rank's weights that `source` has, reading only the slices that the rank holds."""
    with torch.no_grad():
        for tensor in _sharded_tensors(chunks):
            if tensor.key in source.tensors:
                _fill(tensor, source)


def _sharded_tensors(chunks: Chunks) -> list[ShardedTensor]:
    state = sharded_state(chunks)
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def _fill(tensor: ShardedTensor, source: Slices) -> None:
    full = source.tensors[tensor.key].shape
    local = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    # Only the vocabulary is padded in the model: rows that the checkpoint does not have stay zero.
    shape = tuple(
        max(0, min(size, end - start)) for size, end, start in zip(local, full, tensor.global_offset, strict=True)
    )
    if shape != local:
        tensor.data.zero_()
    if 0 in shape:
        return
    values = source.read(tensor.key, tuple(tensor.global_offset), shape).reshape(shape[tensor.prepend_axis_num :])
    tensor.data[: values.shape[0]].copy_(values)


def layer_of(chunk: PaddedVocabularyGPT, step: Step) -> Any:
    """Return the linear layer that a step's weight belongs to; None when another rank holds it."""
    assert step.layer is not None
    layer = next((each for each in chunk.decoder.layers if each.layer_number == step.layer + 1), None)
    path = step.name.removeprefix(MERGED_LAYERS).removesuffix(".weight")
    if layer is None or ".experts.experts." not in step.key:
        return layer and layer.get_submodule(path)
    experts = layer.get_submodule(path.partition(".experts.experts.")[0] + ".experts")
    count = len(experts.local_experts)
    number = step.index[-1] - parallel_state.get_expert_model_parallel_rank() * count
    if not 0 <= number < count:
        return None
    return experts.local_experts[number].get_submodule(path.rpartition(".")[2])


def load_mcore(chunks: Chunks, step_folder: Path, *, elsewhere: Collection[str] = ()) -> None:
    """Fill this rank's weights from a torch_dist step folder; those of the keys `elsewhere` come another way.

    Raises CheckpointError with every key that only one side has. Nothing is unpickled before the scan.
    """
    scan_directory(step_folder)
    wanted = sharded_state(chunks)
    try:
        state, missing_here, missing_there = dist_checkpointing.load(
            wanted, str(step_folder), strict=StrictHandling.RETURN_ALL
        )
    except CheckpointingException as error:
        raise CheckpointError(f"{step_folder} does not fit its config.json: {error}") from error
    missing_here, missing_there = (missing - set(elsewhere) for missing in (missing_here, missing_there))
    problems = [f"{key} is not in the checkpoint" for key in sorted(missing_there) if is_weight(key)]
    problems += [f"{key} has no place in the model" for key in sorted(missing_here) if is_weight(key)]
    raise_all(CheckpointError, str(step_folder), problems)
    # Keys were compared above; what may be absent here is only `_extra_state`.
    for chunk, name in zip(chunks, wanted, strict=True):
        tensors = {key: value for key, value in state[name].items() if torch.is_tensor(value)}
        chunk.load_state_dict(tensors, strict=False)
