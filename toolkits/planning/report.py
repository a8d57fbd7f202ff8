"""What a plan says: one value that a machine can read, made of the question and its answer."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conversion.settings import untrainable_reasons

from ..foundation.errors import UsageError
from ..launch.arguments import launcher_of
from .figures import Figure, disk_bytes, quoted
from .layouts import Answer, Candidate, Question, answer, changed, evaluated
from .line import launcher_line
from .weights import Method, Tuning, active_parameters, expert_ranks

# What is shown beside the layout, whether it is built or not.
WAYS: tuple[tuple[Method, str], ...] = (("full", "none"), ("full", "full"), ("lora", "none"), ("qlora", "none"))


@dataclass(frozen=True)
class Way:
    """A way of tuning at one layout."""

    method: str
    recompute: str
    candidate: Candidate


@dataclass(frozen=True)
class Report:
    """All that `temper plan` says."""

    question: Question
    answer: Answer
    shown: Candidate  # the layout to take, or the smallest when none fits
    ways: list[Way]
    figures: list[Figure]
    disk_bytes: int
    line: str | None
    refused: list[str]  # why there is no line


def report(question: Question, hf_config: Mapping[str, object], *, checkpoint: str) -> Report:
    """Answer `question`; `checkpoint` is the word for the launcher's line."""
    plan, tuning = question.plan, question.tuning
    found = answer(question)
    shown = found.chosen or min(found.candidates, key=lambda each: each.bytes)
    refused = untrainable_reasons(hf_config)
    line = None
    if found.chosen and not refused:
        line, refused = _line(question, found.chosen, checkpoint)
    return Report(
        question=question,
        answer=found,
        shown=shown,
        ways=list(_ways(question, shown)),
        figures=quoted(plan, tuning),
        disk_bytes=disk_bytes(plan, shown.config, tuning),
        line=line,
        refused=refused,
    )


def _line(question: Question, chosen: Candidate, checkpoint: str) -> tuple[str | None, list[str]]:
    name = question.plan.family.name
    if question.plan.is_reward_model:
        return None, ["a reward model has no launcher; `temper train reward --help` takes the same settings"]
    launcher = launcher_of(name)
    if launcher is None:
        return None, [f"family {name} has no launcher yet; `temper train sft --help` takes the same settings"]
    try:
        settings = (launcher, chosen.config, chosen.layout, question.tuning)
        line = launcher_line(*settings, plan=question.plan, checkpoint=checkpoint)
    except UsageError as error:
        return None, [str(error)]
    return line, []


def _ways(question: Question, shown: Candidate) -> list[Way]:
    found = []
    for method, recompute in WAYS:
        other = dataclasses.replace(question, tuning=Tuning(method, question.tuning.lora_rank))
        candidate = evaluated(other, changed(shown.config, recompute=recompute))
        found.append(Way(method, recompute, candidate))
    return found


def as_json(said: Report) -> dict[str, Any]:
    """Return the report as plain values; bytes are whole numbers, times are seconds."""
    question = said.question
    return {
        "parameters": question.plan.num_parameters,
        "active_parameters": active_parameters(question.plan),
        "gpus": question.gpus,
        "gpu_bytes": question.gpu_bytes,
        "usable_bytes": question.usable_bytes,
        "method": question.tuning.method,
        "lora_rank": question.tuning.lora_rank,
        "fits": said.answer.chosen is not None,
        "reason": said.answer.reason,
        "recommended": _layout(said.answer.chosen) if said.answer.chosen else None,
        "line": said.line,
        "refused": said.refused,
        "checkpoint_disk_bytes": said.disk_bytes,
        "layouts": [{**_layout(each), "fits": question.holds(each)} for each in said.answer.candidates],
        "ways": [{"method": way.method, **_layout(way.candidate)} for way in said.ways],
        "figures": [dataclasses.asdict(figure) for figure in said.figures],
    }


def _layout(candidate: Candidate) -> dict[str, Any]:
    layout, config = candidate.layout, candidate.config
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "expert": layout.expert,
        "expert_tensor": expert_ranks(layout),
        "data": layout.data,
        "virtual_stages": layout.chunks,
        "micro_batch_size": config.batch.micro_batch_size,
        "recompute": config.compute.recompute,
        "optimizer_offload": candidate.offload,
        "bytes": candidate.bytes,
        "host_bytes_of_node": candidate.host_bytes,
        "estimated_step": dataclasses.asdict(candidate.time),
        "stages": [
            {
                "parameters": rank.states.parameters,
                "gradients": rank.states.gradients,
                "optimizer": rank.states.optimizer,
                "activations": rank.activations,
                "logits": rank.logits,
                "backward": rank.backward,
                "start": rank.start,
                "host": rank.host,
                "total": rank.total,
            }
            for rank in candidate.ranks
        ],
    }
