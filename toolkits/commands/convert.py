"""`temper convert`: HuggingFace checkpoints to and from Megatron-core."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_FOLDER = click.Path(path_type=Path)


@click.group()
def convert() -> None:
    """HuggingFace checkpoints to and from Megatron-core, bit for bit."""


def _options(command: Callable) -> Callable:
    """The arguments that both directions share."""
    for decorate in (click.argument("dst", type=_FOLDER), click.argument("src", type=_FOLDER), _choices):
        command = decorate(command)
    return command


def _choices(command: Callable) -> Callable:
    """The options of whatever writes a checkpoint."""
    for decorate in (
        click.option("--dtype", metavar="TYPE", help="Cast to float32, float16 or bfloat16 (fp32, fp16, bf16)."),
        click.option("--overwrite", is_flag=True, help="Replace DST; it stays in place until the new one is complete."),
        click.option("--no-verify", is_flag=True, help="Neither hash nor compare: the report has no hashes."),
        click.option("--allow-nonfinite", is_flag=True, help="Convert NaN and Inf weights too."),
        click.option("--workers", type=int, help="Threads; the output is the same. Default: one a core, 8 at most."),
        click.option("--resume", is_flag=True, help="Go on with what a process that died left of DST."),
        click.option("--restart", is_flag=True, help="Throw away what a process that died left of DST."),
    ):
        command = decorate(command)
    return command


@convert.command()
@_options
@click.option("--dequantize", is_flag=True, help="Let block-scaled FP8 weights (DeepSeek-V3) become bfloat16.")
def hf2mcore(src: Path, dst: Path, no_verify: bool, **choices: Any) -> None:
    """Write the Megatron-core directory DST from the HuggingFace directory SRC."""
    from conversion import hf_to_mcore

    plan = hf_to_mcore.convert(src, dst, verify=not no_verify, **choices)
    _say(dst, len(plan.tensors), plan.num_parameters, verified=not no_verify, **choices)


@convert.command()
@_options
def mcore2hf(src: Path, dst: Path, no_verify: bool, **choices: Any) -> None:
    """Write the HuggingFace directory DST from SRC, a Megatron-core directory or one of its step folders."""
    from conversion import mcore_to_hf

    plan = mcore_to_hf.convert(src, dst, verify=not no_verify, **choices)
    _say(dst, len(plan.hf_tensors), plan.num_parameters, verified=not no_verify, **choices)


@convert.command()
@click.argument("base", type=_FOLDER)
@click.argument("adapters", metavar="ADAPTER...", type=_FOLDER, nargs=-1, required=True)
@click.argument("dst", type=_FOLDER)
@click.option("--weights", metavar="W,W,...", help="What each adapter counts; 1 each when left out.")
@click.option("--unmerge", is_flag=True, help="Take the adapters out of BASE, where they were merged into it.")
@click.option(
    "--quantized-base",
    type=click.Choice(["nf4", "int8"]),
    help="Add to BASE quantised and back, which a run with --quantize trains on; else to BASE as it is.",
)
@_choices
def merge(
    base: Path, adapters: tuple[Path, ...], dst: Path, weights: str | None, no_verify: bool, **choices: Any
) -> None:
    """Write the HuggingFace directory DST: BASE, of either kind, with LoRA adapters in PEFT's format added."""
    from conversion.merge import merge as merged

    pairs = list(zip(adapters, _weights(weights, len(adapters)), strict=True))
    plan = merged(base, pairs, dst, verify=not no_verify, **choices)
    _say(dst, len(plan.hf_tensors), plan.num_parameters, verified=not no_verify, **choices)


def _weights(said: str | None, count: int) -> list[float]:
    try:
        weights = [float(word) for word in said.split(",")] if said else [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count:
        raise click.UsageError(f"--weights {said}: give a number for each of the {count} adapters, as in 0.7,0.3")
    return weights


@convert.command()
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER, required=False)
def verify(a: Path, b: Path | None) -> None:
    """Compare the weights of A and B, HuggingFace or Megatron-core directories, bit for bit.

    Without B, hold A against the hashes of the report or manifest that was written with it.
    """
    from conversion import verify as verification

    if b is None:
        click.echo(f"intact: {verification.verify_record(a)}")
    else:
        click.echo(f"equal: {verification.verify(a, b)} tensors, bit for bit")


@convert.command()
@click.argument("directory", type=_FOLDER)
@click.option("--json", "machine", is_flag=True, help="Print JSON.")
def inspect(directory: Path, machine: bool) -> None:
    """Say what DIRECTORY is, complete or not: format, family, layers, types, vocabulary, and what is missing."""
    from conversion import inspect as inspection

    said = inspection.inspect(directory)
    click.echo(json.dumps(said) if machine else inspection.describe(said))


def _say(dst: Path, num_tensors: int, num_parameters: int, *, verified: bool, **choices: Any) -> None:
    said = [f"{num_tensors} tensors", f"{num_parameters:,} parameters"]
    if choices.get("dequantize"):
        said.append("FP8 dequantized to bfloat16")
    if choices["dtype"]:
        said.append(f"cast to {choices['dtype']}")
    said.append("read again and equal bit for bit" if verified else "not verified")
    click.echo(f"{dst}: {', '.join(said)}")
