"""Every layout that the rules allow, what it needs and how long a step may take; and the one to take."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from conversion.plan import Plan

from ..foundation.errors import UsageError
from ..training.config import TrainConfig
from ..training.layout import Layout, layout_of, layout_problems
from .line import GPUS_OF_NODE, not_built
from .memory import RankMemory, run_memory
from .timing import StepTime, step_time
from .weights import Tuning

MICRO_BATCHES = (1, 2, 4, 8, 16)
# Of a card's memory; the rest is for the driver's context, NCCL's buffers and what the allocator cannot use.
USABLE = 0.92


@dataclass(frozen=True)
class Question:
    """What is asked: a model, settings, and the machine; `fixed` names the settings that are not searched."""

    plan: Plan
    config: TrainConfig
    tuning: Tuning
    gpus: int
    gpu_bytes: int
    peak_flops: float | None = None
    fixed: frozenset[str] = frozenset()

    @property
    def usable_bytes(self) -> int:
        return int(self.gpu_bytes * USABLE)


@dataclass(frozen=True)
class Candidate:
    """A layout, the memory of each of its stages, and the estimated step."""

    config: TrainConfig
    layout: Layout
    ranks: list[RankMemory]
    time: StepTime

    @property
    def bytes(self) -> int:
        """Return the memory of the rank that needs most."""
        return max(rank.total for rank in self.ranks)

    @property
    def split(self) -> int:
        """Return the number of ranks that hold one replica of the model."""
        return self.layout.tensor * self.layout.pipeline

    @property
    def name(self) -> str:
        settings = self.config
        recompute = settings.compute.recompute
        return (
            f"TP {self.layout.tensor} x PP {self.layout.pipeline} x DP {self.layout.data}, micro batch "
            f"{settings.batch.micro_batch_size}" + (f", recompute {recompute}" if recompute != "none" else "")
        )


@dataclass(frozen=True)
class Answer:
    """All layouts that were looked at, the one to take (None: nothing fits), and why."""

    candidates: list[Candidate]
    chosen: Candidate | None
    reason: str


def answer(question: Question) -> Answer:
    """Try every layout and take the one with the shortest estimated step among those that fit.

    Raises UsageError when the rules allow no layout at all.
    """
    candidates = list(_candidates(question))
    if not candidates:
        problems = layout_problems(question.config, question.plan.settings, question.gpus)
        hint = f": {problems[0]}" if problems else "; give a GLOBAL_BATCH_SIZE that more of them divide"
        raise UsageError(f"no layout of {question.gpus} GPUs obeys the rules{hint}")
    fitting = [each for each in candidates if each.bytes <= question.usable_bytes]
    if not fitting:
        return Answer(candidates, None, _nothing_fits(question, candidates))
    chosen = min(fitting, key=_preference)
    return Answer(candidates, chosen, _reason(question, candidates, fitting, chosen))


def _preference(candidate: Candidate) -> tuple[float, int, int]:
    return candidate.time.seconds, candidate.split, candidate.bytes


def evaluated(question: Question, config: TrainConfig) -> Candidate:
    """Return what `config` needs; raise UsageError with every rule that it breaks."""
    plan, tuning = question.plan, question.tuning
    layout = layout_of(config, plan.settings, question.gpus)
    time = step_time(plan, config, layout, tuning, peak=question.peak_flops)
    return Candidate(config, layout, run_memory(plan, config, layout, tuning), time)


def _candidates(question: Question) -> Iterator[Candidate]:
    for config in _configs(question):
        if not layout_problems(config, question.plan.settings, question.gpus):
            yield evaluated(question, config)


def _configs(question: Question) -> Iterator[TrainConfig]:
    divisors = [number for number in range(1, question.gpus + 1) if question.gpus % number == 0]
    recompute = ["none"] + ([] if not_built("full", "full") else ["full"])
    choices = {
        "tensor_parallel": [number for number in divisors if number <= GPUS_OF_NODE],  # inside a node
        "pipeline_parallel": divisors,
        "micro_batch_size": MICRO_BATCHES,
        "recompute": recompute,
    }
    found = [question.config]
    for name, values in choices.items():
        if name not in question.fixed:
            found = [changed(config, **{name: value}) for config in found for value in values]
    return iter(found)


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    """Return `config` with other settings."""
    return TrainConfig.from_values({**config.values(), **values})


def _reason(question: Question, all_of_them: list[Candidate], fitting: list[Candidate], chosen: Candidate) -> str:
    said = [f"{len(fitting)} of {len(all_of_them)} layouts fit; this one has the shortest estimated step"]
    smaller = [each for each in all_of_them if each.split < chosen.split]
    if chosen.split == 1 < chosen.layout.world:
        said.append("the model fits one GPU, so all GPUs are data parallel and nothing is sent inside a layer")
    elif smaller and not any(each in fitting for each in smaller):
        least = min(smaller, key=lambda each: each.bytes)
        said.append(f"it splits the model least: {least.name} needs {gigabytes(least.bytes)}")
    elif smaller:
        best = min((each for each in fitting if each in smaller), key=_preference)
        said.append(f"with less splitting, {best.name} fits too: about {best.time.seconds:.2f} s a step")
    others = [each for each in fitting if each.layout != chosen.layout and each not in smaller]
    if others:
        next_best = min(others, key=_preference)
        said.append(f"the next is {next_best.name} with about {next_best.time.seconds:.2f} s a step")
    return "; ".join(said) + "."


def _nothing_fits(question: Question, candidates: list[Candidate]) -> str:
    """Say how much is missing and what would help, in the order in which to try it."""
    least = min(candidates, key=lambda each: each.bytes)
    usable = gigabytes(question.usable_bytes)
    said = f"nothing fits: the smallest, {least.name}, needs {gigabytes(least.bytes)} of {usable}"
    helps = []
    for words, method, recompute in (
        ("full recomputation", "full", "full"),
        ("LoRA", "lora", "none"),
        ("QLoRA", "qlora", "none"),
    ):
        tuning = Tuning(method, question.tuning.lora_rank)  # type: ignore[arg-type]
        other = dataclasses.replace(question, tuning=tuning, config=changed(question.config, recompute=recompute))
        if (tuning, recompute) == (question.tuning, least.config.compute.recompute):
            continue
        bytes_ = evaluated(other, changed(least.config, recompute=recompute)).bytes
        if bytes_ < least.bytes:
            missing = not_built(method, recompute)
            helps.append(f"{words} {gigabytes(bytes_)}" + (f" ({missing[0]})" if missing else ""))
    helps += ["a smaller SEQ_LEN", "more GPUs"]
    return f"{said}. What would help there: {', '.join(helps)}."


def gigabytes(bytes_: float) -> str:
    """Return `bytes_` in GB of 10^9."""
    return f"{bytes_ / 1e9:.1f} GB"
