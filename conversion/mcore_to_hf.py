"""Megatron-core -> HuggingFace, streamed."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from toolkits.foundation.errors import UsageError
from toolkits.foundation.publish import temporary_of

from .filling import Span
from .guards import explain_nonfinite, refuse_overlap
from .hf_as_mcore import HfAsMcore
from .hf_checkpoint import CONFIG_FILE, INDEX_FILE, copy_sidecar_files, safetensors_files
from .layout import is_finite, name_of
from .mapped_file import MappedFolder
from .mcore_as_hf import McoreAsHf
from .mcore_directory import TOKENIZER_FOLDER
from .older_spelling import add_older_spelling
from .options import Options
from .output import publish_output, state_of
from .plan import Plan
from .read_back import differences
from .recorded import SourceRecord, source_record
from .report import Story, sha256_of, write_report
from .safetensors_file import DTYPES, StoredTensor
from .settings import config_dtype


def convert(src: Path, dst: Path, **choices: Any) -> Plan:
    """Write the HuggingFace directory `dst` from the Megatron-core directory (or step folder) `src`; return the plan.

    `choices` are `Options`. Raises CheckpointError, UsageError, DiskError or InterruptedRun; `dst` is then as it was.
    """
    src, dst, options = Path(src), Path(dst), Options(**choices)
    refuse_overlap(src, dst)
    if options.dequantize:
        raise UsageError("--dequantize is for HuggingFace weights in FP8; a Megatron-core directory has none")
    weights = McoreAsHf(src, dtype=options.dtype)
    plan, checkpoint = weights.plan, weights.checkpoint
    record = source_record(checkpoint.step, plan) if options.verify else SourceRecord()
    tensors = {name: (weights.dtype(name), weights.shape(name)) for name in plan.hf_tensors}
    files, index = safetensors_files(tensors, partial(_span, weights, record, MappedFolder(temporary_of(dst)), options))

    def finish(temporary: Path, hashes: dict[str, str]) -> None:
        write_index(temporary / INDEX_FILE, index)
        for folder in (checkpoint.step / TOKENIZER_FOLDER, weights.hf_folder):
            copy_sidecar_files(folder, temporary)
        say_dtype(temporary / CONFIG_FILE, weights.config, (kind for kind, _ in tensors.values()))
        notes = add_older_spelling(temporary)
        if options.verify:
            HfAsMcore(temporary)  # accounts for every tensor
            record.require((name, hashes[name]) for name in record.said if not weights.casts)
        story = Story("mcore2hf", src, options.verify, cast=options.dtype, notes=notes, left_out=weights.left_out)
        write_report(temporary, plan, story, hashes=hashes)

    facts = {"source": str(checkpoint.step.resolve()), "files of the source": state_of(checkpoint.files)}
    publish_output(dst, files, options, facts=facts, label="exporting", finish=finish)
    return plan


def _span(
    weights: McoreAsHf, record: SourceRecord, files: MappedFolder, options: Options, name: str, place: StoredTensor
) -> Span:
    slices = weights.slices if options.allow_nonfinite else partial(_finite, weights)
    num_bytes = torch.Size(place.shape).numel() * DTYPES[place.dtype].itemsize
    check = partial(_check, weights, record, files, name, place) if options.verify else None
    return Span(name, place.start, num_bytes, partial(slices, name), check)


def _finite(weights: McoreAsHf, name: str) -> Iterator[torch.Tensor]:
    for rows in weights.slices(name):
        if not is_finite(rows):
            explain_nonfinite(name, weights.stored(name), rows.dtype)
        yield rows


def _check(weights: McoreAsHf, record: SourceRecord, files: MappedFolder, name: str, place: StoredTensor) -> list[str]:
    """Return what of a tensor, read where it was written, is not what its source says."""
    step, number = weights.plan.hf_tensors[name]
    dtype = DTYPES[place.dtype]
    if record.said and weights.casts:  # else what was written has the hash that it has to have
        record.require([(name, sha256_of(weights.stored(name)))])
    written = files.file(place.file).tensor(dtype, place.shape, place.start)
    return differences(step, {number: written}, weights.region(step).rows, dtype)


def say_dtype(path: Path, config: dict, kinds: Iterable[torch.dtype]) -> None:
    """Let config.json name the type that was written: loaders cast to what it says."""
    written = {name_of(kind) for kind in kinds}
    if len(written) == 1 and config_dtype(config) not in (None, *written):
        field = "dtype" if "dtype" in config else "torch_dtype"
        path.write_text(json.dumps({**config, field: written.pop()}, indent=2, ensure_ascii=False) + "\n")


def write_index(path: Path, index: dict | None) -> None:
    """Write the index of weights that lie in several files; None: they lie in one."""
    if index is not None:
        path.write_text(json.dumps(index, indent=2) + "\n")
