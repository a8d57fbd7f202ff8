"""What a run was made of and what it made, in one document.

    base      path, kind, digest of the weights; hashes of config and tokenizer; `origin`: the lineage of the run
              that made it, when a run of ours did
    starts    settings, data with its manifests, layout, versions, commit and line of every start that differs
              from the one before
    steps     those that are there, with the hash of their manifest, which has the hashes of all files
    exports   folder, step, digest, and every weight file with its size and sha256

A digest is not a hash of all weights: that would take minutes at the start of a run. See DIGEST_OF.

It lies as lineage.json beside run.json, and as temper_lineage.json with the config and tokenizer, which exports
and conversions copy: a run that starts from what another made finds the origin of its base there.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.digest import DIGEST_OF, weight_files, weights_digest
from conversion.mcore_directory import HF_FOLDER, step_folders

from .record import LINEAGE, RunRecord

CARRIED = "temper_lineage.json"
VERSION = 1
MANIFEST = "manifest.json"


def origin_of(hf_files: Path) -> dict[str, Any] | None:
    """Return the lineage that lies with a checkpoint's config and tokenizer; None when there is none to read."""
    try:
        found = json.loads((hf_files / CARRIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Lineage:
    """The lineage of a run, written anew whenever it grows."""

    def __init__(self, record: RunRecord, *, base: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        self._record = record
        steps = step_folders(record.folder)
        earlier = _earlier(record.folder) if steps else {}
        self._document: dict[str, Any] = {
            "version": VERSION,
            "run": {"name": record.folder.name, "folder": str(record.folder.absolute())},
            "base": dict(base),
            "digest_of": DIGEST_OF,
            "starts": earlier.get("starts", []),
            "exports": earlier.get("exports", []),
        }
        known = [_without_time(each) for each in self._document["starts"][-1:]]
        if known != [_without_time(start)]:
            self._document["starts"].append({**start, "after": steps[-1].name if steps else None})
        self.saved()

    def saved(self) -> None:
        """Note the steps that are there."""
        self._document["steps"] = [
            {"folder": step.name, "manifest": manifest_hash(step)} for step in step_folders(self._record.folder)
        ]
        text = self._write()
        self._record.write(self._record.folder / HF_FOLDER / CARRIED, text)

    def exported(self, folder: Path, *, step: str) -> None:
        """Note that `step` was exported as the HuggingFace checkpoint `folder`, and leave the lineage in it."""
        others = [each for each in self._document["exports"] if each["folder"] != str(folder.absolute())]
        export = {
            "folder": str(folder.absolute()),
            "step": step,
            "digest": weights_digest(folder),
            "files": {path.name: _describe(path) for path in weight_files(folder)},
        }
        self._document["exports"] = [*others, export]
        text = self._write()
        for place in (self._record.folder / HF_FOLDER, folder):
            self._record.write(place / CARRIED, text)

    def _write(self) -> str:
        text = json.dumps(self._document, indent=1, ensure_ascii=False)
        self._record.publish(LINEAGE, text)
        return text


def made_by_origin(base: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the export or step of the base's origin that the base still is; None when there is none."""
    origin = base["origin"]
    exports = [each for each in origin["exports"] if each["digest"] == base["digest"]]
    steps = [each for each in origin["steps"] if each["manifest"] and each["manifest"] == base["manifest"]]
    return next(iter([*exports, *steps]), None)


def chain(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the lineages from the first run to that of `document`."""
    origin = document["base"]["origin"]
    return [*(chain(origin) if origin else []), document]


def manifest_hash(step: Path) -> str | None:
    """Return the sha256 of a step's manifest, which has those of its files; None when it has no manifest."""
    try:
        return hashlib.sha256((step / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _earlier(folder: Path) -> dict[str, Any]:
    """Return what earlier starts of a run wrote; a damaged file is begun anew."""
    try:
        found = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
        return {name: list(map(dict, found[name])) for name in ("starts", "exports")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _without_time(start: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in start.items() if name not in ("started", "after")}


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
