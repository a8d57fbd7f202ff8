"""What tells what a stage reads or makes from another of the same name."""

import hashlib
from pathlib import Path
from typing import Any

from conversion.digest import weights_digest
from conversion.mcore_directory import find_step, is_mcore_directory

from .stage import NO_MODEL, File, Stage

ADAPTER_CONFIG = "adapter_config.json"


def digest_of(file: File) -> str:
    """Return the digest of something that a stage reads or makes; OSError and TemperError when it is not whole.

    A checkpoint has the digest that a run's lineage gives it, a dataset the one in a run's fingerprint.
    """
    if file.path == NO_MODEL:
        return str(NO_MODEL)
    if file.ware == "rows":
        return _rows_digest(file.path)
    if file.ware == "dataset":
        from data_preprocessing.dataset import dataset_fingerprint

        return dataset_fingerprint(file.path)
    if file.ware == "tokenizer":
        from data_preprocessing.tokenizer import tokenizer_fingerprint

        return tokenizer_fingerprint(file.path)[:16]
    if file.ware == "adapter":
        return _short(weights_digest(file.path).encode() + (file.path / ADAPTER_CONFIG).read_bytes())
    return weights_digest(find_step(file.path) if is_mcore_directory(file.path) else file.path)


def result_digest(stage: Stage) -> str:
    """Return the digest of what a stage made; OSError and TemperError when it is not there or not whole."""
    if stage.kind.makes is not None:
        return digest_of(File(stage.kind.makes, stage.result))
    answers = [stage.answers(model) for model in stage.files["models"]]
    return _short("".join(_rows_digest(path) for path in answers).encode())


def fingerprint(stage: Stage) -> dict[str, Any]:
    """Return what decides what a stage makes: its settings as they were said, and the digests of what it reads."""
    from .kinds import HOW

    settings = {
        name: [list(value) if isinstance(value, tuple) else str(value) for value in values]
        for name, (option, values) in sorted(stage.settings.items())
        if name not in HOW and not option.is_default(values)
    }
    reads = {
        name: [" ".join(filter(None, (file.column, file.weight, digest_of(file)))) for file in files]
        for name, files in sorted(stage.files.items())
    }
    return {"do": stage.kind.word, "settings": settings, "reads": reads}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, line by line."""
    if then.get("do") != now["do"]:
        return [f"do: {then.get('do')} -> {now['do']}"]
    found = []
    for group in ("settings", "reads"):
        old, new = then.get(group, {}), now[group]
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                found.append(f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}")
    return found


def _rows_digest(path: Path) -> str:
    from data_preprocessing.reading import find_inputs

    whole = hashlib.sha256()
    for each in find_inputs([path]):
        with open(each, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def _short(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _shown(values: list[Any] | None) -> str:
    if values is None:
        return "not said"
    text = ", ".join(" ".join(value) if isinstance(value, list) else str(value) for value in values)
    return text if len(text) <= 60 else text[:60] + " ..."
