"""Everything that can be known to be wrong before a rank is started, said at once."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.families import family_for
from conversion.mcore_directory import hf_folder
from conversion.plan import plan_for
from conversion.settings import mcore_settings, untrainable_reasons
from data_preprocessing.blend import parse_blend
from data_preprocessing.dataset import document_prefix

from ..foundation.errors import CheckpointError, DataError, MachineError, TemperError, UsageError, raise_all
from ..training.config import TrainConfig
from ..training.layout import DIVIDED_BY_TENSOR_PARALLEL, layout_problems
from .arguments import LAUNCHERS, Launcher
from .kinds import human_size
from .nodes import DEFAULT_GPUS, GPUS_OF_NODE, Nodes, is_cluster, node_problems, nodes_of
from .ranks import fp8_problem, visible_gpus
from .reading import Call, in_words_of, read_call, settings_of

SIZE_TOLERANCE = 0.25
PAIR = (".bin", ".idx")
LAYOUT_WORDS = (
    "TP",
    "PP",
    "CP",
    "EP",
    "ETP",
    "BATCH_SIZE",
    "GLOBAL_BATCH_SIZE",
    "NPROC_PER_NODE",
    GPUS_OF_NODE,
    "WORLD_SIZE",
)
SCHEDULE_WORDS = ("LR", "MIN_LR", "TRAIN_TOKENS_OR_ITERS", "WARMUP_TOKENS_OR_ITERS", "EPOCHS")


@dataclass(frozen=True)
class Launch:
    """A call that passed every check; `ranks` are those of each of the `nodes`."""

    call: Call
    config: TrainConfig
    ranks: int
    device: str
    num_parameters: int
    nodes: Nodes

    @property
    def world(self) -> int:
        """Number of ranks on all nodes."""
        return self.ranks * self.nodes.count


def check_call(family: Launcher, given: Sequence[str], environment: Mapping[str, str]) -> Launch:
    """Read and check a call of `family`; raise one error with every complaint.

    The error is a UsageError, unless all complaints are of one other kind.
    """
    call = read_call(family, given, environment)
    problems: list[TemperError] = [UsageError(text) for text in call.problems]
    try:
        hf_config = model_config(call)
        parameters = plan_for(hf_config).num_parameters if hf_config else 0
    except CheckpointError as error:
        problems.append(error)
        hf_config, parameters = None, 0
    size = call.typed["MODEL_SIZE"]
    problems += size_problems(call, parameters) if parameters else []
    problems += family_problems(family, hf_config) if hf_config and parameters else []
    gpus = visible_gpus()
    try:
        config = settings_of(call, human_size(parameters) if size == "auto" else size)
    except ValueError as error:  # a UsageError, or an open quote
        problems.append(UsageError(f"EXTRA_ARGS: {error}"))
        config = settings_of(_without(call, "EXTRA_ARGS"), size)
    ranks, device = ranks_of_node(call, config, gpus)
    nodes = nodes_of(call)
    problems += [UsageError(text) for text in node_problems(call, nodes, ranks=ranks, gpus=gpus)]
    if call.reads_json and nodes.count > 1:
        problems.append(
            UsageError("MP_DATASET_TYPE=raw is for one node; for more, run `temper data build` once before")
        )
    problems += setting_problems(call, config) + path_problems(call, config)
    elsewhere = bool(call.values.get("DRY_RUN"))  # the job may run on another machine than this
    if config.compute.precision == "fp8" and not elsewhere and (problem := fp8_problem()):
        problems.append(MachineError(problem))
    problems += rank_problems(call, config, hf_config, world=ranks * nodes.count)
    _raise(family, problems)
    return Launch(call, config, ranks, device, parameters, nodes)


def ranks_of_node(call: Call, config: TrainConfig, gpus: int) -> tuple[int, str]:
    """Return how many ranks this node runs and on which device."""
    said = call.values.get("NPROC_PER_NODE")
    if said is None and is_cluster(call):
        return call.values.get(GPUS_OF_NODE, DEFAULT_GPUS), "GPU"
    return said or gpus or config.layout.model_parallel, "GPU" if gpus else "CPU"


def model_config(call: Call) -> dict[str, Any] | None:
    """Return the config.json of the checkpoint; None when the call does not say where it is."""
    said = call.values["PRETRAIN_CHECKPOINT_PATH"]
    if said == "none":
        if "HF_CONFIG" not in call.values:  # the settings' own check complains
            return None
        path = Path(call.values["HF_CONFIG"])
        return read_json(path if path.name == "config.json" else path / "config.json")
    if not call.reads("PRETRAIN_CHECKPOINT_PATH"):
        return None
    if not Path(said).exists():
        raise CheckpointError(
            f"no checkpoint at {said}. Pretrained weights were requested; refusing to train from random weights "
            "(say `none` for that)"
        )
    return read_json(hf_folder(Path(said)) / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a config.json; raise CheckpointError when there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return content


def size_problems(call: Call, parameters: int) -> list[TemperError]:
    """Hold MODEL_SIZE against what config.json describes."""
    said = call.values["MODEL_SIZE"]
    if said is None or not call.reads("MODEL_SIZE") or abs(parameters - said) <= SIZE_TOLERANCE * said:
        return []
    actual = human_size(parameters)
    return [
        UsageError(
            f"MODEL_SIZE is {call.typed['MODEL_SIZE']}, but the config.json of "
            f"{call.values['PRETRAIN_CHECKPOINT_PATH']} describes {actual} ({parameters:,} parameters): "
            f"use {actual} or auto, or another checkpoint"
        )
    ]


def family_problems(launcher: Launcher, hf_config: Mapping[str, Any]) -> list[TemperError]:
    """Hold the checkpoint's family against the launcher's, which have their own positions."""
    family = family_for(hf_config).name
    if family in launcher.families:
        return []
    others = [each.script for each in LAUNCHERS.values() if family in each.families and each.task == launcher.task]
    advice = f"use {' or '.join(others)}" if others else f"start it with `temper train {launcher.task}`"
    return [
        UsageError(
            f"the checkpoint is a {family}, {launcher.script} is for {' and '.join(launcher.families)}: {advice}"
        )
    ]


def setting_problems(call: Call, config: TrainConfig) -> list[TemperError]:
    """Return what the settings say against each other."""
    found: list[TemperError] = []
    if call.reads(*SCHEDULE_WORDS):
        steps = f" (steps of {call.tokens_of_step:,} tokens)" if call.counts_tokens else ""
        said = [in_words_of(call.family, text) for text in config.problems()]
        found += [UsageError(text + steps * ("TOKENS_OR_ITERS" in text)) for text in said]
    pad, row = call.values["PAD_LEN"], call.values["SEQ_LEN"]
    if call.reads("PAD_LEN", "SEQ_LEN") and pad > row:
        found.append(UsageError(f"PAD_LEN {pad} is larger than SEQ_LEN {row}"))
    return found


def path_problems(call: Call, config: TrainConfig) -> list[TemperError]:
    """Return the datasets that are not there."""
    said = {"DATASET_PATH": config.data.data, "VALID_DATASET_PATH": config.data.valid_data}
    found: dict[str, TemperError] = {}  # by the files: a set may stand at both places
    for name, blend in said.items():
        for part in parse_blend(blend) if blend and call.reads(name) else ():
            files = [str(part.path)] if call.reads_json else [f"{document_prefix(part.path)}{end}" for end in PAIR]
            missing = " and ".join(file for file in files if not os.path.isfile(file))
            advice = "MP_DATASET_TYPE=raw reads JSON files" if call.reads_json else "`temper data build` writes them"
            if missing and missing not in found:
                found[missing] = DataError(f"{name} {part.path}: {missing} missing; {advice}")
    return list(found.values())


def rank_problems(
    call: Call, config: TrainConfig, hf_config: dict[str, Any] | None, *, world: int
) -> list[TemperError]:
    """Hold the parallel layout against the model and the `world` of ranks on all nodes."""
    found = untrainable_reasons(hf_config) if hf_config else []
    if call.reads(*LAYOUT_WORDS):
        found += layout_problems(config, mcore_settings(hf_config) if hf_config else _any_model(config), world)
    return [UsageError(text) for text in found]


def _any_model(config: TrainConfig) -> dict[str, int]:
    """A model that every TP, PP, EP and ETP divide: what remains are the rules of the batch and the ranks."""
    layout = config.layout
    return {
        "num_layers": layout.pipeline_parallel,
        **dict.fromkeys(DIVIDED_BY_TENSOR_PARALLEL, layout.tensor_parallel),
        "num_moe_experts": layout.expert_parallel,
        "moe_ffn_hidden_size": layout.experts_over,
    }


def _without(call: Call, name: str) -> Call:
    values = {key: value for key, value in call.values.items() if key != name}
    return Call(call.family, call.typed, values, call.unread | {name}, call.problems)


def _raise(family: Launcher, problems: list[TemperError]) -> None:
    kinds = {type(problem) for problem in problems}
    raise_all(kinds.pop() if len(kinds) == 1 else UsageError, family.script, [str(problem) for problem in problems])
