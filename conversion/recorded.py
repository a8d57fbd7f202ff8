"""Holding a directory against what was written down when it was made: a report, or a training step's manifest."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from toolkits.foundation.errors import CheckpointError, raise_all

from .mcore_directory import RELEASE
from .plan import Plan
from .report import REPORT_FILE, VERSION, describe, hashed, targets_of
from .safe_files import read_json, stays_inside

MANIFEST_FILE = "manifest.json"  # {"version": 1, "files": {NAME: [bytes, sha256], ...}, ...}
MANIFEST_VERSION = 1


def check_recorded(directory: Path, plan: Plan, *, everything: bool) -> str | None:
    """Hold a HuggingFace directory or a step folder against its record; return what was held, None without one.

    Without `everything` only what the weights lie in is read. Raises CheckpointError that names each file with the
    hash that it should have and the one that it has.
    """
    if (directory / MANIFEST_FILE).is_file():
        record, root = directory / MANIFEST_FILE, directory
        files = _files(_read(record, MANIFEST_VERSION))
        files = {name: said for name, said in files.items() if everything or name.endswith(".distcp")}
        problems, held = list(_file_problems(root, files)), f"{len(files)} files"
    else:
        root = directory.parent if directory.name == RELEASE else directory
        record = root / REPORT_FILE
        if not record.is_file():
            return None
        said = _read(record, VERSION)
        tensors, files = _tensors(said), _files(said) if everything else {}
        if not tensors and said["tensors"]:  # not verified when it was made: nothing was hashed
            return None
        problems = [*_tensor_problems(root, plan, tensors), *_file_problems(root, files)]
        held = f"{len(tensors)} tensors" + f" and {len(files)} files" * everything
    hint = f"copy it again, or remove {record.name} if it was changed on purpose"
    raise_all(CheckpointError, f"{root} is not what {record.name} says ({hint})", problems)
    return f"{held}, as the {record.stem.rpartition('_')[2]} says"


def _read(record: Path, version: int) -> dict:
    content = read_json(record)
    said = content.get("version")
    if type(said) is int and said > version:
        raise CheckpointError(f"{record} was written by a newer Temper ({content.get('temper')}); use that one")
    if said != version:
        raise CheckpointError(f"{record} is damaged: its version is {said!r}; remove it to go without it")
    return content


def _files(content: dict) -> dict[str, list]:
    files = content.get("files")
    if not isinstance(files, dict) or not all(isinstance(said, list) and len(said) == 2 for said in files.values()):
        raise CheckpointError("a record of a checkpoint is damaged: it has no files with sizes and hashes")
    return files


def _tensors(content: dict) -> dict[str, str]:
    try:
        said = {str(entry["target"]): entry["sha256"] for entry in content["tensors"]}
        return {name: str(sha256) for name, sha256 in said.items() if sha256 is not None}
    except (KeyError, TypeError):
        raise CheckpointError(f"{REPORT_FILE} is damaged: it has no tensors with hashes") from None


def _tensor_problems(root: Path, plan: Plan, said: Mapping[str, str]) -> Iterator[str]:
    targets = targets_of(root, plan)
    for name in sorted(said.keys() ^ targets.keys()):
        yield f"{name} is not there" if name in said else f"{name} is not named"
    shared = {name: target for name, target in targets.items() if name in said}
    for name, actual in hashed(shared):
        if actual != said[name]:
            yield f"{shared[name].file}: {name} has sha256 {actual}, expected {said[name]}"


def _file_problems(root: Path, said: Mapping[str, list]) -> Iterator[str]:
    for name, (size, sha256) in said.items():
        path = root / name
        if not stays_inside(root, path):
            yield f"unsafe path {name!r}"
        elif not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size:,} bytes, expected {size:,}"
        elif (actual := describe(path)[1]) != sha256:
            yield f"{name} has sha256 {actual}, expected {sha256}"
