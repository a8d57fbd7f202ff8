"""How many ranks this machine gets."""

import importlib.util
import os
from pathlib import Path

from ..foundation.errors import UsageError

# Without one of these no driver is loaded, and torch (seconds to import) need not be asked.
DRIVER_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def visible_gpus() -> int:
    """Return the number of GPUs that torch sees."""
    if not any(Path(node).exists() for node in DRIVER_NODES):
        return 0
    quieten_torch()
    import torch

    return torch.cuda.device_count()


def ranks_of_machine(model_parallel: int) -> int:
    """Return NPROC_PER_NODE if it is set, else a rank for every visible GPU, else `model_parallel` CPU ranks."""
    said = os.environ.get("NPROC_PER_NODE")
    if not said:
        return visible_gpus() or model_parallel
    if not said.isdecimal() or int(said) < 1:
        raise UsageError(f"NPROC_PER_NODE {said!r} must be a whole number of at least 1")
    return int(said)


def fp8_problem() -> str | None:
    """Return why this machine cannot train in fp8, or None."""
    said = "PR=fp8 needs a GPU of compute capability 8.9 (Ada, Hopper or newer) and Transformer Engine: "
    if not visible_gpus():
        return said + "this machine has no GPU; use bf16"
    import torch

    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        return said + f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}; use bf16"
    if importlib.util.find_spec("transformer_engine") is None:
        return said + "pip install 'temper-mcore[te]', or use bf16"
    return None


def quieten_torch() -> None:
    """Before torch is imported: a peer that goes away is ours to report, not a stack of C++ frames."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
