"""HuggingFace -> Megatron-core, streamed."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from toolkits.foundation.progress import Progress
from toolkits.foundation.publish import publish_directory, require_space

from .guards import explain_nonfinite, note_dtype, refuse_overlap
from .hf_as_mcore import HfAsMcore
from .hf_checkpoint import copy_sidecar_files
from .layout import dtype_named, is_finite
from .mcore_as_hf import McoreAsHf
from .mcore_directory import HF_FOLDER, RELEASE, TRACKER_FILE
from .mcore_writer import Chunk, write_step
from .plan import Plan, Step, config_dtype
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
    """Write the Megatron-core directory `dst` from the HuggingFace directory `src` and return the plan.

    `dtype` casts (float32, float16, bfloat16). `verify` reads the result again and compares bit for bit
    before it is published. Raises CheckpointError, UsageError or DiskError; `dst` is then as it was.
    """
    src, dst = Path(src), Path(dst)
    refuse_overlap(src, dst)
    weights = HfAsMcore(src, dtype=dtype)
    if dtype is None:
        note_dtype(config_dtype(weights.source.config), (tensor.dtype for tensor in weights.tensors.values()))
    chunks = list(_chunks(weights, allow_nonfinite))
    num_bytes = sum(chunk.num_bytes for chunk in chunks)
    require_space(dst, num_bytes)
    with publish_directory(dst, overwrite=overwrite) as temporary:
        with Progress("converting", num_bytes, unit="B") as progress:
            write_step(temporary / RELEASE, chunks, weights.plan.extra_states, advance=progress.advance)
        copy_sidecar_files(src, temporary / HF_FOLDER)
        (temporary / TRACKER_FILE).write_text(RELEASE)
        if verify:
            require_equal(weights.plan, weights.source, McoreAsHf(temporary), cast=dtype_named(dtype))
    return weights.plan


def _chunks(weights: HfAsMcore, allow_nonfinite: bool) -> Iterator[Chunk]:
    for step in weights.plan.steps:
        tensor = weights.tensors[step.key]
        lead = (1,) * len(step.index)
        yield Chunk(
            key=step.key,
            whole_shape=tensor.shape,
            offsets=step.index + (0,) * len(step.shape),
            shape=lead + step.shape,
            dtype=tensor.dtype,
            read=partial(weights.step if allow_nonfinite else partial(_finite_step, weights), step),
        )


def _finite_step(weights: HfAsMcore, step: Step) -> torch.Tensor:
    data = weights.step(step)
    if not is_finite(data):
        for part in step.parts:
            stored = weights.source.read(part.name)
            if not is_finite(stored.to(data.dtype)):
                explain_nonfinite(part.name, stored, data.dtype)
    return data
