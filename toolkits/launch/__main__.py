"""`python -m toolkits.launch FAMILY WORDS...`: all that a launcher script calls."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..foundation.errors import UsageError, run_guarded
from .arguments import LAUNCHERS, Launcher
from .checks import Launch, check_call
from .job import start_run
from .kinds import human_size
from .reading import Call, torchrun_line

REPOSITORY = Path(__file__).resolve().parents[2]


def launch(words: Sequence[str]) -> int:
    """Check a launcher's call, say what will run, run it, and return the exit code."""
    family, given = _family(words), list(words[1:])
    asks_help = bool({"-h", "--help"} & set(given))
    if asks_help or len(given) != len(family.positions):
        from .table import print_table

        print_table(family, [] if asks_help else given, to_stderr=not asks_help)
        if asks_help:
            return 0
        raise UsageError(f"{family.script} takes {len(family.positions)} arguments, {len(given)} were given")
    job = check_call(family, given, os.environ)
    print(summary(job), file=sys.stderr, flush=True)
    dry = bool(job.call.values.get("DRY_RUN"))
    if job.call.reads_json:
        from .raw import with_datasets

        job = replace(job, config=with_datasets(job.config, build=not dry))
    if dry:
        print(_dry_line(job))
        return 0
    job.config.output.output.mkdir(parents=True, exist_ok=True)
    return start_run(job.call.objective.word, job.config, ranks=job.ranks, nodes=job.nodes, line=_typed(job.call))


def summary(job: Launch) -> str:
    """Return a few lines that say what will run and where it goes."""
    config, name, out = job.config, job.config.output.name, job.config.output.output
    layout = config.layout
    context = f" x CP {layout.context_parallel}" if layout.context_parallel > 1 else ""
    replicas = job.world // layout.model_parallel
    sequence = "on" if layout.sequence_parallel and layout.tensor_parallel > 1 else "off"
    if layout.sequence_parallel and layout.tensor_parallel == 1:
        sequence += " (it needs TP > 1)"
    sharded = "sharded" if layout.distributed_optimizer else "whole on every rank"
    lines = [
        name,
        f"  model    {human_size(job.num_parameters)} parameters, {config.compute.precision}, from "
        + str(config.model.hf_config if config.model.checkpoint == "none" else config.model.checkpoint),
        f"  layout   TP {layout.tensor_parallel} x PP {layout.pipeline_parallel}{context} x DP {replicas} = "
        f"{job.world} {job.device} rank{'s' * (job.world > 1)}, sequence parallel {sequence}, optimizer {sharded}",
        f"  output   {shlex.quote(str(out / 'checkpoint' / name))}, and {shlex.quote(str(out))}/tensorboard, log",
    ]
    if job.call.reads_json:
        lines.insert(3, f"  data     JSON, built under {out / 'data'} unless it is there; nothing is padded to PAD_LEN")
    if job.call.counts_tokens:
        lines.insert(3, f"  tokens   {_counted(job)}")
    if job.nodes.count > 1:
        nodes = job.nodes
        where = f"node 0 answers at {nodes.address}:{nodes.port}" if nodes.rank else f"it listens on port {nodes.port}"
        lines.insert(3, f"  nodes    {nodes.count} x {job.ranks} ranks, this is node {nodes.rank}; {where}")
    return "\n".join(lines)


def _counted(job: Launch) -> str:
    """Say what the tokens of a call with SFT=false are in steps."""
    batch, typed = job.config.batch, job.call.values
    amount = f"{batch.epochs:g} epochs"
    if batch.train_iters:
        amount = f"{typed['TRAIN_TOKENS_OR_ITERS']:,} = {batch.train_iters:,} steps of {job.call.tokens_of_step:,}"
    return f"{amount}; {typed['WARMUP_TOKENS_OR_ITERS']:,} of warm-up = {job.config.optimizer.warmup_iters:,} steps"


def _family(words: Sequence[str]) -> Launcher:
    if not words or words[0] not in LAUNCHERS:
        raise UsageError(f"say which launcher: python -m toolkits.launch {'|'.join(LAUNCHERS)} ...")
    return LAUNCHERS[words[0]]


def _typed(call: Call) -> str:
    """Return the line of `call`, with the variables that were set."""
    names = [entry.name for entry in call.family.positions]
    variables = [f"{name}={shlex.quote(word)}" for name, word in call.typed.items() if name not in names]
    script = f"run_scripts/{call.family.script}"
    return " ".join([*variables, shlex.join(["sh", script, *(call.typed[name] for name in names)])])


def _dry_line(job: Launch) -> str:
    beside = Path(sys.executable).with_name("torchrun")
    torchrun = str(beside) if beside.exists() else "torchrun"
    return torchrun_line(
        job.call.objective, job.config, ranks=job.ranks, nodes=job.nodes, torchrun=torchrun, repository=REPOSITORY
    )


def main() -> None:
    """Entry point of the launcher scripts."""
    sys.exit(run_guarded(lambda: sys.exit(launch(sys.argv[1:]))))


if __name__ == "__main__":
    main()
