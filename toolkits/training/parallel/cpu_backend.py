"""Run megatron-core on CPU ranks: answers to the CUDA calls that it makes unconditionally.

Nothing here is imported when there is a GPU. Each answer has its reason beside it; megatron-core itself
is not edited, and this file and `mcore_patches.py` are the only places that replace somebody else's names.
"""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Event:
    """A CUDA event on a device where everything has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Stream:
    """A CUDA stream on a device that has only one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _Event:
        return _Event()


class _CudaMeansCpu(TorchFunctionMode):
    """Send tensors that are asked for on `cuda` to the CPU.

    The distributed-data-parallel buffers are allocated on `torch.cuda.current_device()`, and the optimizer
    recognises a parameter's precision by the name `torch.cuda.FloatTensor`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs.get("pin_memory"):  # needs a driver; it speeds up copies that do not happen
            kwargs = {**kwargs, "pin_memory": False}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def install() -> None:
    """Replace the CUDA entry points of this process; a second call does nothing."""
    cuda: Any = torch.cuda
    if cuda.Stream is _Stream:
        return
    # Called while process groups, buffers and the pipeline's receive tensors are made.
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *args: None
    cuda.synchronize = lambda *args: None
    cuda.empty_cache = lambda: None
    # Communication streams and their events.
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    # The random states that tensor parallelism keeps.
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.default_generators = (torch.default_generator,)
    # Moves to a device that is where the tensor is; pinned memory speeds up copies that do not happen.
    tensor, module = torch.Tensor, torch.nn.Module
    tensor.cuda = tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    module.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    # megatron-core compiles some functions of its experts: a CPU rank needs no C++ compiler, and its results none.
    torch.compiler.set_stance("force_eager")
    _keep_random_states_on_cpu()
    _CudaMeansCpu().__enter__()  # for the life of the process


def _keep_random_states_on_cpu() -> None:
    # They reach into CUDA's generators by device index.
    import megatron.core.tensor_parallel.random as rng

    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
