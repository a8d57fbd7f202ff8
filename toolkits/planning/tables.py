"""A report for a terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from .layouts import GPUS_OF_NODE, Candidate
from .memory import USABLE, RankMemory, gigabytes
from .report import Report
from .sizes import sizes_of
from .timing import ASSUMED_MFU, CPU_PARAMETERS, FULL_SPEED_TOKENS, LINK_BYTES, PEAK_FLOPS

WIDE = 120  # columns where nobody watches
MOST_LAYOUTS = 12
MEMORY = ("parameters", "gradients", "optimizer", "activations", "logits", "other", "total")


def print_report(said: Report) -> None:
    """Print tables, the recommendation, the launcher's line and the assumptions."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)
    for table in (_figures(said), _ways(said), _layouts(said), _stages(said)):
        console.print(table)
    for text in _conclusions(said):
        console.print(text, markup=False)
    if said.line:
        console.print("\n" + said.line, markup=False, soft_wrap=True)  # one line, to be copied


def _figures(said: Report) -> Table:
    count = said.question.plan.num_parameters
    table = Table("figure", "", "where it comes from", title=f"{count:,} parameters, all ranks together")
    for figure in said.figures:
        table.add_row(figure.name, figure.text, figure.derivation)
    return table


def _ways(said: Report) -> Table:
    table = Table("tuned", *MEMORY, title=f"The fullest rank at {said.shown.name}, in GB (10^9 bytes)")
    for way in said.ways:
        rank = _fullest(way.candidate)
        name = way.method + (" + recompute" if way.recompute == "full" else "")
        if way.method != "full":
            name += f" r={said.question.tuning.lora_rank}"
        table.add_row(name, *_memory(rank))
    return table


def _layouts(said: Report) -> Table:
    found = sorted(said.answer.candidates, key=lambda each: (not said.question.holds(each), each.time.seconds))
    title = f"Layouts for {said.question.tuning.method}: {len(found)}, the best {min(MOST_LAYOUTS, len(found))} shown"
    table = Table(
        "TP", "PP", "CP", "EP", "DP", "micro batch", "recompute", "GB a rank", "fits", "step, estimated", title=title
    )
    for each in found[:MOST_LAYOUTS]:
        layout = each.layout
        table.add_row(
            str(layout.tensor),
            f"{layout.pipeline}" + (f" (VP {layout.chunks})" if layout.chunks > 1 else ""),
            *map(str, (layout.context, layout.expert, layout.data, each.config.batch.micro_batch_size)),
            each.config.compute.recompute,
            _gb(each.bytes),
            "yes" if said.question.holds(each) else "no",
            f"{each.time.seconds:.2f} s",
        )
    return table


def _stages(said: Report) -> Table:
    table = Table("pipeline stage", *MEMORY, title=f"Every stage at {said.shown.name}, in GB a rank")
    for rank in said.shown.ranks:
        table.add_row(str(rank.stage), *_memory(rank))
    return table


def _conclusions(said: Report) -> Iterator[str]:
    question, time = said.question, said.shown.time
    yield (
        f"memory    {gigabytes(question.gpu_bytes)} a GPU, of which {USABLE:.0%} are planned with: "
        f"{gigabytes(question.usable_bytes)}; the rest is for the driver, NCCL and the allocator"
    )
    yield (
        "          other: what the backward pass takes beyond the loss: the largest weight's gradient, gathered tokens "
        "and keys, one layer's gradients"
    )
    if sizes_of(question.plan).experts:
        yield (
            "          activations of experts: as many tokens for each rank's, the mean; with EP a rank whose experts "
            "are popular needs more"
        )
    if said.shown.host_bytes:
        yield (
            f"          {gigabytes(said.shown.host_bytes)} of CPU memory a node of {GPUS_OF_NODE} GPUs, for "
            "optimizer state and activations; to within the largest weight of each rank"
        )
    head = f"take {said.shown.name}: " if said.answer.chosen else ""
    yield f"layout    {head}{said.answer.reason}"
    if question.plan.tied and said.shown.layout.pipeline > 1:
        yield (
            "          tied: yes, shared across first/last stage: both hold the embedding, their gradients are summed, "
            "and a checkpoint has it once"
        )
    for text in said.refused:
        yield f"refused   {text}"
    yield (
        f"disk      {gigabytes(said.disk_bytes)} for the checkpoints: {said.shown.config.output.keep_last} kept and "
        "one being written, weights and optimizer"
    )
    yield (
        f"time      ESTIMATE, not measured: {time.seconds:.2f} s a step, {time.tokens_per_second_per_gpu:,.0f} "
        f"tokens/s a GPU. {time.flops_per_token / 1e9:.1f} GFLOP a token (6 for each parameter that it meets but the "
        "input embedding, + causal attention)"
    )
    peak = question.peak_flops or PEAK_FLOPS[said.shown.config.compute.precision]
    yield (
        f"          assumes {peak / 1e12:.0f} TFLOP/s a GPU, MFU {time.assumed_mfu:.0%} ({ASSUMED_MFU[1]:.0%} at TP 1, "
        f"less with TP and below {FULL_SPEED_TOKENS:,} tokens a micro batch), pipeline waits {time.bubble:.0%}, "
        f"gradients reduced at {LINK_BYTES / 1e9:.0f} GB/s in {time.reduce_seconds:.2f} s"
        + (f", keys and values of CP gathered in {time.gather_seconds:.2f} s" if time.gather_seconds else "")
        + (", experts as fast as other matrices" if sizes_of(question.plan).experts else "")
        + (f", tokens sent to their experts in {time.dispatch_seconds:.2f} s" if time.dispatch_seconds else "")
        + (f", {CPU_PARAMETERS / 1e9:g} B parameters/s stepped by the CPU of a rank" if time.cpu_seconds else "")
    )


def _fullest(candidate: Candidate) -> RankMemory:
    return max(candidate.ranks, key=lambda rank: rank.total)


def _memory(rank: RankMemory) -> list[str]:
    held = rank.states
    parts = [held.parameters, held.gradients, held.optimizer, rank.activations, rank.logits]
    return [_gb(number) for number in (*parts, rank.total - sum(parts), rank.total)]


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f}"
