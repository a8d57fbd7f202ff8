"""MP_DATASET_TYPE=raw: JSON files become datasets under OUT/data before the ranks start, once for each content."""

import hashlib
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from conversion.mcore_directory import hf_folder
from data_preprocessing.blend import parse_blend, whole_weights
from data_preprocessing.dataset import document_prefix
from data_preprocessing.template import find_template
from data_preprocessing.tokenizer import read_json, tokenizer_fingerprint

from ..training.config import TrainConfig


def with_datasets(config: TrainConfig, *, build: bool) -> TrainConfig:
    """Return `config` with the datasets of its JSON files; `build` those that are not there yet.

    Raises DataError for a row that cannot be read.
    """
    model, data = config.model, config.data
    source = model.hf_config if model.checkpoint == "none" else hf_folder(Path(model.checkpoint))
    assert source is not None  # the check of the settings asks for one
    tokenizer = source.parent if source.name == "config.json" else source
    make = partial(_dataset, tokenizer=tokenizer, folder=config.output.output / "data", build=build)
    valid = data.valid_data and _blend_of_datasets(data.valid_data, make)
    return replace(config, data=replace(data, data=_blend_of_datasets(data.data, make), valid_data=valid))


def _blend_of_datasets(blend: str, make: Callable[[Path], Path]) -> str:
    parts = parse_blend(blend)
    prefixes = [str(make(part.path)) for part in parts]
    if len(prefixes) == 1:
        return prefixes[0]
    weights = whole_weights(parts)
    return " ".join(f"{weight} {shlex.quote(prefix)}" for weight, prefix in zip(weights, prefixes, strict=True))


def _dataset(source: Path, *, tokenizer: Path, folder: Path, build: bool) -> Path:
    """Return the prefix for the content of `source`, read with this tokenizer and template."""
    with open(source, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    template = find_template(tokenizer, read_json(tokenizer / "tokenizer_config.json")).sha256
    key = hashlib.sha256(f"{content} {tokenizer_fingerprint(tokenizer)} {template}".encode()).hexdigest()[:12]
    prefix = folder / f"{source.stem}-{key}"
    if not build:
        return prefix
    if Path(f"{document_prefix(prefix)}.json").exists():
        print(f"{source} is built already: {prefix}", file=sys.stderr)
        return prefix
    from data_preprocessing.build import build as build_dataset

    from ..commands.data_build import report

    folder.mkdir(parents=True, exist_ok=True)
    manifest = build_dataset(source, prefix, tokenizer=tokenizer)
    print("\n".join(report(manifest, prefix)), file=sys.stderr, flush=True)
    return prefix
