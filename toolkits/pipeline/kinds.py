"""What a stage can do: the words behind `do`, each a command of `temper`.

    build      rows -> a dataset             temper data build
    pairs      prompts -> rows of pairs      temper data pairs
    generate   what models answer            temper generate, once for each of them
    sft, ...   data -> a checkpoint          temper train WORD, every word that there is

A stage's settings are the flags of its command, with underscores, and the names given here to its arguments. Some name
what they take: a file of the user's, or `{NAME}`, which an earlier stage makes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click

from ..commands.data_build import build
from ..commands.data_pairs import pairs
from ..commands.generate import generate
from ..commands.train import train
from ..foundation.errors import UsageError
from ..training.config import TrainConfig
from ..training.objectives import OBJECTIVES

Ware = Literal["rows", "dataset", "checkpoint", "tokenizer", "adapter"]
TOP = ("model", "tokenizer")  # what stands at the top of a file and may be said as `{model}`
WARES: Mapping[str, str] = {
    "rows": "a file of rows",
    "dataset": "a dataset",
    "checkpoint": "a HuggingFace checkpoint",
    "tokenizer": "a folder with a tokenizer",
    "adapter": "an adapter",
}
# What fits where something else is asked for.
FITS: Mapping[Ware, tuple[Ware, ...]] = {"tokenizer": ("tokenizer", "checkpoint")}
# Settings that say how the work is done, not what comes of it: they may change behind a stage that is done.
_HOW_TRAINED = {"ranks", "tracker", "keep_last", "save_interval", "background_save", "stop_after"}
HOW = _HOW_TRAINED | {"workers", "encoder", "batch_size", "device"}


@dataclass(frozen=True)
class Kind:
    """A word behind `do`: its command, what it makes, and which of its settings name files.

    `inputs` are the names given to the command's arguments, `renamed` those that a flag gets here; `ours` are flags
    that the pipeline gives. `check` returns what is wrong with the parameters that the command would get.
    """

    word: str
    group: tuple[str, ...]
    command: click.Command
    makes: Ware | None
    takes: Mapping[str, Ware]
    needs: tuple[str, ...]
    ours: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], list[str]]
    inputs: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def result(self, folder: Path) -> Path:
        """Return what a stage with this folder makes, as a later one names it."""
        name = folder.name
        if self.makes == "checkpoint":
            return folder / "huggingface" / name
        return folder / (f"{name}.jsonl" if self.makes == "rows" else name)

    def ending(self, folder: Path) -> list[str]:
        """Return the words of the line that say where its output goes."""
        if self.makes == "checkpoint":
            return ["--output", str(folder), "--name", folder.name, "--export-hf"]
        if self.makes is None:
            return ["--output", str(folder), "--overwrite"]
        return [str(self.result(folder)), "--overwrite"]


def _no_problems(_: Mapping[str, Any]) -> list[str]:
    return []


def _pair_problems(values: Mapping[str, Any]) -> list[str]:
    from ..generation.corrections import Corrections

    given = {name: values[name] for name in ("replace", "answers", "key", "better")}
    return Corrections(**given).problems() + _decoding_problems(values)


def _decoding_problems(values: Mapping[str, Any]) -> list[str]:
    if values["temperature"] == 0 and (values["top_p"] < 1 or values["top_k"] > 0):
        from ..generation.decoding import Decoding  # seconds: it imports torch

        try:
            Decoding(temperature=values["temperature"], top_p=values["top_p"], top_k=values["top_k"])
        except UsageError as error:
            return [str(error)]
    return []


def _question_problems(values: Mapping[str, Any]) -> list[str]:
    asks = bool(values["prompts"]) or values["file"] is not None
    return ([] if asks else ["say what to answer: prompt, or input"]) + _decoding_problems(values)


def _train_problems(values: Mapping[str, Any]) -> list[str]:
    return TrainConfig.from_values(dict(values)).problems()


def _training(word: str) -> Kind:
    assert isinstance(train, click.Group)
    return Kind(
        word,
        ("train", word),
        train.commands[word],
        makes="checkpoint",
        takes={
            "model": "checkpoint",
            "data": "dataset",
            "valid_data": "dataset",
            "hf_config": "checkpoint",
            "adapter": "adapter",
        },
        needs=("model", "data"),
        ours=("output", "name", "resume", "export_hf", "data_restart"),
        check=_train_problems,
        renamed={"checkpoint": "model"},
    )


_OF_DATA: Sequence[Kind] = (
    Kind(
        "build",
        ("data", "build"),
        build,
        makes="dataset",
        takes={"input": "rows", "tokenizer": "tokenizer"},
        needs=("input", "tokenizer"),
        ours=("overwrite",),
        check=_no_problems,
        inputs=("input",),
    ),
    Kind(
        "pairs",
        ("data", "pairs"),
        pairs,
        makes="rows",
        takes={
            "prompts": "rows",
            "model": "checkpoint",
            "adapter": "adapter",
            "answers": "rows",
            "better": "checkpoint",
        },
        needs=("prompts", "model"),
        ours=("overwrite",),
        check=_pair_problems,
        inputs=("prompts",),
    ),
    Kind(
        "generate",
        ("generate",),
        generate,
        makes=None,
        takes={"models": "checkpoint", "input": "rows", "adapter": "adapter"},
        needs=("models",),
        ours=("output", "overwrite"),
        check=_question_problems,
        inputs=("models",),
    ),
)

KINDS: Mapping[str, Kind] = {kind.word: kind for kind in (*_OF_DATA, *map(_training, OBJECTIVES))}
