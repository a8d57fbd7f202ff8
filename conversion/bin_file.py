"""One `pytorch_model*.bin`: a state dict as torch.save writes it, read as places in the file. Nothing in it runs."""

from pathlib import Path

from toolkits.foundation.errors import CheckpointError

from .mapped_file import MappedFile
from .safe_pickle import Archive
from .safetensors_file import NAMES, StoredTensor


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; raise CheckpointError when it is unsafe, damaged or no state dict."""
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; download or copy it again")
    content = MappedFile(path)
    stored = {}
    for name, saved in Archive(content, 0, len(content), source=str(path)).tensors().items():
        last = sum((size - 1) * step for size, step in zip(saved.shape, saved.stride, strict=True))
        if 0 not in saved.shape and saved.offset + last >= saved.count:
            raise CheckpointError(f"{path} is damaged: {name} lies beyond the end of its storage")
        dtype = NAMES.get(saved.dtype, str(saved.dtype).removeprefix("torch."))
        start = saved.start + saved.offset * saved.dtype.itemsize
        stored[name] = StoredTensor(path.name, dtype, saved.shape, start, saved.stride)
    return stored
