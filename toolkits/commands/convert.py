"""`temper convert`: HuggingFace checkpoints to and from Megatron-core."""

from collections.abc import Callable
from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path)


@click.group()
def convert() -> None:
    """HuggingFace checkpoints to and from Megatron-core, bit for bit."""


def _options(command: Callable) -> Callable:
    """The arguments that both directions share."""
    for decorate in (
        click.argument("dst", type=_FOLDER),
        click.argument("src", type=_FOLDER),
        click.option("--dtype", metavar="TYPE", help="Cast to float32, float16 or bfloat16 (fp32, fp16, bf16)."),
        click.option("--overwrite", is_flag=True, help="Replace DST; it stays in place until the new one is complete."),
        click.option("--no-verify", is_flag=True, help="Do not read the result again and compare it."),
        click.option("--allow-nonfinite", is_flag=True, help="Convert NaN and Inf weights too."),
    ):
        command = decorate(command)
    return command


@convert.command()
@_options
def hf2mcore(src: Path, dst: Path, no_verify: bool, **choices: bool) -> None:
    """Write the Megatron-core directory DST from the HuggingFace directory SRC."""
    from conversion import hf_to_mcore

    plan = hf_to_mcore.convert(src, dst, verify=not no_verify, **choices)  # type: ignore[arg-type]
    _report(dst, len(plan.tensors), plan.num_parameters, verified=not no_verify)


@convert.command()
@_options
def mcore2hf(src: Path, dst: Path, no_verify: bool, **choices: bool) -> None:
    """Write the HuggingFace directory DST from SRC, a Megatron-core directory or one of its step folders."""
    from conversion import mcore_to_hf

    plan = mcore_to_hf.convert(src, dst, verify=not no_verify, **choices)  # type: ignore[arg-type]
    _report(dst, len(plan.hf_tensors), plan.num_parameters, verified=not no_verify)


@convert.command()
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER)
def verify(a: Path, b: Path) -> None:
    """Compare the weights of two directories, HuggingFace or Megatron-core, bit for bit."""
    from conversion.verify import verify as compare

    click.echo(f"equal: {compare(a, b)} tensors, bit for bit")


def _report(dst: Path, num_tensors: int, num_parameters: int, *, verified: bool) -> None:
    checked = "read again and equal bit for bit" if verified else "not verified"
    click.echo(f"{dst}: {num_tensors} tensors, {num_parameters:,} parameters, {checked}")
