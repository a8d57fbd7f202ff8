"""The memory of one rank: states, activations, logits, and what is needed for a moment."""

from dataclasses import dataclass

from conversion.plan import Plan

from ..foundation.errors import UsageError
from ..training.config import TrainConfig
from ..training.layout import Layout
from . import activations
from .layer import MicroBatch, dispatched_bytes, micro_batch
from .sizes import Sizes, sizes_of
from .states import MASTER, ON_HOST, States, Storage, states, storage_of
from .weights import Tuning, Weight, registered_elements, stage_weights

# Of a card's memory; the rest is for the driver's context, NCCL's buffers and what the allocator cannot use.
USABLE = 0.92


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its worst moment; `host` is CPU memory.

    The ranks of a stage differ in the optimizer's state, by some padding.
    """

    stage: int
    states: States
    activations: int
    logits: int  # at the loss
    backward: int  # behind it: the largest weight's gradient, gathered tokens, a layer's gradients
    start: int  # while an optimizer with a part in CPU memory is built
    host: int

    @property
    def total(self) -> int:
        return max(self.states.total + self.activations + max(self.logits, self.backward), self.start)


def run_memory(
    plan: Plan,
    config: TrainConfig,
    layout: Layout,
    tuning: Tuning,
    *,
    offload: float = 0.0,
    every_rank: bool = False,
) -> list[RankMemory]:
    """Return the memory of each pipeline stage's first rank, or of every rank.

    `offload` is the share of the optimizer's state in CPU memory: what the settings' word comes to.
    """
    sizes, batch = sizes_of(plan), micro_batch(config, layout)
    found, ranks = [], layout.world // layout.pipeline
    for stage in range(layout.pipeline):
        chunks, registered = stage_weights(plan, layout, stage), registered_elements(plan, layout, stage=stage)
        parts = (sizes, batch, tuning)
        kept = activations.stage_bytes(*parts, stage=stage)
        logits = activations.logits_bytes(sizes, batch, tuning) if stage == layout.pipeline - 1 else 0
        backward = _backward_bytes(chunks, batch, tuning, sizes)
        on_host = activations.host_bytes(*parts, stage=stage)
        for rank in range(stage * ranks, (stage + 1) * ranks if every_rank else stage * ranks + 1):
            storage = storage_of(config, layout, rank=rank, offload=offload)
            held = states(chunks, tuning, storage, registered=registered)
            start, start_on_host = _start_bytes(chunks, held, storage) if offload else (0, 0)
            host = max(held.host + on_host, start_on_host)
            found.append(RankMemory(stage, held, kept, logits, backward, start, host))
    return found


def offload_that_fits(
    plan: Plan, config: TrainConfig, layout: Layout, gpu_bytes: int, tuning: Tuning | None = None
) -> float:
    """Return the smallest tenth of the optimizer's state whose move to CPU memory makes a run fit GPUs of `gpu_bytes`.

    0.0 when it fits as it is. Raises UsageError when it does not even without any of that state.
    """
    usable = int(gpu_bytes * USABLE)
    needed = 0
    for tenth in range(11):
        ranks = run_memory(plan, config, layout, tuning or Tuning(), offload=tenth / 10)
        needed = max(rank.total for rank in ranks)
        if needed <= usable:
            return tenth / 10
    raise UsageError(
        f"OPTIMIZER_OFFLOAD=auto: with the whole optimizer's state in CPU memory a rank still needs "
        f"{gigabytes(needed)} of {gigabytes(usable)} ({USABLE:.0%} of a GPU's {gigabytes(gpu_bytes)}); recompute with "
        "AC=full, take a smaller BATCH_SIZE or SEQ_LEN, or a larger TP or PP"
    )


def gigabytes(bytes_: float) -> str:
    """Return `bytes_` in GB of 10^9."""
    return f"{bytes_ / 1e9:.1f} GB"


def _backward_bytes(chunks: list[list[Weight]], batch: MicroBatch, tuning: Tuning, sizes: Sizes) -> int:
    every = [each for weights in chunks for each in weights]
    counts = [one.count for each in every for one in each.trained(tuning)]
    if tuning.method == "qlora":  # the matrix that is being multiplied
        counts += [each.count for each in every if each.linear]
    gathered = batch.tokens * batch.element * sizes.hidden if batch.inside < batch.tokens else 0
    mlp_gradients = 3 * batch.tokens * batch.element * sizes.ffn // batch.tensor
    keys = 2 * batch.gathered * batch.element * (sizes.key + sizes.value) // batch.tensor  # those and their gradients
    return max(counts, default=0) * batch.element + gathered + max(mlp_gradients, dispatched_bytes(sizes, batch)) + keys


def _start_bytes(chunks: list[list[Weight]], held: States, storage: Storage) -> tuple[int, int]:
    """Return GPU and CPU memory while the optimizer is built.

    megatron-core's HybridDeviceOptimizer first copies all weights of the rank in fp32, offloaded ones to CPU
    memory and the others on the GPU; then it is built again with those that the rank updates.
    """
    copied = MASTER * sum(each.count for weights in chunks for each in weights)
    left = int(copied * (1 - storage.offload)) if storage.element < MASTER else 0
    host = int(copied * storage.offload) + held.host * MASTER // ON_HOST
    return held.parameters + held.gradients + held.masters + left, host
