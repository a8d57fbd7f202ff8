"""LoRA as the settings ask for it: which layers have adapters, how large, and what they start from."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from conversion.adapters import (
    REWARD_TASK,
    WORDS_TASK,
    Adapter,
    AdapterConfig,
    explicit_targets,
    linear_parts,
    require_blocks,
    whole_modules,
    write_adapter,
)
from conversion.layout import name_of
from conversion.mcore_checkpoint import McoreCheckpoint
from conversion.plan import Plan, Step
from conversion.quantized import BaseFormat, Format

from ..foundation.errors import UsageError, raise_all
from ..planning.weights import Tuning, chunk_layers
from .config import TrainConfig
from .layout import Layout
from .settings import LoraSettings, Quantize
from .sources import ModelSource


@dataclass(frozen=True)
class Lora:
    """The adapters of a run: what they are, the layers that have one, and where their first values come from.

    `quantize` is the format of the layers' matrices, None: that of the run.
    """

    config: AdapterConfig
    modules: frozenset[str]
    whole: dict[str, Step]
    origin: Adapter | None
    quantize: Format | None = None

    @classmethod
    def of(cls, config: TrainConfig, source: ModelSource) -> "Lora | None":
        """Return what the settings say of a model; None without adapters.

        Raises UsageError for targets that match nothing and ranks that are larger than a layer, CheckpointError for
        an adapter that does not fit the model or was made for other weights.
        """
        settings, plan = config.lora, source.plan
        if not settings.is_used:
            return None
        if settings.adapter is not None:
            origin = Adapter(settings.adapter, plan)
            if (folder := source.hf_weights or source.mcore_weights) is not None:
                origin.require_base(folder)
            modules, said = origin.modules, _of_task(origin.config, plan)
        else:
            origin, said = None, _config(settings, plan)
            modules = said.targeted(list(linear_parts(plan)))
        _require_rank(said, modules, plan)
        if settings.quantize == "nf4":
            require_blocks(plan)
        return cls(said, frozenset(modules), whole_modules(plan, said), origin, _format(settings.quantize))

    @property
    def tuning(self) -> Tuning:
        """What is trained, as the planner has it."""
        targets = frozenset(module.rpartition(".")[2] for module in self.modules)
        whole = frozenset(step.key for step in self.whole.values())
        return Tuning("qlora" if self.quantize else "lora", self.config.rank, targets, self.quantize or "nf4", whole)

    def require_layout(self, plan: Plan, layout: Layout) -> None:
        """Raise UsageError when a chunk of the model would have nothing to train."""
        linear, count = linear_parts(plan), int(str(plan.settings["num_layers"]))
        adapted = {linear[module].step.layer for module in self.modules}
        problems = []
        for stage in range(layout.pipeline):
            for chunk in range(layout.chunks):
                layers = chunk_layers(layout, count, stage=stage, chunk=chunk)
                if adapted.isdisjoint(layers):
                    problems.append(f"layers {layers.start} to {layers.stop - 1} have none")
        raise_all(UsageError, "every pipeline stage needs an adapter to train (--lora-targets)", problems)


def _of_task(said: AdapterConfig, plan: Plan) -> AdapterConfig:
    """Return an adapter's config for training: with a reward model the head is trained, whatever it was before."""
    if not plan.is_reward_model:
        return said
    return replace(said, task=REWARD_TASK, save_modules=tuple(dict.fromkeys((*said.save_modules, "score"))))


def _config(settings: LoraSettings, plan: Plan) -> AdapterConfig:
    return AdapterConfig(
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=explicit_targets(settings.lora_targets, plan),
        dropout=settings.lora_dropout,
        rslora=settings.rslora,
        save_modules=tuple(name.strip() for name in settings.lora_save_modules.split(",") if name.strip())
        + (("score",) if plan.is_reward_model else ()),
        task=REWARD_TASK if plan.is_reward_model else WORDS_TASK,
    )


def _require_rank(config: AdapterConfig, modules: list[str], plan: Plan) -> None:
    linear = linear_parts(plan)
    over: dict[tuple[int, int], str] = {}  # the first of each shape
    for module in modules:
        if config.rank_of(module) > min(linear[module].shape):
            over.setdefault(linear[module].shape, module)
    raise_all(
        UsageError,
        f"--lora-rank {config.rank} is more than a layer has",
        [f"{module} is {rows} x {columns}" for (rows, columns), module in over.items()],
    )


def _format(said: Quantize) -> Format | None:
    return None if said == "none" else said


def write_peft(lora: Lora, source: ModelSource, dtype: torch.dtype, step_folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a step folder, from what it holds.

    `dtype` is the type that the run computes in.
    """
    checkpoint = McoreCheckpoint(step_folder)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for module in sorted(lora.modules):
            yield f"{module}.lora_A.weight", checkpoint.whole(f"{module}.lora_A")
            sections = [key for key in checkpoint.tensors if key.startswith(f"{module}.lora_B.")]
            sections.sort(key=lambda key: int(key.rpartition(".")[2]))
            yield f"{module}.lora_B.weight", torch.cat([checkpoint.whole(key) for key in sections])
        for module, step in lora.whole.items():
            yield f"{module}.weight", checkpoint.whole(step.key)

    folder = source.hf_weights or source.mcore_weights
    assert folder is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantized = BaseFormat(lora.quantize, name_of(dtype), device) if lora.quantize else None
    base = str(source.hf_files.absolute())
    write_adapter(step_folder, lora.config, tensors(), base=base, weights=folder, quantized=quantized)
