"""Holding a directory against what was written down when it was made: a report, or a training step's manifest."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from toolkits.foundation.errors import CheckpointError, raise_all

from .mcore_directory import RELEASE
from .plan import Plan
from .report import REPORT_FILE, VERSION, Target, describe, hashed, targets_of
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
    _refuse(root, record.name, problems)
    return f"{held}, as the {record.stem.rpartition('_')[2]} says"


@dataclass(frozen=True)
class SourceRecord:
    """The hashes that a source's tensors should have, held against them while they are converted; or none at all."""

    root: Path = Path()
    said: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)

    def require(self, found: Iterable[tuple[str, str]]) -> None:
        """Raise CheckpointError that names each tensor of which another sha256 was `found`."""
        problems = [_difference(self.targets[name], name, actual, self.said) for name, actual in found]
        _refuse(self.root, REPORT_FILE, [problem for problem in problems if problem])


def source_record(directory: Path, plan: Plan) -> SourceRecord:
    """Return what to hold the tensors of a source against while they are read, which they are anyway.

    What a training step's manifest says of its files is held at once. Raises CheckpointError as `check_recorded`.
    """
    root = directory.parent if directory.name == RELEASE else directory
    record = root / REPORT_FILE
    if (directory / MANIFEST_FILE).is_file() or not record.is_file():
        check_recorded(directory, plan, everything=False)
        return SourceRecord()
    said, targets = _tensors(_read(record, VERSION)), targets_of(root, plan)
    if said:
        _refuse(root, record.name, list(_name_problems(targets, said)))
    return SourceRecord(root, said, targets)


def _refuse(root: Path, record: str, problems: list[str]) -> None:
    hint = f"copy it again, or remove {record} if it was changed on purpose"
    raise_all(CheckpointError, f"{root} is not what {record} says ({hint})", problems)


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
        found: dict[str, str] = {}
        for entry in content["tensors"]:
            said = entry["sha256"]
            names, hashes = (entry["source"], said) if isinstance(said, list) else ([entry["target"]], [said])
            found |= {str(name): str(sha256) for name, sha256 in zip(names, hashes, strict=True) if sha256 is not None}
        return found
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{REPORT_FILE} is damaged: it has no tensors with hashes") from None


def _tensor_problems(root: Path, plan: Plan, said: Mapping[str, str]) -> Iterator[str]:
    targets = targets_of(root, plan)
    yield from _name_problems(targets, said)
    shared = {name: target for name, target in targets.items() if name in said}
    yield from filter(None, (_difference(shared[name], name, actual, said) for name, actual in hashed(shared)))


def _name_problems(targets: Mapping[str, Target], said: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(said.keys() ^ targets.keys()):
        yield f"{name} is not there" if name in said else f"{name} is not named"


def _difference(target: Target, name: str, actual: str, said: Mapping[str, str]) -> str:
    """Say which hash a tensor should have, or nothing when it has it."""
    return "" if actual == said[name] else f"{target.file}: {target.called} has sha256 {actual}, expected {said[name]}"


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
