"""A pipeline's file -> a checked pipeline; everything that is wrong is said at once, before anything runs.

output: out                 folder for all that is made, from the folder of this file
model: Qwen2.5-7B-Instruct  HuggingFace checkpoint that the first stage starts from
tokenizer: ...              left out: that of `model`
stages:
  - name: chats             in this order; `{chats}` is what it makes
    do: build
    input: chats.jsonl
  - name: tuned
    do: sft
    data: "{chats}"
    train_iters: 100
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from data_preprocessing.blend import parse_blend

from ..foundation.errors import TemperError, UsageError
from .document import Complaints, Node, read_document
from .kinds import FITS, KINDS, TOP, WARES, Kind, Ware
from .options import Option, nearest, options_of, parsed
from .stage import NO_MODEL, REPLACED, File, Pipeline, Stage, typed

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
REFERENCE = re.compile(r"\{([^{}]*)\}")
RESERVED = (*TOP, "output", REPLACED)
TOP_WARES: Mapping[str, Ware] = {"model": "checkpoint", "tokenizer": "tokenizer"}


def read_pipeline(file: Path) -> Pipeline:
    """Return what `file` says; UsageError that lists all that is wrong with it, each with its line."""
    complaints = Complaints(file)
    document = read_document(complaints)
    if not isinstance(document.value, dict):
        raise UsageError(f"{file}: a pipeline has output, model and stages; this is {document.kind}")
    top = _top(document, complaints)
    output = _inside(file, top.get("output", "output"))
    reader = _Reader(complaints, output, {name: top[name] for name in TOP if name in top})
    stages = document.value.get("stages")
    if stages is None or not isinstance(stages.value, list) or not stages.value:
        complaints.add(stages.line if stages else document.line, "stages must be a list with at least one stage")
    else:
        reader.announce(stages.value)
        for node in stages.value:
            reader.stage(node)
    complaints.raise_them()
    return Pipeline(file, output, tuple(reader.stages))


def _top(document: Node, complaints: Complaints) -> dict[str, str]:
    """Return the texts at the top; `tokenizer` is that of the model when it is not said."""
    known = ("output", *TOP, "stages")
    found: dict[str, str] = {}
    for name, node in document.value.items():
        if name not in known:
            complaints.add(node.line, f"{name} is not known here; {nearest(name, known)}")
        elif name == "stages":
            continue
        elif not isinstance(node.value, str) or not node.value:
            complaints.add(node.line, f"{name} must be a path, this is {node.kind}")
        else:
            found[name] = node.value
    for name in ("output", "model"):
        if name not in document.value:
            complaints.add(document.line, f"{name} is missing")
    if "model" in found:
        found.setdefault("tokenizer", found["model"])
    return found


@dataclass
class _Reader:
    """Reads one stage after the other; those that are read may be referred to."""

    complaints: Complaints
    output: Path
    top: Mapping[str, str]
    stages: list[Stage] = field(default_factory=list)
    _lines: dict[str, int] = field(default_factory=dict)  # of all stages, those to come too
    _broken: set[str] = field(default_factory=set)

    def announce(self, nodes: list[Node]) -> None:
        """Learn the names of all stages, so that a reference to a later one is told from one to none."""
        for node in nodes:
            name = node.value.get("name") if isinstance(node.value, dict) else None
            if name is not None and isinstance(name.value, str):
                if name.value in self._lines:
                    self.complaints.add(
                        name.line, f"two stages are called {name.value}, the other in line {self._lines[name.value]}"
                    )
                self._lines.setdefault(name.value, name.line)

    def stage(self, node: Node) -> None:
        """Read a stage and note what is wrong with it."""
        if not isinstance(node.value, dict):
            self.complaints.add(node.line, f"a stage has a name, `do` and settings; this is {node.kind}")
            return
        name, kind = self._name(node), self._kind(node)
        if kind is None:
            self._broken.add(name)
        else:
            _StageReader(self, name, kind, node).read()

    def _name(self, node: Node) -> str:
        found = node.value.get("name")
        said = found.value if found is not None else None
        if not isinstance(said, str) or not NAME.fullmatch(said):
            problem = "is missing" if found is None else f"must be of letters, digits, `-`, `_` and `.`, not {said!r}"
            self.complaints.add(found.line if found else node.line, f"the name of the stage {problem}")
            return "?"
        if said in RESERVED:
            self.complaints.add(node.value["name"].line, f"a stage cannot be called {said}: that means something else")
        return said

    def _kind(self, node: Node) -> Kind | None:
        found = node.value.get("do")
        said = found.value if found is not None else None
        if not isinstance(said, str) or said not in KINDS:
            problem = "`do` is missing" if found is None else f"`do` is {said!r}"
            self.complaints.add(found.line if found else node.line, f"{problem}; {nearest(str(said), KINDS)}")
            return None
        return KINDS[said]

    def made_by(self, name: str, ware: Ware) -> File | str:
        """Return what `{name}` is, or what is wrong with it where a `ware` is taken."""
        if name in self.top:
            path = NO_MODEL if self.top[name] == str(NO_MODEL) else _inside(self.complaints.file, self.top[name])
            return File(ware, path) if TOP_WARES[name] in _fitting(ware) else f"{{{name}}} is not {WARES[ware]}"
        maker = next((stage for stage in self.stages if stage.name == name), None)
        if maker is None and name in self._broken:
            return f"{{{name}}} cannot be read, see line {self._lines[name]}"
        if maker is None and name in self._lines:
            return f"{{{name}}} stands below, in line {self._lines[name]}: stages run from top to bottom"
        if maker is None:
            return f"no stage is called {name!r}; {nearest(name, [*self._lines, *self.top])}"
        if maker.kind.makes not in _fitting(ware):
            made = WARES[maker.kind.makes] if maker.kind.makes else "nothing that another stage reads"
            return f"{{{name}}} makes {made}, and this takes {WARES[ware]}"
        return File(ware, maker.result, maker=name)


@dataclass
class _StageReader:
    """Reads the settings of one stage."""

    reader: _Reader
    name: str
    kind: Kind
    node: Node
    settings: dict[str, tuple[Option, list[Any]]] = field(default_factory=dict)
    files: dict[str, list[File]] = field(default_factory=dict)
    is_whole: bool = True

    def read(self) -> None:
        kind = self.kind
        options, ours = options_of(kind.command, renamed=kind.renamed, without=kind.ours)
        said = {name: node for name, node in self.node.value.items() if name not in ("name", "do")}
        known = [*kind.takes, *(name for name in options if name not in kind.takes)]
        for name, node in said.items():
            if name in kind.takes:
                self._files(name, node)
            elif name in options:
                self._setting(options[name], node)
            elif name in ours:
                self._wrong(node.line, f"{name} is given by the pipeline: leave it out")
            elif name in kind.renamed:
                self._wrong(node.line, f"{name} is called {kind.renamed[name]} here")
            else:
                near = nearest(name, known, else_see=f"`{typed([*kind.group, '--help'])}` lists them")
                self._wrong(node.line, f"{kind.word} has no setting {name}; {near}")
        self._defaults(said)
        absent = [name for name in kind.needs if name not in said and name not in self.files]
        absent += [
            name for name, option in options.items() if option.parameter.required and name not in (*said, *kind.takes)
        ]
        for name in absent:
            self._wrong(self.node.line, f"{kind.word} needs {name}{self._hint(name)}")
        folder = self.reader.output / self.name
        stage = Stage(self.name, kind, self.node.line, folder, self.settings, self.files)
        if self.is_whole:
            self._check(stage)
        self.reader.stages.append(stage)

    def _wrong(self, line: int, problem: str) -> None:
        self.is_whole = False
        self.reader.complaints.add(line, f"{self.name}: {problem}")

    def _setting(self, option: Option, node: Node) -> None:
        values, problems = option.read(node)
        for problem in problems:
            self._wrong(node.line, problem)
        if not problems:
            self.settings[option.name] = (option, values)

    def _defaults(self, said: Mapping[str, Node]) -> None:
        """Add the files at the top that nobody said: the tokenizer, and the model while no stage has made one."""
        takes, top = self.kind.takes, self.reader.top
        if "tokenizer" in takes and "tokenizer" not in said and "tokenizer" in top:
            self._add("tokenizer", self.node.line, "{tokenizer}", None)
        if "model" in takes and "model" not in said and "model" in top and not self._trained():
            self._add("model", self.node.line, "{model}", None)

    def _trained(self) -> list[str]:
        return [stage.name for stage in self.reader.stages if stage.kind.makes == "checkpoint"]

    def _hint(self, name: str) -> str:
        trained = [each for each in self._trained() if NAME.fullmatch(each)]
        if name != "model" or not trained:
            return ""
        return f': "{{{trained[-1]}}}" is what the stage before made, "{{model}}" what the pipeline starts from'

    def _files(self, name: str, node: Node) -> None:
        if isinstance(node.value, dict) and name == "models":
            for column, each in node.value.items():
                if not NAME.fullmatch(column):
                    self._wrong(each.line, f"{column!r} must be of letters, digits, `-`, `_` and `.`")
                self._text(name, each, column)
        elif isinstance(node.value, list) and name in self.kind.inputs and name != "models":
            for each in node.value:
                self._text(name, each, None)
        else:
            self._text(name, node, "answer" if name == "models" else None)

    def _text(self, name: str, node: Node, column: str | None) -> None:
        if not isinstance(node.value, str) or not node.value:
            self._wrong(node.line, f"{name} takes {WARES[self.kind.takes[name]]}, this is {node.kind}")
            return
        self._add(name, node.line, node.value, column)

    def _add(self, name: str, line: int, said: str, column: str | None) -> None:
        ware = self.kind.takes[name]
        parts: list[tuple[str, str | None]] = [(said, None)]
        if ware == "dataset":
            try:
                blend = parse_blend(said)
            except UsageError as error:
                self._wrong(line, f"{name}: {error}")
                return
            if len(blend) > 1:
                parts = [(str(part.path), str(float(part.weight))) for part in blend]
        for text, weight in parts:
            file = self._file(text, ware)
            if isinstance(file, str):
                self._wrong(line, f"{name}: {file}")
            else:
                found = File(ware, file.path, file.maker, weight, column)
                self.files.setdefault(name, []).append(found)
                self._exists(name, line, found)

    def _file(self, text: str, ware: Ware) -> File | str:
        reference = REFERENCE.fullmatch(text)
        if reference:
            return self.reader.made_by(reference[1], ware)
        if REFERENCE.search(text):
            return f"{text!r}: a reference such as {{NAME}} stands alone"
        if text == str(NO_MODEL) and self.kind.makes == "checkpoint":
            return File(ware, NO_MODEL)
        return File(ware, _inside(self.reader.complaints.file, text))

    def _exists(self, name: str, line: int, file: File) -> None:
        if file.maker is None and file.path != NO_MODEL:
            problem = missing(file)
            if problem is not None:
                self._wrong(line, f"{name}: {problem}")

    def _check(self, stage: Stage) -> None:
        """Let the command read its own line, and ask what it would refuse."""
        for words in stage.lines():
            try:
                problems = self.kind.check(parsed(self.kind.command, words[len(self.kind.group) :]))
            except click.UsageError as error:
                problems = [error.format_message()]
            for problem in problems:
                self._wrong(self.node.line, problem)


def missing(file: File) -> str | None:
    """Return what is not there of a file that no stage makes; None when it is there."""
    if file.ware == "rows":
        from data_preprocessing.reading import find_inputs

        try:
            find_inputs([file.path])
        except TemperError as error:
            return str(error)
    elif file.ware == "dataset":
        from data_preprocessing.dataset import document_prefix

        base = document_prefix(file.path)
        gone = [f"{base}{suffix}" for suffix in (".bin", ".idx") if not Path(f"{base}{suffix}").is_file()]
        return f"no dataset there: {', '.join(gone)} missing" if gone else None
    elif not file.path.is_dir():
        return f"no such folder: {file.path}"
    return None


def _fitting(ware: Ware) -> tuple[Ware, ...]:
    return FITS.get(ware, (ware,))


def _inside(file: Path, said: str) -> Path:
    """Return a path that was said in `file`, from that file's folder."""
    return file.parent / Path(said).expanduser()
