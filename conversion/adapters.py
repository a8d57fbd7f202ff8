"""LoRA adapters as HuggingFace PEFT keeps them (Hu et al., 2021).

    FOLDER/adapter_config.json          rank, scale, which layers
           adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [rank, columns]
                                        base_model.model.MODULE.lora_B.weight [rows, rank]
                                        base_model.model.MODULE.weight        of layers that were trained whole
           temper_adapter.json          ours: digest of the base's weights, and the format that it was trained on

MODULE is the HuggingFace name of a linear layer. It computes W x + scale * B A x.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args

import torch

from toolkits.foundation.errors import CheckpointError, UsageError, raise_all

from . import safetensors_file
from .digest import weights_digest
from .layout import DTYPES as TYPES
from .mapped_file import MappedFile
from .mcore_directory import ADAPTER_CONFIG, find_step, is_mcore_directory
from .plan import REWARD_HEAD, Plan, Step
from .quantized import BLOCK, BaseFormat, Format
from .safe_files import read_json
from .safetensors_file import DTYPES

CONFIG = ADAPTER_CONFIG
WEIGHTS = "adapter_model.safetensors"
OURS = "temper_adapter.json"
ALL = ("all", "all-linear")
WORDS_TASK, REWARD_TASK = "CAUSAL_LM", "SEQ_CLS"  # as PEFT calls them
_HEADS_OF_PEFT = ("classifier", "score")  # it names both for SEQ_CLS, whichever the model has
PREFIX = "base_model.model."
# Fields of adapter_config.json that change what an adapter computes, and the values that we compute.
_UNDERSTOOD: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # others change the base's weights
}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is: its size, its scale, and the layers that have one.

    `targets` are names or ends of names of modules, or one regular expression that a whole name matches;
    `save_modules` are trained whole. The patterns map an end of a name to a rank or an alpha of its own.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    dropout: float = 0.0
    rslora: bool = False
    save_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    task: str = WORDS_TASK

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return _own(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return what B A x is multiplied by: alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski, 2023)."""
        rank = self.rank_of(module)
        return _own(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def targeted(self, modules: Sequence[str]) -> list[str]:
        """Return those of `modules` that have an adapter; raise UsageError for a target that none matches."""
        if isinstance(self.targets, str):
            found = [module for module in modules if re.fullmatch(self.targets, module)]
            if not found:
                raise UsageError(f"the regular expression {self.targets!r} matches no linear layer{_for(modules)}")
            return found
        problems = [
            f"{target} is no linear layer{_nearest(target, modules)}"
            for target in self.targets
            if not any(_ends_with(module, target) for module in modules)
        ]
        raise_all(UsageError, "adapter targets", problems)
        return [module for module in modules if any(_ends_with(module, target) for target in self.targets)]

    def to_json(self, base: str) -> dict[str, object]:
        """Return adapter_config.json; `base` names the model that it belongs to."""
        return {
            "peft_type": "LORA",
            "task_type": self.task,
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": self.targets if isinstance(self.targets, str) else sorted(self.targets),
            "modules_to_save": list(self.save_modules) or None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
        }


@dataclass(frozen=True)
class LinearPart:
    """A linear layer by its HuggingFace name, and where the plan has it: part number `part` of `step`."""

    module: str
    step: Step
    part: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.step.parts[self.part].shape
        return rows, columns


def linear_parts(plan: Plan) -> dict[str, LinearPart]:
    """Return the linear layers that can have an adapter, those of attention, MLPs and experts, by HuggingFace name."""
    return {
        part.name.removesuffix(".weight"): LinearPart(part.name.removesuffix(".weight"), step, number)
        for step in plan.steps
        if step.is_linear
        for number, part in enumerate(step.parts)
    }


def require_blocks(plan: Plan) -> None:
    """Raise UsageError for matrices whose rows blocks of NF4 do not divide."""
    problems: dict[tuple[int, int], str] = {}  # the first of each shape
    for module, part in linear_parts(plan).items():
        if part.shape[1] % BLOCK:
            problems.setdefault(part.shape, f"{module} is {part.shape[0]} x {part.shape[1]}")
    raise_all(UsageError, f"nf4 takes rows in blocks of {BLOCK} columns (int8 takes any)", list(problems.values()))


def whole_modules(plan: Plan, config: AdapterConfig) -> dict[str, Step]:
    """Return the steps of `save_modules`, the embedding and the head, by HuggingFace name."""
    known = {
        step.parts[0].name.removesuffix(".weight"): step
        for step in plan.steps
        if (step.is_vocabulary and step.layer is None) or step.key == REWARD_HEAD
    }
    problems = [
        f"{name} is neither of {', '.join(known)}"
        for name in config.save_modules
        if not any(_ends_with(module, name) for module in known)
        and not (plan.is_reward_model and name in _HEADS_OF_PEFT)
    ]
    if config.save_modules and plan.tied:
        problems.append("the embedding is the head too (tie_word_embeddings), and PEFT would make two of it")
    raise_all(UsageError, "modules that are trained whole", problems)
    return {
        module: step for module, step in known.items() if any(_ends_with(module, name) for name in config.save_modules)
    }


class Adapter:
    """An adapter on disk: its config and its tensors, read when they are asked for.

    Opening it holds it against `plan`: every module is a linear layer of the model, has both matrices, and they fit.
    Raises CheckpointError that lists everything that is wrong.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory = Path(directory)
        if not (self.directory / CONFIG).is_file():
            raise CheckpointError(f"{self.directory} has no {CONFIG}: it is no adapter")
        self.json = read_json(self.directory / CONFIG)
        self.config = config_of(self.json, self.directory / CONFIG)
        path = self.directory / WEIGHTS
        if not path.is_file():
            old = (
                " (adapter_model.bin is not read: save it as safetensors)"
                * (self.directory / "adapter_model.bin").is_file()
            )
            raise CheckpointError(f"{path} is missing{old}")
        self._stored = safetensors_file.read_header(path)
        self._file = MappedFile(path)
        self.modules: list[str] = []
        self.whole: dict[str, Step] = {}
        self._account(plan)

    @property
    def base_name(self) -> str:
        """What the adapter calls its base; empty when it does not say."""
        return str(self.json.get("base_model_name_or_path") or "")

    @property
    def base_digest(self) -> str | None:
        """The digest of the base's weights, when one of our runs made the adapter."""
        said = self._ours.get("base_digest")
        return said if isinstance(said, str) else None

    @property
    def base_format(self) -> BaseFormat | None:
        """What it was trained on, when one of our runs made it on quantised matrices."""
        said = self._ours.get("base")
        if not isinstance(said, dict):
            return None
        values = [said.get(name) for name in ("format", "dtype", "device")]
        if values[0] not in get_args(Format) or values[1] not in TYPES or not isinstance(values[2], str):
            raise CheckpointError(f"{self.directory / OURS} is damaged: base is {said}")
        return BaseFormat(*(str(value) for value in values))

    @cached_property
    def _ours(self) -> Mapping[str, object]:
        path = self.directory / OURS
        return read_json(path) if path.is_file() else {}

    @property
    def files(self) -> list[Path]:
        """The files that it is read from."""
        return [self.directory / name for name in (CONFIG, WEIGHTS)]

    def require_base(self, folder: Path) -> None:
        """Raise CheckpointError when one of our runs made the adapter on other weights than those in `folder`.

        A HuggingFace directory and a Megatron-core one made of it have different digests: those are not compared.
        """
        made_on, found = self.base_digest, base_digest(folder)
        if made_on is None or made_on.partition(":")[0] != found.partition(":")[0] or made_on == found:
            return
        raise CheckpointError(
            f"{self.directory} was trained on {self.base_name or 'another model'} (weights {made_on}), "
            f"{folder} has other weights ({found})"
        )

    def matrices(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [rank, columns] and B [rows, rank] of a module, as views of the file."""
        return self._read(f"{PREFIX}{module}.lora_A.weight"), self._read(f"{PREFIX}{module}.lora_B.weight")

    def whole_weight(self, module: str) -> torch.Tensor:
        """Return the weight of a module that was trained whole, as a view of the file."""
        return self._read(f"{PREFIX}{module}.weight")

    def _read(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        return self._file.tensor(DTYPES[stored.dtype], stored.shape, stored.start)

    def _account(self, plan: Plan) -> None:
        linear = linear_parts(plan)
        self.whole = whole_modules(plan, self.config)
        expected = {f"{PREFIX}{module}.weight": step.parts[0].shape for module, step in self.whole.items()}
        found = {match[1] for name in self._stored if (match := re.fullmatch(_MATRIX, name))}
        self.modules = [module for module in linear if module in found]
        for module in self.modules:
            rank, (rows, columns) = self.config.rank_of(module), linear[module].shape
            expected[f"{PREFIX}{module}.lora_A.weight"] = (rank, columns)
            expected[f"{PREFIX}{module}.lora_B.weight"] = (rows, rank)
        raise_all(CheckpointError, f"{self.directory} does not fit the model", list(self._problems(expected)))
        if not self.modules and not self.whole:
            raise CheckpointError(f"{self.directory / WEIGHTS} holds no matrix")

    def _problems(self, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        for name, shape in expected.items():
            stored = self._stored.get(name)
            if stored is None:
                yield f"{name} is missing"
            elif stored.dtype not in ("F32", "F16", "BF16"):
                yield f"{name} is {stored.dtype}, not a float type that is read"
            elif stored.shape != shape:
                yield f"{name}: the adapter has {list(stored.shape)}, the base and {CONFIG} make it {list(shape)}"
        for name in self._stored.keys() - expected.keys():
            yield f"{name} belongs to no linear layer of the base"


_MATRIX = re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight"


def config_of(said: Mapping[str, object], path: Path) -> AdapterConfig:
    """Return what an adapter_config.json says; raise CheckpointError for what we would not compute as it asks."""
    problems = [
        f"{name} is {said[name]!r}"
        for name, values in _UNDERSTOOD.items()
        if name in said and not any(said[name] == value and type(said[name]) is type(value) for value in values)
    ]
    raise_all(CheckpointError, f"{path} asks for what is not built", problems)
    try:
        targets = said["target_modules"]
        return AdapterConfig(
            rank=_number(said["r"], int),
            alpha=_number(said["lora_alpha"], float),
            targets=targets if isinstance(targets, str) else _names(targets),
            dropout=_number(said.get("lora_dropout") or 0.0, float),
            rslora=said.get("use_rslora") is True,
            save_modules=_names(said.get("modules_to_save") or ()),
            task=str(said.get("task_type") or WORDS_TASK),
            rank_pattern={str(key): _number(value, int) for key, value in dict(said.get("rank_pattern") or {}).items()},  # type: ignore[call-overload]
            alpha_pattern={
                str(key): _number(value, float)
                for key, value in dict(said.get("alpha_pattern") or {}).items()  # type: ignore[call-overload]
            },
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def base_digest(folder: Path) -> str:
    """Return the digest of a HuggingFace directory's weights, or a Megatron-core one's, with its kind in front."""
    if is_mcore_directory(folder):
        return f"mcore:{weights_digest(find_step(folder))}"
    return f"hf:{weights_digest(folder)}"


def explicit_targets(said: str, plan: Plan) -> tuple[str, ...] | str:
    """Return what `--lora-targets` says: names between commas, `all`, or, with other characters, an expression."""
    words = tuple(word.strip() for word in said.split(",") if word.strip())
    if words and all(word in ALL for word in words):
        return tuple(sorted({module.rpartition(".")[2] for module in linear_parts(plan)}))
    return words if all(re.fullmatch(r"[\w.]+", word) for word in words) and words else said


def write_adapter(
    folder: Path,
    config: AdapterConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    base: str,
    weights: Path,
    quantized: BaseFormat | None = None,
) -> None:
    """Write an adapter's files into `folder`; `tensors` are named without the prefix.

    `base` names the model that it belongs to, `weights` is the folder that they were read from, `quantized` what was
    made of them.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    content = {PREFIX + name: tensor.contiguous() for name, tensor in tensors}
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o666 & ~_umask())
    (folder / CONFIG).write_text(json.dumps(config.to_json(base), indent=2, ensure_ascii=False) + "\n", "utf-8")
    ours = {"version": 1, "base_digest": base_digest(weights), **({"base": asdict(quantized)} if quantized else {})}
    (folder / OURS).write_text(json.dumps(ours) + "\n", "utf-8")


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def _own(pattern: Mapping[str, float], module: str, default: float) -> int:
    """Return a module's own value; PEFT takes the first key that matches an end of the name."""
    key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
    return default if key is None else pattern[key]  # type: ignore[return-value]


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _for(modules: Sequence[str]) -> str:
    ends = sorted({module.rpartition(".")[2] for module in modules})
    return f"; they are {', '.join(ends)}, for example {modules[0]}"


def _nearest(target: str, modules: Sequence[str]) -> str:
    ends = sorted({module.rpartition(".")[2] for module in modules})
    close = difflib.get_close_matches(target.rpartition(".")[2], ends, n=3, cutoff=0.4)
    return f"; nearest are {', '.join(close)}" if close else f"; there are {', '.join(ends)}"


def _names(said: object) -> tuple[str, ...]:
    if not isinstance(said, list | tuple) or not all(isinstance(name, str) for name in said):
        raise ValueError(f"{said!r} is not a list of names")
    return tuple(said)


def _number(said: object, kind: type) -> int:
    if isinstance(said, bool) or not isinstance(said, int | float) or said < 0 or kind(said) != said:
        raise ValueError(f"{said!r} is not a number that can be meant")
    return kind(said)
