"""A checked pipeline: its stages, what each reads, and the lines that run it."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kinds import Kind, Ware
from .options import Option

NO_MODEL = Path("none")  # of `temper train`: random weights
REPLACED = "replaced"  # folder for what --redo moves aside


@dataclass(frozen=True)
class File:
    """Something that a stage reads: a path, or what an earlier stage makes; `weight` where it is part of a blend."""

    ware: Ware
    path: Path
    maker: str | None = None
    weight: str | None = None
    column: str | None = None  # of the table that a stage `generate` makes

    @property
    def shown(self) -> str:
        """The path as one would type it here."""
        return shown(self.path)


@dataclass(frozen=True)
class Stage:
    """A stage: `folder` is where its output goes, `settings` are what was said, `files` what it reads, by name."""

    name: str
    kind: Kind
    line: int
    folder: Path
    settings: Mapping[str, tuple[Option, list[Any]]]
    files: Mapping[str, list[File]]

    @property
    def result(self) -> Path:
        """What it makes."""
        return self.kind.result(self.folder)

    @property
    def makers(self) -> list[str]:
        """The stages whose output it reads, each once."""
        found = [file.maker for files in self.files.values() for file in files if file.maker is not None]
        return list(dict.fromkeys(found))

    def lines(self) -> list[list[str]]:
        """Return the words behind `temper` of every line that it runs."""
        if self.kind.word != "generate":
            return [self._line(self.files, self.folder)]
        found = []
        for model in self.files["models"]:
            files = {**self.files, "models": [model]}
            found.append(self._line(files, self.answers(model)))
        return found

    def answers(self, model: File) -> Path:
        """Return the file that has what a model answers, in a stage `generate`."""
        return self.folder / f"{model.column}.jsonl"

    def _line(self, files: Mapping[str, list[File]], target: Path) -> list[str]:
        inputs = [file.shown for name in self.kind.inputs for file in files[name]]
        ending = self.kind.ending(Path(shown(target)))
        theirs = {name: flag for flag, name in self.kind.renamed.items()}
        words = []
        for name in self.kind.takes:
            if name in files and name not in self.kind.inputs:
                words += [f"--{theirs.get(name, name).replace('_', '-')}", self._said(files[name])]
        words += [word for option, values in self.settings.values() for word in option.words(values)]
        if self.kind.makes in ("dataset", "rows"):
            return [*self.kind.group, *inputs, *ending[:1], *words, *ending[1:]]
        return [*self.kind.group, *inputs, *words, *ending]

    @staticmethod
    def _said(files: list[File]) -> str:
        if len(files) == 1 and files[0].weight is None:
            return files[0].shown
        return " ".join(f"{file.weight} {shlex.quote(file.shown)}" for file in files)


@dataclass(frozen=True)
class Pipeline:
    """What a file says, checked; `output` is the folder that all of it goes to."""

    file: Path
    output: Path
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """Return the stage called `name`, which there is."""
        return next(stage for stage in self.stages if stage.name == name)

    def resting_on(self, names: set[str]) -> list[Stage]:
        """Return the stages of these names and all that need what they make, in their order."""
        found: set[str] = set(names)
        for stage in self.stages:
            if found & set(stage.makers):
                found.add(stage.name)
        return [stage for stage in self.stages if stage.name in found]


def typed(words: list[str]) -> str:
    """Return a line as one would type it."""
    return shlex.join(["temper", *words])


def shown(path: Path) -> str:
    """Return a path as one would type it: from here when it lies below, else whole."""
    path = Path(os.path.normpath(path.absolute()))
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
