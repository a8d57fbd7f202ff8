"""Megatron-core -> HuggingFace, streamed."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from toolkits.foundation.progress import Progress
from toolkits.foundation.publish import publish_directory, require_space

from .guards import explain_nonfinite, refuse_overlap
from .hf_as_mcore import HfAsMcore
from .hf_checkpoint import CONFIG_FILE, copy_sidecar_files, write_safetensors
from .layout import is_finite, name_of
from .mcore_as_hf import McoreAsHf
from .plan import Plan, config_dtype
from .verify import require_equal


def convert(
    src: Path,
    dst: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> Plan:
    """Write the HuggingFace directory `dst` from the Megatron-core directory (or step folder) `src`; return the plan.

    `dtype` casts (float32, float16, bfloat16). `verify` reads the result again and compares bit for bit
    before it is published. Raises CheckpointError, UsageError or DiskError; `dst` is then as it was.
    """
    src, dst = Path(src), Path(dst)
    refuse_overlap(src, dst)
    weights = McoreAsHf(src, dtype=dtype)
    tensors = {name: (weights.dtype(name), weights.shape(name)) for name in weights.plan.hf_tensors}
    num_bytes = sum(kind.itemsize * torch.Size(shape).numel() for kind, shape in tensors.values())
    require_space(dst, num_bytes)

    def read(name: str) -> torch.Tensor:
        tensor = weights.read(name)
        if not allow_nonfinite and not is_finite(tensor):
            explain_nonfinite(name, weights.stored(name), tensor.dtype)
        return tensor

    with publish_directory(dst, overwrite=overwrite) as temporary:
        with Progress("exporting", num_bytes, unit="B") as progress:
            write_safetensors(temporary, tensors, read, advance=progress.advance)
        copy_sidecar_files(weights.hf_folder, temporary)
        _say_dtype(temporary / CONFIG_FILE, weights.config, (kind for kind, _ in tensors.values()))
        if verify:
            require_equal(weights.plan, weights, HfAsMcore(temporary).source, cast=None)
    return weights.plan


def _say_dtype(path: Path, config: dict, kinds: Iterable[torch.dtype]) -> None:
    """Let config.json name the type that was written: loaders cast to what it says."""
    written = {name_of(kind) for kind in kinds}
    if len(written) == 1 and config_dtype(config) not in (None, *written):
        field = "dtype" if "dtype" in config else "torch_dtype"
        path.write_text(json.dumps({**config, field: written.pop()}, indent=2, ensure_ascii=False) + "\n")
