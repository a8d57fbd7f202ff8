"""The memory of one rank: states, activations, logits, and what is needed for a moment."""

from dataclasses import dataclass

from conversion.plan import Plan

from ..training.config import TrainConfig
from ..training.layout import Layout
from . import activations
from .states import States, states
from .weights import Tuning, sizes_of, stage_weights

ADAM_TEMPORARY = 4  # bytes a parameter: torch's AdamW takes the square root of all second moments at once


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its worst moment; every tensor-parallel rank of the stage has the same."""

    stage: int
    replica: int
    states: States
    activations: int
    logits: int
    backward: int  # beside activations and logits: the largest weight's gradient, gathered tokens, a layer's gradients
    step: int  # beside the states while the optimizer steps; activations are gone by then

    @property
    def total(self) -> int:
        return self.states.total + max(self.activations + self.logits + self.backward, self.step)


def run_memory(
    plan: Plan, config: TrainConfig, layout: Layout, tuning: Tuning, *, every_replica: bool = False
) -> list[RankMemory]:
    """Return the memory of each pipeline stage, for its first data-parallel rank or for every one."""
    replicas = range(layout.data if every_replica else 1)
    return [
        _rank_memory(plan, config, layout, tuning, stage=stage, replica=replica)
        for stage in range(layout.pipeline)
        for replica in replicas
    ]


def _rank_memory(
    plan: Plan, config: TrainConfig, layout: Layout, tuning: Tuning, *, stage: int, replica: int
) -> RankMemory:
    sizes, batch = sizes_of(plan), activations.micro_batch(config, layout)
    weights = stage_weights(plan, layout, stage)
    held = states(
        weights,
        tuning,
        precision=config.compute.precision,
        replicas=layout.data,
        replica=replica,
        distributed=config.layout.distributed_optimizer,
    )
    last = stage == layout.pipeline - 1
    full = tuning.method == "full"
    gradient = max(weight.count if full else weight.adapter * tuning.lora_rank for weight in weights) * batch.element
    gathered = batch.tokens * batch.element * sizes.hidden if layout.sequence else 0
    mlp_gradients = 0 if last else 5 * batch.tokens * batch.element * sizes.ffn // layout.tensor
    return RankMemory(
        stage=stage,
        replica=replica,
        states=held,
        activations=activations.stage_bytes(sizes, batch, layout, tuning, stage=stage),
        logits=activations.logits_bytes(sizes, batch) if last else 0,
        backward=gradient + gathered + mlp_gradients,
        step=ADAM_TEMPORARY * held.updated,
    )
