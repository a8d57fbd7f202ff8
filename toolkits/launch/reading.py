"""From typed words to the settings of a run: every word that does not fit is noted, none stops the reading."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..foundation.errors import UsageError
from ..training.config import TrainConfig
from ..training.objectives import OBJECTIVES, Objective
from ..training.options import parse_flags
from .arguments import CLUSTER_VARIABLES, DEFAULT_LORA_RANK, VARIABLES, Entry, Launcher
from .nodes import Nodes

# What the checks of a call rest on, and NAME says.
POSITIONS_ONLY = ("checkpoint", "hf-config", "output", "name", "rows", "seq-len", "global-batch-size")


@dataclass(frozen=True)
class Call:
    """A launcher's call: the words as typed and what they mean, by the name of their entry.

    `values` has a stand-in for each position in `unread`, so that the rest can still be checked.
    """

    family: Launcher
    typed: Mapping[str, str]
    values: Mapping[str, Any]
    unread: frozenset[str]
    problems: list[str] = field(default_factory=list)

    @property
    def objective(self) -> Objective:
        """What is trained for."""
        return OBJECTIVES[self.values["SFT"]]

    @property
    def reads_json(self) -> bool:
        """Whether positions 20 and 21 are JSON files, not datasets."""
        return self.values.get("MP_DATASET_TYPE") == "raw"

    @property
    def counts_tokens(self) -> bool:
        """Whether positions 23 and 24 are tokens."""
        return self.objective.rows == "documents"

    @property
    def tokens_of_step(self) -> int:
        """The tokens of one iteration."""
        return self.values["GLOBAL_BATCH_SIZE"] * self.values["SEQ_LEN"]

    def reads(self, *names: str) -> bool:
        """Whether the words of all `names` could be read."""
        return not self.unread & set(names)


def complaint(entry: Entry, word: str) -> str | None:
    """Return what is wrong with `word` as the value of `entry`, or None."""
    try:
        entry.kind.read(word)
    except ValueError as error:
        return str(error)
    return None


def read_call(family: Launcher, given: Sequence[str], environment: Mapping[str, str]) -> Call:
    """Read as many words as `family` has positions, and the variables that are set."""
    assert len(given) == len(family.positions)
    typed = {entry.name: word for entry, word in zip(family.positions, given, strict=True)}
    variables = (*VARIABLES, *CLUSTER_VARIABLES) if typed["ENV"] == "dlc" else VARIABLES
    typed |= {entry.name: environment[entry.name] for entry in variables if environment.get(entry.name)}
    places = {entry.name: f" (position {number})" for number, entry in enumerate(family.positions, 1)}
    values, unread, problems = {}, set(), []
    for entry in (*family.positions, *variables):
        word = typed.get(entry.name)
        problem = None if word is None else complaint(entry, word)
        if word is None and entry.required:
            problems.append(f"{entry.name} is not set ({entry.help})")
            unread.add(entry.name)
        if problem is not None:
            problems.append(f"{entry.name}{places.get(entry.name, '')} {word!r} {problem}")
            unread.add(entry.name)
            word = entry.kind.examples[0] if entry.name in places else None
        if word is not None:
            values[entry.name] = entry.kind.read(word)
    if values.get("PEFT", "none") == "none":
        alone = [entry.name for entry in VARIABLES if entry.name.startswith("LORA_") and entry.name in typed]
        problems += [f"{name} is set without PEFT=lora or qlora: all weights would be trained" for name in alone]
        values = {name: value for name, value in values.items() if name not in alone}
    return Call(family, typed, values, frozenset(unread), problems)


def settings_of(call: Call, size: str) -> TrainConfig:
    """Return the settings that `call` asks for; `size` stands in NAME.

    Raises UsageError for flags in EXTRA_ARGS that do not exist or may not stand there.
    """
    values = call.values
    fields = {
        entry.setting: values[entry.name]
        for entry in (*call.family.positions, *VARIABLES)
        if entry.setting is not None and entry.name in values
    }
    fields |= {name: Path(fields[name]) for name in ("output", "hf_config") if name in fields}
    fields["rows"] = call.objective.rows
    if values.get("PEFT", "none") != "none":
        fields.setdefault("lora_rank", DEFAULT_LORA_RANK)
        fields["quantize"] = "nf4" if values["PEFT"] == "qlora" else "none"
    if call.counts_tokens:
        fields |= {name: -(-fields[name] // call.tokens_of_step) for name in ("train_iters", "warmup_iters")}
    words = {**call.typed, "MODEL_SIZE": size}
    if "EPOCHS" in values:
        fields["train_iters"] = 0
        words["TRAIN_TOKENS_OR_ITERS"] = f"{call.typed['EPOCHS']}epochs"
    fields["name"] = call.family.run_name(words, task=call.objective.task)
    return with_flags(TrainConfig.from_values(fields), shlex.split(values.get("EXTRA_ARGS", "")))


def with_flags(config: TrainConfig, flags: Sequence[str]) -> TrainConfig:
    """Return `config` with the command-line `flags` on top; raise UsageError when one does not exist or may not."""
    taken = sorted({f"--{name}" for name in POSITIONS_ONLY} & {flag.split("=")[0] for flag in flags})
    if taken:
        raise UsageError(f"{', '.join(taken)}: the positions and variables say that, and are checked")
    return parse_flags([*config.flags(), *flags]) if flags else config


def in_words_of(family: Launcher, text: str) -> str:
    """Return `text` with the flags that a position stands for replaced by the position's name."""
    names = {entry.setting: entry.name for entry in (*family.positions, *VARIABLES) if entry.setting}
    return re.sub(r"--([a-z][a-z-]+)", lambda match: names.get(match[1].replace("-", "_"), match[0]), text)


def torchrun_line(
    objective: Objective, config: TrainConfig, *, ranks: int, nodes: Nodes, torchrun: str, repository: Path
) -> str:
    """Return the line that starts the same ranks of this node under plain torchrun."""
    where = ["--standalone"]
    if nodes.count > 1:
        where = [f"--nnodes={nodes.count}", f"--node-rank={nodes.rank}"]
        where += [f"--master-addr={nodes.address}", f"--master-port={nodes.port}"]
    words = [torchrun, *where, f"--nproc-per-node={ranks}", "-m", "toolkits.training", objective.word]
    words += config.flags()
    return f"PYTHONPATH={shlex.quote(str(repository))} {shlex.join(words)}"
