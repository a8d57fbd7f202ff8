"""The parallel layout: a small value, checked once against the model and the world, then trusted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..foundation.errors import UsageError, raise_all
from .config import TrainConfig
from .settings import LayoutSettings

# Tokens whose logits exist at once while the loss is computed: enough for the matrix units, and of a vocabulary of
# 152,000 no more than 2.5 GB in fp32.
LOSS_TOKENS = 4096
# Weights whose gradients are reduced at once, when they have as many: enough to fill the links between GPUs.
GRADIENT_BUCKET = 40_000_000
DIVIDED_BY_TENSOR_PARALLEL = {
    "num_attention_heads": "attention heads",
    "num_query_groups": "KV groups",
    "ffn_hidden_size": "feed-forward units",
}


@dataclass(frozen=True)
class Grid:
    """Which rank holds what: the part of a layout that a saved optimizer depends on."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    first_stage_layers: int = 0
    context: int = 1
    chunks: int = 1
    expert: int = 1
    expert_tensor: int = 0

    def __str__(self) -> str:
        said = f"TP{self.tensor} PP{self.pipeline}"
        if self.first_stage_layers:
            said += f" (first stage {self.first_stage_layers} layers)"
        if self.chunks > 1:
            said += f" ({self.chunks} virtual stages a rank)"
        if self.context > 1:
            said += f" CP{self.context}"
        if self.expert > 1 or self.expert_tensor:
            said += f" EP{self.expert} ETP{self.expert_tensor or self.tensor}"
        return f"{said} DP{self.data}"


