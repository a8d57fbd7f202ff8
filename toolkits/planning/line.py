"""The launcher's line of a plan, through the launchers' own table."""

import shlex

from conversion.plan import Plan

from ..foundation.errors import UsageError, raise_all
from ..launch.arguments import RECOMPUTE, VARIABLES, Launcher
from ..launch.kinds import human_size
from ..launch.reading import complaint
from ..training.config import TrainConfig, all_settings
from ..training.layout import Layout
from .sizes import sizes_of
from .weights import Tuning, expert_ranks

AC_WORDS = {setting: word for word, setting in reversed(RECOMPUTE.items())}
DATA, OUT = "DATA", "OUT"  # left to the user
TRAIN_ITERS, WARMUP_ITERS = "1000", "100"
GPUS_OF_NODE = 8


def launcher_line(
    launcher: Launcher, config: TrainConfig, layout: Layout, tuning: Tuning, *, plan: Plan, checkpoint: str
) -> str:
    """Return the line that starts the run; raise UsageError for a word that the launcher's table refuses."""
    words = _words(config, layout, plan=plan, checkpoint=checkpoint)
    variables = {"NPROC_PER_NODE": str(min(layout.world, GPUS_OF_NODE)), **_variables(config)}
    if tuning.method != "full":
        variables |= {"PEFT": tuning.method, "LORA_RANK": str(tuning.lora_rank)}
    over = config.layout.expert_tensor_parallel
    if over and "ETP" not in {entry.name for entry in launcher.positions}:
        variables["EXTRA_ARGS"] = f"--expert-tensor-parallel {over}"
    problems = []
    for entry in (*launcher.positions, *VARIABLES):
        word = (words | variables).get(entry.name)
        problem = None if word is None else complaint(entry, word)
        if problem is not None:
            problems.append(f"{entry.name} {word} {problem}")
    raise_all(UsageError, launcher.script, problems)
    before = " ".join(f"{name}={shlex.quote(word)}" for name, word in variables.items())
    typed = shlex.join(words[entry.name] for entry in launcher.positions)
    return f"{before} sh run_scripts/{launcher.script} {typed}"


def _variables(config: TrainConfig) -> dict[str, str]:
    """Return a word for every variable whose setting is not at its default."""
    said, default = config.values(), {each.name: each.default for each in all_settings()}
    differs = {
        entry.name: said[entry.setting]
        for entry in VARIABLES
        if entry.setting is not None and said[entry.setting] != default[entry.setting]
    }
    return {name: _switch(value) if isinstance(value, bool) else str(value) for name, value in differs.items()}


def _words(config: TrainConfig, layout: Layout, *, plan: Plan, checkpoint: str) -> dict[str, str]:
    """Return a word for every position that a launcher has, by its name."""
    said = config.values()
    return {
        "ENV": "dsw" if layout.world <= GPUS_OF_NODE else "dlc",
        "MODEL_SIZE": human_size(plan.num_parameters),
        "BATCH_SIZE": str(said["micro_batch_size"]),
        "GLOBAL_BATCH_SIZE": str(said["global_batch_size"]),
        "LR": _short(said["lr"]),
        "MIN_LR": _short(said["min_lr"]),
        "SEQ_LEN": str(said["seq_len"]),
        "PAD_LEN": str(said["seq_len"]),
        "PR": said["precision"],
        "TP": str(layout.tensor),
        "PP": str(layout.pipeline),
        "CP": str(layout.context),
        "ETP": str(expert_ranks(layout) if sizes_of(plan).experts else 1),
        "EP": str(layout.expert),
        "SP": _switch(said["sequence_parallel"]),
        "DO": _switch(said["distributed_optimizer"]),
        "FL": _switch(said["flash_attention"]),
        "SFT": "true",
        "AC": AC_WORDS[said["recompute"]],
        "OPTIMIZER_OFFLOAD": said["optimizer_offload"] if said["optimizer_offload"] != "0" else "false",
        "SAVE_INTERVAL": TRAIN_ITERS,
        "DATASET_PATH": DATA,
        "VALID_DATASET_PATH": DATA,
        "PRETRAIN_CHECKPOINT_PATH": checkpoint,
        "TRAIN_TOKENS_OR_ITERS": TRAIN_ITERS,
        "WARMUP_TOKENS_OR_ITERS": WARMUP_ITERS,
        "OUTPUT_BASEPATH": OUT,
        "BETA": _short(said["beta"]),
    }


def _switch(value: bool) -> str:
    return "true" if value else "false"


def _short(number: float) -> str:
    """1e-05 -> 1e-5, as people type it."""
    return f"{number:g}".replace("e-0", "e-")
