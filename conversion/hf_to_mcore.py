"""HuggingFace -> Megatron-core, streamed."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from toolkits.foundation.publish import temporary_of

from .guards import explain_nonfinite, note_dtype, refuse_overlap
from .hf_as_mcore import HfAsMcore
from .hf_checkpoint import CONFIG_FILE, copy_sidecar_files
from .layout import is_finite
from .mapped_file import MappedFolder
from .mcore_as_hf import McoreAsHf
from .mcore_directory import HF_FOLDER, RELEASE, TRACKER_FILE
from .mcore_writer import Chunk, Place, lay_out
from .options import Options
from .output import publish_output, state_of
from .plan import Plan, Step
from .read_back import differences
from .recorded import SourceRecord, source_record
from .report import Story, sha256_of, write_report
from .safe_pickle import Archive
from .settings import config_dtype


def convert(src: Path, dst: Path, **choices: Any) -> Plan:
    """Write the Megatron-core directory `dst` from the HuggingFace directory `src` and return the plan.

    `choices` are `Options`. Raises CheckpointError, UsageError, DiskError or InterruptedRun; `dst` is then as it was.
    """
    src, dst, options = Path(src), Path(dst), Options(**choices)
    refuse_overlap(src, dst)
    weights = HfAsMcore(src, dtype=options.dtype, dequantize=options.dequantize)
    source, plan = weights.source, weights.plan
    record = source_record(src, plan) if options.verify else SourceRecord()
    kinds = [tensor.dtype for tensor in weights.tensors.values()]
    notes = note_dtype(config_dtype(source.config), kinds) if options.dtype is None else []
    step_layout = lay_out(list(_chunks(weights, record, temporary_of(dst) / RELEASE, options)), plan.extra_states)

    def finish(temporary: Path, hashes: dict[str, str]) -> None:
        step_layout.finish(temporary / RELEASE)
        copy_sidecar_files(src, temporary / HF_FOLDER)
        if options.dequantize:
            (temporary / HF_FOLDER / CONFIG_FILE).write_text(json.dumps(source.config, indent=2, ensure_ascii=False))
        (temporary / TRACKER_FILE).write_text(RELEASE)
        if options.verify:
            McoreAsHf(temporary)  # accounts for every tensor
            parts = {name: step.parts[number].name for name, (step, number) in plan.hf_tensors.items()}
            record.require((name, hashes[parts[name]]) for name in record.said if not _casts(weights, name))
        left_out = source.tensors.keys() - plan.hf_tensors.keys()
        story = Story("hf2mcore", src, options.verify, cast=options.dtype, notes=notes, left_out=sorted(left_out))
        write_report(temporary, plan, story, hashes=hashes)

    facts = {"source": str(src.resolve()), "files of the source": state_of(source.files)}
    files = [file.inside(RELEASE) for file in step_layout.files]
    publish_output(dst, files, options, facts=facts, label="converting", finish=finish)
    return plan


def _chunks(weights: HfAsMcore, record: SourceRecord, written: Path, options: Options) -> Iterator[Chunk]:
    files = MappedFolder(written)
    for step in weights.plan.steps:
        tensor = weights.tensors[step.key]
        yield Chunk(
            key=step.key,
            whole_shape=tensor.shape,
            offsets=step.index + (0,) * len(step.shape),
            shape=(1,) * len(step.index) + step.shape,
            dtype=tensor.dtype,
            slices=partial(weights.slices if options.allow_nonfinite else partial(_finite, weights), step),
            check=partial(_check, weights, record, files, step) if options.verify else None,
            hashes=partial(_hashes, weights, step),
        )


def _finite(weights: HfAsMcore, step: Step) -> Iterator[torch.Tensor]:
    for rows in weights.slices(step):
        if not is_finite(rows):
            for part in step.parts:
                stored = weights.source.read(part.name)
                if not is_finite(stored.to(rows.dtype)):
                    explain_nonfinite(part.name, stored, rows.dtype)
        yield rows


def _hashes(weights: HfAsMcore, step: Step) -> dict[str, str]:
    """Return the sha256 of each part in the type that it is written in: what is written is compared with that."""
    dtype = weights.tensors[step.key].dtype
    return {part.name: sha256_of(weights.source.read(part.name), dtype) for part in step.parts}


def _casts(weights: HfAsMcore, name: str) -> bool:
    """Whether a tensor is written in another type than it is stored in, and so with another hash."""
    step, _ = weights.plan.hf_tensors[name]
    return weights.source.dtype(name) != weights.tensors[step.key].dtype


def _check(weights: HfAsMcore, record: SourceRecord, files: MappedFolder, step: Step, place: Place) -> list[str]:
    """Return what of a step, read where it was written, is not what its source says."""
    source = f"{files.folder / place.file} ({step.key})"
    written = Archive(files.file(place.file), place.start, place.length, source=source).tensor().reshape(step.shape)
    parts = {number: weights.source.read(part.name) for number, part in enumerate(step.parts)}
    cast = [part.name for part in step.parts if record.said and _casts(weights, part.name)]
    record.require((name, sha256_of(weights.source.read(name))) for name in cast)
    assert written.dtype == weights.tensors[step.key].dtype, step.key
    return differences(step, parts, lambda start, stop: written[start:stop], written.dtype)
