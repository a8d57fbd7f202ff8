"""Weights into the model, and the run's state onto disk: a step folder is complete or it is not there."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer

from conversion.hf_as_mcore import HfAsMcore
from conversion.safe_pickle import scan_directory

from ..foundation.errors import CheckpointError, raise_all
from ..foundation.publish import publish_directory, temporary_of, write_text
from .parallel.model import PaddedVocabularyGPT
from .parallel.world import rank

TRACKER = "latest_checkpointed_iteration.txt"
# What a checkpoint may hold beyond the model: another run's optimizer and state, Transformer Engine's scales.
NOT_THE_MODEL = ("optimizer", "rng_state", "rerun_state_machine", "opt_param_scheduler")


def load_huggingface(model: PaddedVocabularyGPT, directory: Path) -> None:
    """Fill this rank's weights from a HuggingFace directory, reading only the slices it holds."""
    source = HfAsMcore(directory)
    state = model.sharded_state_dict()
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


def load_mcore(model: PaddedVocabularyGPT, step_folder: Path) -> None:
    """Fill this rank's weights from a torch_dist step folder, at any layout.

    Raises CheckpointError with every key that only one side has. Nothing is unpickled before the scan.
    """
    scan_directory(step_folder)
    try:
        state, missing_here, missing_there = dist_checkpointing.load(
            model.sharded_state_dict(), str(step_folder), strict=StrictHandling.RETURN_ALL
        )
    except CheckpointingException as error:
        raise CheckpointError(f"{step_folder} does not fit its config.json: {error}") from error
    problems = [f"{key} is not in the checkpoint" for key in sorted(missing_there) if "_extra_state" not in key]
    problems += [f"{key} has no place in the model" for key in sorted(missing_here) if not _expected_extra(key)]
    raise_all(CheckpointError, str(step_folder), problems)
    # Keys were compared above; what may be absent here is only `_extra_state`.
    model.load_state_dict({name: value for name, value in state.items() if torch.is_tensor(value)}, strict=False)


def _expected_extra(key: str) -> bool:
    return "_extra_state" in key or key.startswith(NOT_THE_MODEL)


def save_step(
    folder: Path,
    step: int,
    *,
    model: PaddedVocabularyGPT,
    optimizer: MegatronOptimizer,
    distributed: bool,
    keep_last: int,
) -> Path:
    """Write `folder/iter_NNNNNNN` with model and optimizer, then let go of steps older than `keep_last`.

    All ranks call it; the folder appears under its name only when every byte is on disk.
    """
    target = folder / f"iter_{step:07d}"
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(publish_directory(target))
        torch.distributed.barrier()
        sharding = {"distrib_optim_sharding_type": "dp_reshardable"} if distributed else {}
        state: dict[str, Any] = dict(model.sharded_state_dict())
        state["optimizer"] = optimizer.sharded_state_dict(model.sharded_state_dict(), metadata=sharding)
        _exact_vocabulary(state, model.real_vocab_size)
        state["iteration"] = step
        dist_checkpointing.save(state, str(temporary_of(target)), content_metadata=sharding)
        torch.distributed.barrier()
    if rank() == 0:
        write_text(folder / TRACKER, str(step))
        for old in sorted(folder.glob("iter_*"))[:-keep_last]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return target


def _exact_vocabulary(state: dict[str, Any], rows: int) -> None:
    """Leave the rows that only pad the vocabulary out of the embedding and the head, in place.

    So a checkpoint has exactly config.vocab_size rows and knows no TP. The optimizer's entries keep the
    padding: they belong to the layout that wrote them.
    """
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensor = state.get(name)
        if tensor is None or tensor.global_shape[0] == rows:
            continue
        kept = max(0, min(tensor.local_shape[0], rows - tensor.global_offset[0]))
        data = tensor.data.detach()[:kept]
        state[name] = replace(
            tensor,
            data=data,
            local_shape=tuple(data.shape),
            global_shape=(rows, *tensor.global_shape[1:]),
            axis_fragmentations=None,  # uneven: the last rank holds fewer rows
        )