@dataclass(frozen=True)
class Layout:
    """How `world` ranks are used: world = tensor * pipeline * context * data."""

    world: int
    tensor: int
    pipeline: int
    sequence: bool  # sequence parallel
    micro_batches: int  # of one data-parallel rank in one step
    first_stage_layers: int = 0  # 0: every pipeline stage has as many
    context: int = 1
    chunks: int = 1  # parts of the model on one rank: its virtual pipeline stages
    expert: int = 1  # ranks that share the experts of a layer; they are ranks of TP x CP x DP
    expert_tensor: int = 0  # ranks that share each expert; 0: as many as share a layer

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def grid(self) -> Grid:
        """The layout without what may change from start to start."""
        return Grid(
            self.tensor,
            self.pipeline,
            self.data,
            self.first_stage_layers,
            self.context,
            self.chunks,
            self.expert,
            self.expert_tensor,
        )

    @property
    def segment_multiple(self) -> int:
        """What the length of each conversation in a row is padded to a multiple of.

        Context parallelism cuts each into 2 * CP pieces: a rank gets one from the front and one from the
        back, so that all have as much to attend to.
        """
        return 2 * self.context if self.context > 1 else 1

    @property
    def row_multiple(self) -> int:
        """What the length of a row is padded to a multiple of: sequence parallelism divides it by TP."""
        return self.segment_multiple * self.tensor

    def padded(self, length: int) -> int:
        """Return the tokens that a row of `length` takes."""
        return -(-length // self.row_multiple) * self.row_multiple


def layout_of(config: TrainConfig, model: Mapping[str, Any], world: int) -> Layout:
    """Return the layout, or raise one UsageError with every rule that `config` breaks.

    `model` holds num_layers, num_attention_heads, num_query_groups and ffn_hidden_size, as
    `conversion.settings.mcore_settings` gives them; `world` is the number of ranks.
    """
    raise_all(UsageError, "parallel layout", layout_problems(config, model, world))
    settings, batch = config.layout, config.batch
    replicas, virtual = world // settings.model_parallel, settings.virtual_stage_layers
    return Layout(
        world=world,
        tensor=settings.tensor_parallel,
        pipeline=settings.pipeline_parallel,
        sequence=settings.sequence_parallel and settings.tensor_parallel > 1,
        micro_batches=batch.global_batch_size // (batch.micro_batch_size * replicas),
        first_stage_layers=settings.first_stage_layers,
        context=settings.context_parallel,
        chunks=model["num_layers"] // (settings.pipeline_parallel * virtual) if virtual else 1,
        expert=settings.expert_parallel,
        expert_tensor=settings.expert_tensor_parallel if "num_moe_experts" in model else 0,
    )


def layout_problems(config: TrainConfig, model: Mapping[str, Any], world: int) -> list[str]:
    """Return every rule of the layout that `config` breaks, with the nearest values that would do."""
    settings, batch = config.layout, config.batch
    found = _tensor_problems(settings.tensor_parallel, model)
    found += _pipeline_problems(settings.pipeline_parallel, model["num_layers"], first=settings.first_stage_layers)
    found += _virtual_problems(settings, model["num_layers"])
    if world % settings.model_parallel:
        product = f"TP={settings.tensor_parallel} x PP={settings.pipeline_parallel}"
        if settings.context_parallel > 1:
            product += f" x CP={settings.context_parallel}"
        found.append(f"{product} = {settings.model_parallel} does not divide the {world} ranks")
        return found
    replicas = world // settings.model_parallel
    found += _expert_problems(settings, model, replicas)
    step = batch.micro_batch_size * replicas
    if batch.global_batch_size % step:
        below = batch.global_batch_size // step * step
        nearest = _listed([rows for rows in (below, below + step) if rows])
        found.append(
            f"GLOBAL_BATCH_SIZE {batch.global_batch_size} is not a multiple of "
            f"BATCH_SIZE {batch.micro_batch_size} x DP {replicas} = {step}: use {nearest}"
        )
    elif _interleaves(settings, model["num_layers"]) and batch.global_batch_size // step % settings.pipeline_parallel:
        found.append(
            f"MP_VP interleaves groups of PP={settings.pipeline_parallel} micro batches, and GLOBAL_BATCH_SIZE "
            f"{batch.global_batch_size} makes {batch.global_batch_size // step}: use a multiple of "
            f"{step * settings.pipeline_parallel}"
        )
    return found


def _tensor_problems(tensor: int, model: Mapping[str, Any]) -> list[str]:
    broken = {label: model[key] for key, label in DIVIDED_BY_TENSOR_PARALLEL.items() if model[key] % tensor}
    smallest = min(model[key] for key in DIVIDED_BY_TENSOR_PARALLEL)
    valid = [n for n in range(1, smallest + 1) if not any(model[key] % n for key in DIVIDED_BY_TENSOR_PARALLEL)]
    advice = f"use TP {_listed(valid)}"
    return [
        f"TP={tensor} > {count} {label}: {advice}"
        if tensor > count
        else f"TP={tensor} does not divide {count} {label}: {advice}"
        for label, count in broken.items()
    ]


def _pipeline_problems(pipeline: int, layers: int, *, first: int) -> list[str]:
    if first:
        return _uneven_problems(pipeline, layers, first)
    if layers % pipeline == 0:
        return []
    if pipeline > layers:
        split = f"{pipeline - layers} stages would have no layer"
    else:
        sizes = [layers // pipeline + (stage < layers % pipeline) for stage in range(pipeline)]
        split = "the stages would hold " + "+".join(map(str, sizes)) + " layers"
    valid = [n for n in range(1, layers + 1) if layers % n == 0]
    nearest = sorted(sorted(valid, key=lambda n: abs(n - pipeline))[:2])
    return [f"PP={pipeline} does not divide {layers} layers ({split}): use PP {_listed(nearest)}"]


def _uneven_problems(pipeline: int, layers: int, first: int) -> list[str]:
    if pipeline == 1:
        return [f"MP_PP0_LAYERS {first} needs PP > 1: with one stage all {layers} layers are in it"]
    if first < layers and (layers - first) % (pipeline - 1) == 0:
        return []
    valid = [n for n in range(1, layers) if (layers - n) % (pipeline - 1) == 0]
    if not valid:
        return [f"PP={pipeline} is more than {layers} layers can fill"]
    nearest = sorted(sorted(valid, key=lambda n: abs(n - first))[:2])
    return [
        f"MP_PP0_LAYERS {first} leaves {layers - first} of {layers} layers, which the other {pipeline - 1} stages of "
        f"PP={pipeline} cannot share evenly: use {_listed(nearest)}"
    ]


def _interleaves(settings: LayoutSettings, layers: int) -> bool:
    """Whether a rank holds more than one virtual stage."""
    return 0 < settings.virtual_stage_layers < layers // settings.pipeline_parallel


def _virtual_problems(settings: LayoutSettings, layers: int) -> list[str]:
    virtual, pipeline = settings.virtual_stage_layers, settings.pipeline_parallel
    if not virtual:
        return []
    if pipeline == 1:
        return [f"MP_VP {virtual} needs PP > 1: virtual stages are parts of pipeline stages"]
    if settings.first_stage_layers:
        return ["MP_VP needs stages of the same size: it cannot be combined with MP_PP0_LAYERS"]
    stage = layers // pipeline
    if layers % pipeline or stage % virtual == 0:  # the first is a complaint of its own
        return []
    valid = [n for n in range(1, stage + 1) if stage % n == 0]
    return [f"MP_VP {virtual} does not divide the {stage} layers of a pipeline stage: use {_listed(valid)}"]


def _expert_problems(settings: LayoutSettings, model: Mapping[str, Any], replicas: int) -> list[str]:
    """Hold the experts' ranks, which are those of TP x CP x DP in another order, against the model."""
    experts = model.get("num_moe_experts")
    if experts is None:
        used = {"EP": settings.expert_parallel, "ETP": settings.expert_tensor_parallel}
        return [f"{name}={asked} needs a model with experts" for name, asked in used.items() if asked > 1]
    found = []
    if experts % settings.expert_parallel:
        valid = [n for n in range(1, experts + 1) if experts % n == 0]
        nearest = sorted(sorted(valid, key=lambda n: abs(n - settings.expert_parallel))[:2])
        found.append(f"EP={settings.expert_parallel} does not divide {experts} experts: use {_listed(nearest)}")
    over, width = settings.experts_over, model["moe_ffn_hidden_size"]
    if width % over:
        found.append(f"ETP={over} does not divide the {width} feed-forward units of an expert")
    if settings.expert_parallel == 1 and over != settings.tensor_parallel:
        found.append(
            f"ETP={over} other than TP={settings.tensor_parallel} needs EP > 1: megatron-core 0.16.1 would not sum the "
            "gradients of an expert's copies"
        )
    if settings.tensor_parallel > 1 and not settings.sequence_parallel:
        found.append("experts at TP > 1 need sequence parallelism (SP=true)")
    ranks = settings.tensor_parallel * settings.context_parallel * replicas
    if ranks % (over * settings.expert_parallel):
        found.append(f"ETP={over} x EP={settings.expert_parallel} does not divide the {ranks} ranks of TP x CP x DP")
    return found


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
