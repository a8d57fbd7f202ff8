"""Process groups, devices and seeds: a rank comes up, and the only collectives that are not megatron-core's."""

import contextlib
import datetime
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed

from ..layout import Layout
from . import mcore_patches

STAGE_SEED = 100
TIMEOUT = datetime.timedelta(minutes=30)

_brought_up: Counter[str] = Counter()  # groups at each port


@contextlib.contextmanager
def process_groups(layout: Layout, *, seed: int) -> Iterator[None]:
    """Bring up torch.distributed and megatron-core's groups for the block, on GPUs or on CPU ranks."""
    prepare_process()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # One store serves all groups that the same ranks bring up one after the other: each under a name of its own.
    store, this, world = next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))
    port = os.environ["MASTER_PORT"]
    names = torch.distributed.PrefixStore(f"groups-{_brought_up[port]}", store)
    _brought_up[port] += 1
    torch.distributed.init_process_group(backend, store=names, rank=this, world_size=world, timeout=TIMEOUT)
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor or None,
    )
    # Random weights: equal on the ranks that share a layer, different from one pipeline stage to the next.
    seed += STAGE_SEED * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def prepare_process() -> None:
    """Choose this process's device and make megatron-core ready for it."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        from . import cpu_backend

        cpu_backend.install()
    mcore_patches.install()


def rank() -> int:
    """Return this process's global rank."""
    return torch.distributed.get_rank()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Return the element-wise sum of `values` over all ranks; a sum over one contributor is exact."""
    tensor = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def gather(value: Any) -> list[Any]:
    """Return the small `value` of every rank, in the order of ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def context_rank() -> int:
    """Return which share of each row's tokens this rank holds."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_rank()


def speaks_for_its_tokens() -> bool:
    """Say whether this rank is the one that reports the loss of the tokens it shares with others."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
