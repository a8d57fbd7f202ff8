"""Figures of a whole model: those that people quote, each with its derivation, and the disk that checkpoints take."""

from dataclasses import dataclass

from conversion.plan import Plan

from ..launch.arguments import LAUNCHERS
from ..launch.kinds import ModelSize
from ..training.config import TrainConfig
from .memory import gigabytes
from .sizes import sizes_of
from .states import ELEMENT
from .weights import Tuning, active_parameters, adapter_parameters, model_weights, trained_parameters

QUOTED_RANK = 8  # of the LoRA figures that people quote
OPTIMIZER_ON_DISK = 12  # bytes a parameter: fp32 weight and two fp32 moments


@dataclass(frozen=True)
class Figure:
    """A number of bytes (of parameters for `unit` "parameters") and where it comes from."""

    name: str
    value: float
    derivation: str
    unit: str = "bytes"

    @property
    def text(self) -> str:
        if self.unit == "bytes":
            return gigabytes(self.value)
        return f"{self.value / 1e9:.2f} B" if self.value >= 1e9 else f"{self.value / 1e6:.1f} M"


def quoted(plan: Plan, tuning: Tuning) -> list[Figure]:
    """Return what is said of the model's training memory: states only, summed over all ranks."""
    count, nominal = plan.num_parameters, _nominal(plan)
    billions = f"{count / 1e9:.3f} B"
    quantised, weights = Tuning("qlora"), model_weights(plan)
    matrices = [weight for weight in weights if weight.linear]
    bits = 8 * sum(weight.nf4 for weight in matrices) / sum(weight.count for weight in matrices)
    return [
        *_active(plan),
        Figure(
            "Megatron, AdamW, bf16",
            18 * count,
            f"{billions} x 18 B: weight 2, fp32 gradient 4, fp32 weight 4, two fp32 moments 8",
        ),
        Figure(
            "ZeRO paper's mixed precision",
            16 * count,
            f"{billions} x 16 B: weight 2, gradient 2, fp32 weight 4, moments 8 (Rajbhandari et al., 2020)",
        ),
        Figure(
            '"full" as people quote it',
            16 * nominal,
            f"the same 16 B x the name's {nominal / 1e9:g} B instead of {billions}",
        ),
        Figure(
            "bf16 gradients and moments",
            12 * count,
            f"{billions} x 12 B: weight 2, gradient 2, fp32 weight 4, two bf16 moments 4 (not built yet)",
        ),
        *(_lora(plan, rank) for rank in sorted({QUOTED_RANK, tuning.lora_rank})),
        Figure(
            "QLoRA's frozen weights",
            sum(weight.frozen_bytes(quantised, ELEMENT["bf16"]) for weight in weights),
            f"matrices of the layers {bits:.3f} bits (NF4, double quantisation), all else 2 B",
        ),
    ]


def _active(plan: Plan) -> list[Figure]:
    if (experts := sizes_of(plan).experts) is None:
        return []
    said = f"all but the {experts.number - experts.chosen} of {experts.number} experts that a token does not choose"
    return [Figure("active parameters", active_parameters(plan), f"{said}, both embeddings", unit="parameters")]


def _lora(plan: Plan, rank: int) -> Figure:
    adapters, count = adapter_parameters(plan, Tuning("lora", rank)), plan.num_parameters
    return Figure(
        f"LoRA r={rank}, all matrices",
        adapters,
        "r x (rows + columns) of q, k, v, o, gate, up, down, and their like, of every layer: "
        f"{adapters / count:.3%} of {count / 1e9:.3f} B",
        unit="parameters",
    )


def disk_bytes(plan: Plan, config: TrainConfig, tuning: Tuning) -> int:
    """Return the space that checkpoints take: KEEP_LAST and the one being written, weights and optimizer."""
    count = trained_parameters(plan, tuning)
    return (config.output.keep_last + 1) * count * (ELEMENT[config.compute.precision] + OPTIMIZER_ON_DISK)


def _nominal(plan: Plan) -> float:
    """Return the size in the lists of the family's launchers that is nearest: the number in the model's name."""
    of_family = [each for each in LAUNCHERS.values() if plan.family.name in each.families]
    kinds = [entry.kind for launcher in of_family or LAUNCHERS.values() for entry in launcher.positions]
    sizes = [kind.read(word) for kind in kinds if isinstance(kind, ModelSize) for word in kind.known]
    return min((size for size in sizes if size is not None), key=lambda size: abs(size - plan.num_parameters))
