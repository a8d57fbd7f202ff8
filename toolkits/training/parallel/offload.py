"""Activations wait for the backward pass in CPU memory (AC=offload)."""

import torch
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 1 << 20  # bytes; below, the copy costs more than the memory is worth


def saved_on_cpu(model: torch.nn.Module) -> saved_tensors_hooks:
    """Return a context in which what autograd saves on a GPU moves to pinned CPU memory until it is needed.

    Weights stay: they are there anyway. Without a GPU nothing moves.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        small = tensor.nbytes < SMALLEST or not tensor.is_cuda
        if small or tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return tensor.device, copy.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
