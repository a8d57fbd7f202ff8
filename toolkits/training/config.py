"""All settings of a training run together: read from values, written as flags, checked against each other."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..foundation.errors import UsageError, raise_all
from .settings import (
    BatchSettings,
    ComputeSettings,
    DataSettings,
    KtoSettings,
    LayoutSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
    PreferenceSettings,
    ReferenceSettings,
    RewardSettings,
)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one run."""

    model: ModelSettings
    data: DataSettings
    layout: LayoutSettings
    batch: BatchSettings
    compute: ComputeSettings
    lora: LoraSettings
    reference: ReferenceSettings
    preference: PreferenceSettings
    reward: RewardSettings
    kto: KtoSettings
    optimizer: OptimizerSettings
    output: OutputSettings

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "TrainConfig":
        """Build the groups from flat `{field name: value}`; absent fields take their defaults."""
        return cls(
            **{
                group: kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})
                for group, kind in get_type_hints(cls).items()
            }
        )

    def values(self) -> dict[str, Any]:
        """Return flat `{field name: value}`."""
        return {s.name: getattr(getattr(self, s.group), s.name) for s in all_settings()}

    def flags(self) -> list[str]:
        """Return the command line that says the same; settings at their default are left out."""
        result = []
        for item in all_settings():
            value = getattr(getattr(self, item.group), item.name)
            if value == item.default:
                continue
            if item.type is bool:
                result.append(item.flag if value else item.flag.replace("--", "--no-", 1))
            else:
                result += [item.flag, str(value)]
        return result

    def problems(self) -> list[str]:
        """Return every complaint that needs neither a file nor a model."""
        found = [
            problem
            for item in all_settings()
            for problem in item.problems(getattr(getattr(self, item.group), item.name))
        ]
        optimizer, batch = self.optimizer, self.batch
        if optimizer.min_lr > optimizer.lr:
            found.append(f"--min-lr {optimizer.min_lr} is larger than --lr {optimizer.lr}")
        if bool(batch.train_iters) == bool(batch.epochs):
            found.append("give either --train-iters or --epochs")
        if optimizer.optimizer_offload != "auto" and not _is_share(optimizer.optimizer_offload):
            found.append(f"--optimizer-offload {optimizer.optimizer_offload} must be a number from 0 to 1, or auto")
        elif optimizer.offloads and not self.layout.distributed_optimizer and self.compute.is_half:
            found.append("--optimizer-offload needs --distributed-optimizer: megatron-core's plain one cannot move")
        if batch.train_iters and optimizer.warmup_iters >= batch.train_iters:
            found.append(
                f"--warmup-iters {optimizer.warmup_iters} leaves nothing of --train-iters {batch.train_iters}: "
                "the warm-up is part of the training steps"
            )
        found += self.data.problems() + self.lora.problems()
        found += self.reference.problems(self.lora) + self.preference.problems()
        if not self.output.name or "/" in self.output.name or self.output.name.startswith("."):
            found.append(f"--name {self.output.name!r} must be the name of one folder")
        if self.model.checkpoint == "none" and self.model.hf_config is None:
            found.append("--checkpoint none trains from random weights and needs --hf-config (HF_CONFIG)")
        if self.model.checkpoint == "none" and self.lora.is_used:
            found.append("--checkpoint none: adapters (--lora-rank, --adapter) need the weights that they stand beside")
        return found

    def check(self) -> None:
        """Raise UsageError with all complaints of `problems`."""
        raise_all(UsageError, "settings", self.problems())


def _is_share(word: str) -> bool:
    try:
        return 0 <= float(word) <= 1
    except ValueError:
        return False


@dataclass(frozen=True)
class Setting:
    """One declared field, as flags and documents need it."""

    group: str
    name: str
    type: Any
    default: Any
    help: str
    at_least: float | None
    below: float

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal, else nothing."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def problems(self, value: Any) -> list[str]:
        if self.at_least is not None and not self.at_least <= value < self.below:  # written so that a nan fails too
            limit = "" if self.below == math.inf else f" and below {self.below:g}"
            return [f"{self.flag} is {value}, must be a number of at least {self.at_least:g}{limit}"]
        if self.choices and value not in self.choices:
            return [f"{self.flag} is {value}, must be one of {', '.join(self.choices)}"]
        return []


def all_settings() -> Iterator[Setting]:
    """Yield every setting in the order of declaration."""
    for group, kind in get_type_hints(TrainConfig).items():
        types = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            yield Setting(group, field.name, types[field.name], field.default, **field.metadata)
