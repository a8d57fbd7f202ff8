"""Where things lie in a Megatron-core directory.

    DIR/latest_checkpointed_iteration.txt      "release" or a number: only a hint
    DIR/release/  or  DIR/iter_0000100/        a step: .metadata  __0_0.distcp ...  common.pt  metadata.json
    DIR/hf/                                    config.json and the tokenizer: what an export needs

Directories made by other tools keep config.json and the tokenizer at their root; they are read too. Megatron-Bridge
keeps the tokenizer in the step (`tokenizer/`). Since megatron-core 0.19 `common.pt` is one of the step's objects.
"""

import re
import sys
from pathlib import Path

from toolkits.foundation.errors import CheckpointError

from .safe_files import read_json

TRACKER_FILE = "latest_checkpointed_iteration.txt"
ADAPTER_CONFIG = "adapter_config.json"  # as PEFT calls it
RELEASE = "release"
HF_FOLDER = "hf"
TOKENIZER_FOLDER = "tokenizer"
STEP_FILES = (".metadata", "metadata.json")  # written last by everybody: a step that has both is complete

_STEP_NAME = re.compile(r"release|iter_(\d+)")

# What training keeps beside the weights, ours and other tools'.
_NOT_WEIGHTS = re.compile(
    r"(optimizer|chained_\d+|rng_state|rerun_state_machine_state|opt_param_scheduler)([./].*)?|.*\._extra_state.*"
)


def find_step(directory: Path) -> Path:
    """Return the newest complete step folder of `directory`, or `directory` itself when it is one.

    The tracker file is only a hint: when it says something else than the folders do, a warning says so.
    Raises CheckpointError when there is no complete step.
    """
    directory = Path(directory)
    if _is_complete(directory):
        return directory
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint at {directory}: no such folder")
    steps = [path for path in step_folders(directory) if _is_complete(path)]
    if not steps:
        _refuse_rank_folders(directory)
        unfinished = ", ".join(path.name for path in step_folders(directory))
        found = f"incomplete: {unfinished}" if unfinished else "no release/ or iter_NNNNNNN/ folder in it"
        raise CheckpointError(f"no checkpoint at {directory} ({found})")
    _compare_tracker(directory, steps[-1])
    return steps[-1]


def step_folders(directory: Path) -> list[Path]:
    """Return the step folders of `directory`, complete or not, oldest first; none when it does not exist."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.is_dir() and _STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=_number)


def step_name(step: int) -> str:
    """Return the folder name of a training step."""
    return f"iter_{step:07d}"


def is_weight(key: str) -> bool:
    """Whether a key of a checkpoint belongs to the model's weights, not to the run that wrote it."""
    return not _NOT_WEIGHTS.fullmatch(key)


def hf_folder(directory: Path) -> Path:
    """Return the folder that holds config.json and the tokenizer of a Megatron-core directory or step folder.

    Raises CheckpointError that names what to add when there is none.
    """
    directory = Path(directory)
    roots = [directory, directory.parent] if _STEP_NAME.fullmatch(directory.name) else [directory]
    for root in roots:
        for folder in (root / HF_FOLDER, root):
            if (folder / "config.json").is_file():
                return folder
    raise CheckpointError(
        f"{roots[-1]} has no config.json: copy config.json and the tokenizer files of the HuggingFace model "
        f"into {roots[-1] / HF_FOLDER}"
    )


def require_model(step: Path) -> None:
    """Raise CheckpointError for a step folder that holds a LoRA adapter and not a model."""
    if (step / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{step} holds a LoRA adapter, not a model; `temper convert merge BASE {step} OUT` puts both together, "
            f"`temper train --adapter {step}` trains it further"
        )


def require_torch_dist(step: Path) -> None:
    """Raise CheckpointError when metadata.json names another format than torch_dist."""
    backend = read_json(step / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{step} is a checkpoint of format {backend!r} (metadata.json); only torch_dist is read")


def is_mcore_directory(directory: Path) -> bool:
    """Whether `directory` is a Megatron-core directory or one of its step folders, complete or not."""
    directory = Path(directory)
    if any((directory / name).is_file() for name in (*STEP_FILES, TRACKER_FILE)) or _rank_folders(directory):
        return True
    return bool(step_folders(directory))


def _is_complete(step: Path) -> bool:
    return all((step / name).is_file() for name in STEP_FILES)


def _rank_folders(folder: Path) -> list[Path]:
    """Return what Megatron-LM's older format (torch) keeps in a step: a folder for each model-parallel rank."""
    return sorted(path for path in folder.glob("mp_rank_*") if path.is_dir())


def _refuse_rank_folders(directory: Path) -> None:
    for folder in (directory, *step_folders(directory)):
        if ranks := _rank_folders(folder):
            raise CheckpointError(
                f"{folder} has a folder for each model-parallel rank ({ranks[0].name} and so on): the older format "
                "`torch` of Megatron-LM, which is not read. Megatron-LM upgrades it: start its training script "
                "(pretrain_gpt.py) as it was, with --ckpt-convert-format torch_dist --ckpt-convert-save NEW; "
                "then take NEW"
            )


def _number(step: Path) -> int:
    return -1 if step.name == RELEASE else int(step.name.removeprefix("iter_"))


def _compare_tracker(directory: Path, newest: Path) -> None:
    tracker = directory / TRACKER_FILE
    if not tracker.is_file():
        return
    said = tracker.read_bytes()[:100].decode("utf-8", "replace").strip()
    if said == RELEASE or (said.isascii() and said.isdigit()):
        named = RELEASE if said == RELEASE else step_name(int(said))
        if named == newest.name or (_STEP_NAME.fullmatch(named) and said != RELEASE and int(said) == _number(newest)):
            return
        complete = "is not a complete step" if not _is_complete(directory / named) else "is not the newest step"
        problem = f"points to {named}, which {complete}"
    else:
        problem = "is empty" if not said else f"holds {said!r}"
    print(f"warning: {tracker} {problem}; using {newest.name}", file=sys.stderr, flush=True)
