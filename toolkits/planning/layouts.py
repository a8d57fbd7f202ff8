"""Every layout that the rules allow, what it needs and how long a step may take; and the one to take."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from conversion.plan import Plan

from ..foundation.errors import UsageError
from ..training.config import TrainConfig
from ..training.layout import Layout, layout_of, layout_problems
from .line import GPUS_OF_NODE
from .memory import USABLE, RankMemory, gigabytes, offload_that_fits, run_memory
from .sizes import sizes_of
from .states import ON_HOST
from .timing import StepTime, step_time
from .weights import Tuning

MICRO_BATCHES = (1, 2, 4, 8, 16)


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

    def holds(self, candidate: "Candidate") -> bool:
        """Return whether every rank of `candidate` fits its GPU."""
        return candidate.bytes <= self.usable_bytes


@dataclass(frozen=True)
class Candidate:
    """A layout, the memory of each of its stages, and the estimated step.

    `offload` is the share of the optimizer's state in CPU memory.
    """

    config: TrainConfig
    layout: Layout
    ranks: list[RankMemory]
    time: StepTime
    offload: float

    @property
    def bytes(self) -> int:
        """Return the memory of the rank that needs most."""
        return max(rank.total for rank in self.ranks)

    @property
    def host_bytes(self) -> int:
        """Return the CPU memory that the ranks of a full node take."""
        return min(self.layout.world, GPUS_OF_NODE) * max(rank.host for rank in self.ranks)

    @property
    def split(self) -> int:
        """Return the number of ranks that hold one replica of the model."""
        return self.layout.world // self.layout.data

    @property
    def name(self) -> str:
        layout, recompute = self.layout, self.config.compute.recompute
        said = f"TP {layout.tensor} x PP {layout.pipeline}"
        said += f" ({layout.chunks} virtual stages a rank)" if layout.chunks > 1 else ""
        said += f" x CP {layout.context}" if layout.context > 1 else ""
        said += f" x EP {layout.expert}" if layout.expert > 1 else ""
        said += f" x ETP {layout.expert_tensor}" if layout.expert_tensor else ""
        said += f" x DP {layout.data}, micro batch {self.config.batch.micro_batch_size}"
        said += f", recompute {recompute}" if recompute != "none" else ""
        return said + (f", {self.offload:.0%} of the optimizer in CPU memory" if self.offload else "")


@dataclass(frozen=True)
class Answer:
    """All layouts that were looked at, the one to take (None: nothing fits), and why."""

    candidates: list[Candidate]
    chosen: Candidate | None
    reason: str


def answer(question: Question) -> Answer:
    """Try every layout and take the one with the shortest estimated step among those that fit.

    Context parallelism is tried where nothing fits without it. Raises UsageError when the rules allow no layout.
    """
    candidates = list(_candidates(question, context=[question.config.layout.context_parallel]))
    if "context_parallel" not in question.fixed and not any(map(question.holds, candidates)):
        candidates += _candidates(question, context=_divisors(question.gpus)[1:])
    if not candidates:
        problems = layout_problems(question.config, question.plan.settings, question.gpus)
        hint = f": {problems[0]}" if problems else "; give a GLOBAL_BATCH_SIZE that more of them divide"
        raise UsageError(f"no layout of {question.gpus} GPUs obeys the rules{hint}")
    fitting = [each for each in candidates if question.holds(each)]
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
    offload = _offload(question, config, layout)
    ranks = run_memory(plan, config, layout, tuning, offload=offload)
    on_cpu = max(rank.states.host for rank in ranks) // ON_HOST
    time = step_time(plan, config, layout, tuning, peak=question.peak_flops, on_cpu=on_cpu)
    return Candidate(config, layout, ranks, time, offload)


def _offload(question: Question, config: TrainConfig, layout: Layout) -> float:
    word = config.optimizer.optimizer_offload
    if word != "auto":
        return float(word)
    try:
        return offload_that_fits(question.plan, config, layout, question.gpu_bytes, question.tuning)
    except UsageError:
        return 1.0


def _candidates(question: Question, *, context: list[int]) -> Iterator[Candidate]:
    model, gpus = question.plan.settings, question.gpus
    divisors = _divisors(gpus)
    layouts = {
        "context_parallel": context,
        "tensor_parallel": [number for number in divisors if number <= GPUS_OF_NODE],  # inside a node
        "pipeline_parallel": divisors,
        "expert_parallel": divisors if sizes_of(question.plan).experts else [1],
    }
    ways = {
        "micro_batch_size": MICRO_BATCHES,
        "recompute": ["none", "full"],
    }
    for config in _variants(question, [question.config], layouts):
        if not layout_problems(config, model, gpus):  # with one row in a micro batch; others may break a rule more
            for way in _variants(question, [config], ways):
                if not layout_problems(way, model, gpus):
                    yield evaluated(question, way)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _variants(
    question: Question, configs: list[TrainConfig], choices: Mapping[str, Sequence[object]]
) -> list[TrainConfig]:
    """Return `configs` with every combination of `choices`; what is fixed stays."""
    for name, values in choices.items():
        if name not in question.fixed:
            configs = [changed(config, **{name: value}) for config in configs for value in values]
    return configs


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    """Return `config` with other settings."""
    return TrainConfig.from_values({**config.values(), **values})


def _reason(question: Question, all_of_them: list[Candidate], fitting: list[Candidate], chosen: Candidate) -> str:
    said = [f"{len(fitting)} of {len(all_of_them)} layouts fit; this one has the shortest estimated step"]
    if chosen.layout.context > 1 and "context_parallel" not in question.fixed:
        without = [each for each in all_of_them if each.layout.context == 1]
        least = min(without, key=lambda each: each.bytes, default=None)
        need = f": {least.name} needs {gigabytes(least.bytes)}" if least else " the rules"
        said.append(f"rows are divided by CP because no layout without it fits{need}")
    smaller = [each for each in all_of_them if each.split < chosen.split]
    if chosen.layout.expert > 1 and "expert_parallel" not in question.fixed:
        said.append(_why_experts_are_divided(all_of_them, fitting, chosen))
    if chosen.split == 1 < chosen.layout.world and chosen.layout.expert == 1:
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


def _why_experts_are_divided(all_of_them: list[Candidate], fitting: list[Candidate], chosen: Candidate) -> str:
    fewer = [each for each in all_of_them if each.layout.expert < chosen.layout.expert]
    if best := min((each for each in fitting if each in fewer), key=_preference, default=None):
        return f"with a smaller EP, {best.name} fits too: about {best.time.seconds:.2f} s a step"
    least = min(fewer, key=lambda each: each.bytes, default=None)
    need = f": {least.name} needs {gigabytes(least.bytes)}" if least else " the rules"
    return f"experts are divided by EP because no layout with a smaller EP fits{need}"


def _nothing_fits(question: Question, candidates: list[Candidate]) -> str:
    """Say how much is missing and what would help, in the order in which to try it."""
    least = min(candidates, key=lambda each: each.bytes)
    usable = gigabytes(question.usable_bytes)
    said = f"nothing fits: the smallest, {least.name}, needs {gigabytes(least.bytes)} of {usable}"
    helps = []
    for words, method, values in (
        ("full recomputation", question.tuning.method, {"recompute": "full"}),
        ("the optimizer in CPU memory", question.tuning.method, {"optimizer_offload": "auto"}),
        ("LoRA", "lora", {"recompute": "none"}),
        ("QLoRA", "qlora", {"recompute": "none"}),
    ):
        tuning = Tuning(method, question.tuning.lora_rank)  # type: ignore[arg-type]
        other = evaluated(dataclasses.replace(question, tuning=tuning), changed(least.config, **values))
        if other.bytes < least.bytes:
            notes = []
            if other.offload > least.offload:
                notes.append(f"OPTIMIZER_OFFLOAD={other.offload:g}, {gigabytes(other.host_bytes)} of CPU memory a node")
            helps.append(f"{words} {gigabytes(other.bytes)}" + (f" ({'; '.join(notes)})" if notes else ""))
    helps += ["a smaller SEQ_LEN", "more GPUs"]
    return f"{said}. What would help there: {', '.join(helps)}."
