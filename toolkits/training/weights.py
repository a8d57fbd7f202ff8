"""Weights into the model of this rank, from a HuggingFace or a Megatron-core directory, at any layout."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling

from conversion.hf_as_mcore import HfAsMcore
from conversion.mcore_directory import is_weight
from conversion.safe_pickle import scan_directory

from ..foundation.errors import CheckpointError, raise_all
from .parallel.model import Chunks, sharded_state


def load_huggingface(chunks: Chunks, directory: Path) -> None:
    """Fill this rank's weights from a HuggingFace directory, reading only the slices it holds."""
    source = HfAsMcore(directory)
    state = sharded_state(chunks)
    apply_factories(state)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    unknown = sorted({tensor.key for tensor in tensors} - set(source.tensors))
    raise_all(CheckpointError, f"{directory} has nothing for", unknown)
    with torch.no_grad():
        for tensor in tensors:
            _fill(tensor, source)


def _fill(tensor: ShardedTensor, source: HfAsMcore) -> None:
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


def load_mcore(chunks: Chunks, step_folder: Path) -> None:
    """Fill this rank's weights from a torch_dist step folder.

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
    problems = [f"{key} is not in the checkpoint" for key in sorted(missing_there) if is_weight(key)]
    problems += [f"{key} has no place in the model" for key in sorted(missing_here) if is_weight(key)]
    raise_all(CheckpointError, str(step_folder), problems)
    # Keys were compared above; what may be absent here is only `_extra_state`.
    for chunk, name in zip(chunks, wanted, strict=True):
        tensors = {key: value for key, value in state[name].items() if torch.is_tensor(value)}
        chunk.load_state_dict(tensors, strict=False)
