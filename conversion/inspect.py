"""What a directory is, as far as it can be told: complete, foreign or damaged."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from toolkits.foundation.errors import CheckpointError

from .hf_as_mcore import HfAsMcore
from .hf_checkpoint import KINDS, SIDECAR_FILES, read_config
from .layout import name_of
from .mcore_as_hf import McoreAsHf
from .mcore_directory import find_step, hf_folder, is_mcore_directory, is_weight, step_folders
from .plan import plan_for
from .report import REPORT_FILE
from .safe_files import read_json
from .safe_pickle import read_metadata
from .settings import untrainable_reasons

_Found = TypeVar("_Found")

_UNKNOWN = "unknown"
_OF_A_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\..+")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|word_embeddings)\.weight")
_TOKENIZER = [name for name in SIDECAR_FILES if name not in ("config.json", "generation_config.json")]


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class _Findings:
    """What was found, and a sentence for everything that is missing or wrong."""

    def __init__(self) -> None:
        self.said: dict[str, object] = {}
        self.problems: list[str] = []

    def add(self, **found: object) -> None:
        """Note what is known: neither None nor an empty collection is."""
        self.said |= {name: value for name, value in found.items() if value not in (None, [], {})}

    def attempt(self, probe: Callable[..., _Found], *arguments: object) -> _Found | None:
        """Return what `probe` returns; where it cannot say, note why and return None."""
        try:
            return probe(*arguments)
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
        if problem not in self.problems:
            self.problems.append(problem)
        return None


def inspect(directory: Path) -> dict[str, object]:
    """Return what a directory is, in plain values; `problems` says what is missing or wrong.

    Raises CheckpointError only when there is no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder")
    found = _Findings()
    found.add(directory=str(directory), format=_format_of(directory))
    tensors: dict[str, _Tensor] = {}
    config_folder: Path | None = directory
    if is_mcore_directory(directory):
        tensors = _megatron(directory, found)
        config_folder = found.attempt(hf_folder, directory)
    elif found.said["format"] == _UNKNOWN:
        found.problems.append("no config.json, no weights and no step folder in it")
    else:
        tensors = _huggingface(directory, found)
    if config_folder is not None and (tensors or (config_folder / "config.json").exists()):
        _model(config_folder, found)
    _weights(tensors, found)
    if tensors:
        found.attempt(McoreAsHf if is_mcore_directory(directory) else HfAsMcore, directory)
    found.said["problems"] = found.problems
    return found.said


def describe(said: Mapping[str, object]) -> str:
    """Return the lines that `temper convert inspect` prints."""
    width = max(map(len, said))
    lines = [f"{name:{width}}  {_text(value)}" for name, value in said.items() if name != "problems"]
    problems = said["problems"]
    assert isinstance(problems, list)
    if not problems:
        return "\n".join([*lines, f"{'problems':{width}}  none found"])
    return "\n".join([*lines, "problems", *("  - " + problem.replace("\n", "\n  ") for problem in problems)])


def _format_of(directory: Path) -> str:
    if any(path for pattern in ("mp_rank_*", "*/mp_rank_*") for path in directory.glob(pattern)):
        return "Megatron-LM checkpoint of an older format (mp_rank folders), which is not read"
    if is_mcore_directory(directory):
        return "Megatron-core directory (torch_dist)"
    if any(directory.glob("*.safetensors*")):
        return "HuggingFace directory (safetensors)"
    if any(directory.glob("pytorch_model*.bin*")):
        return "HuggingFace directory (pytorch_model.bin)"
    if (directory / "config.json").exists():
        return "HuggingFace directory without weights"
    if any(directory.glob("*.idx")):
        return "folder of datasets (see temper data show)"
    return _UNKNOWN


def _megatron(directory: Path, found: _Findings) -> dict[str, _Tensor]:
    found.add(steps=[path.name for path in step_folders(directory)])
    step = found.attempt(find_step, directory)
    metadata = found.attempt(read_metadata, step) if step is not None else None
    if step is None or metadata is None:
        return {}
    common = "common.pt" if (step / "common.pt").is_file() else "a common_state object, as of megatron-core 0.19"
    backend = found.attempt(read_json, step / "metadata.json") or {}
    found.add(
        step=step.name,
        version=f"{backend.get('sharded_backend')} {backend.get('sharded_backend_version')}, {common}",
        layer_keys="one for each layer" if any(map(_OF_A_LAYER.fullmatch, metadata.tensors)) else "merged",
        beside_weights=sorted({key.split(".")[0] for key in metadata.tensors if not is_weight(key)}),
    )
    _record(step.parent if step.name == "release" else step, found)
    missing = {chunk.file for tensor in metadata.tensors.values() for chunk in tensor.chunks}
    found.problems += [f"{step / name} is missing" for name in sorted(missing) if not (step / name).is_file()]
    return {
        key: _Tensor(name_of(stored.dtype), stored.shape) for key, stored in metadata.tensors.items() if is_weight(key)
    }


def _huggingface(directory: Path, found: _Findings) -> dict[str, _Tensor]:
    _record(directory, found)
    tensors = {}
    for kind in KINDS:
        suffix = Path(kind.single).suffix
        files = [path for path in sorted(directory.glob(f"*{suffix}")) if path.is_file()]
        headers = {path.name: found.attempt(kind.read_header, path) for path in files}
        found.add(files=[f"{name} ({path.stat().st_size:,} bytes)" for name, path in zip(headers, files, strict=True)])
        tensors = {
            name: _Tensor(stored.dtype, stored.shape)
            for header in headers.values()
            for name, stored in (header or {}).items()
        }
        if tensors:
            break
    return tensors


def _record(root: Path, found: _Findings) -> None:
    if (root / REPORT_FILE).is_file() and (report := found.attempt(read_json, root / REPORT_FILE)):
        found.add(made=f"by temper {report.get('temper')} {report.get('made')} from {report.get('source')}")
        found.add(verdict=report.get("verdict"))


def _model(folder: Path, found: _Findings) -> None:
    config = found.attempt(read_config, folder)
    tokenizer = sorted(path.name for pattern in _TOKENIZER for path in folder.glob(pattern))
    if not any(name.startswith(("tokenizer.", "vocab.", "spiece.", "sentencepiece.")) for name in tokenizer):
        found.problems.append(f"{folder} has no tokenizer")
    if config is None:
        found.add(tokenizer=tokenizer)
        return
    said = config.get("dtype", config.get("torch_dtype"))
    found.add(
        architecture=config.get("architectures"), config_dtype=said, transformers=config.get("transformers_version")
    )
    plan = found.attempt(plan_for, config)
    if plan is not None:
        found.add(
            family=plan.family.name,
            layers=plan.settings["num_layers"],
            hidden_size=plan.settings["hidden_size"],
            vocabulary=plan.settings["vocab_size"],
            tied_embeddings=plan.tied,
            reward_model=plan.is_reward_model or None,
            config_parameters=plan.num_parameters,
            not_trained_here=untrainable_reasons(config),
        )
    found.add(tokenizer=tokenizer)


def _weights(tensors: Mapping[str, _Tensor], found: _Findings) -> None:
    if not tensors:
        return
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    layers = {int(match[1]) for match in map(_OF_A_LAYER.fullmatch, tensors) if match}
    rows = [tensor.shape[0] for name, tensor in tensors.items() if _EMBEDDING.fullmatch(name) and tensor.shape]
    found.add(
        tensors=len(tensors),
        parameters=sum(dtypes.values()),
        parameters_by_type=dtypes,
        layers_found=len(layers) or None,
        vocabulary_rows=rows[0] if rows else None,
    )


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
