"""How many ranks this machine gets."""

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


def quieten_torch() -> None:
    """Before torch is imported: a peer that goes away is ours to report, not a stack of C++ frames."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
