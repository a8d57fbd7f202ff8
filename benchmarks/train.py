"""How fast training is: tokens a second, MFU and memory on a GPU; on a CPU our step against a bare megatron-core loop.

\b
    python benchmarks/train.py                          # one GPU: full fine-tuning at the shapes 0.5B, 3B and 7B
    python benchmarks/train.py --shape 3B --rows 8      # one of them, 8 rows in a micro batch
    CUDA_VISIBLE_DEVICES= python benchmarks/train.py    # a CPU: the overhead of our step, a minute
    python benchmarks/train.py --lora-vs-full           # a CPU: LoRA at the layers of Qwen2.5-0.5B, five minutes

Weights are random and the conversations synthetic: their lengths are those of chat data, a few hundred tokens.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ALL = ("0.5B", "3B", "7B")


@click.command(help=__doc__)
@click.option("--shape", "shapes", multiple=True, type=click.Choice(ALL), help="Qwen2.5 shapes; default: all.")
@click.option("--seq-len", default=4096, show_default=True, help="Tokens in a row (GPU).")
@click.option("--rows", default=4, show_default=True, help="Rows in a micro batch (GPU).")
@click.option("--steps", default=12, show_default=True, help="Steps measured (GPU), after 3 that warm up.")
@click.option("--recompute", type=click.Choice(["none", "full", "selective"]), default="none", show_default=True)
@click.option("--pairs", default=40, show_default=True, help="Pairs of steps (CPU); the first is dropped.")
@click.option("--packed-vs-padded", is_flag=True, help="CPU: packed rows against one conversation a row, padded.")
@click.option("--lora-vs-full", is_flag=True, help="CPU: steps of LoRA adapters against steps of all weights.")
@click.option("--dpo-vs-sft", is_flag=True, help="CPU: steps of DPO against fine-tuning on the same answers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--alone", is_flag=True, hidden=True, help="This process measures, and prints one line of JSON.")
def main(
    alone: bool,
    as_json: bool,
    packed_vs_padded: bool,
    lora_vs_full: bool,
    dpo_vs_sft: bool,
    shapes: tuple[str, ...],
    pairs: int,
    **given: Any,
) -> None:
    import measured_training
    import torch

    if alone:
        (shape,) = shapes
        print("\n" + json.dumps(measured_training.on_gpu(shape, **given)))
    elif packed_vs_padded:
        figures = measured_training.packing_on_cpu(pairs=6)
        print(json.dumps(figures, indent=1) if as_json else _packing(figures))
    elif lora_vs_full:
        figures = measured_training.lora_on_cpu(pairs=min(pairs, 13))
        print(json.dumps(figures, indent=1) if as_json else _lora(figures))
    elif dpo_vs_sft:
        figures = measured_training.dpo_on_cpu(pairs=min(pairs, 13))
        print(json.dumps(figures, indent=1) if as_json else _dpo(figures))
    elif torch.cuda.is_available():
        rows = [_in_a_process_of_its_own(shape, given) for shape in shapes or ALL]
        print(json.dumps(rows, indent=1) if as_json else _table(rows))
    else:
        figures = measured_training.overhead_on_cpu(pairs=max(pairs, 6))
        print(json.dumps(figures, indent=1) if as_json else _overhead(figures))


def _in_a_process_of_its_own(shape: str, given: dict[str, Any]) -> dict[str, Any]:
    """A shape that does not fit takes no other with it, and each starts with an empty GPU."""
    words = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]
    done = subprocess.run(
        [sys.executable, __file__, "--alone", "--shape", shape, *words], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        return {"shape": shape, "failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'shape':>6} {'tokens/s':>9} {'MFU 6N+full':>12} {'MFU strict':>11} {'peak memory':>12} {'step s':>7}"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['shape']:>6} ended with {row['failed']}: what it wrote is above")
            continue
        lines.append(
            f"{row['shape']:>6} {row['tokens_per_second']:>9,.0f} {row['mfu_6n_full_attention']:>12.1%} "
            f"{row['mfu_strict']:>11.1%} {row['peak_bytes'] / 1e9:>9.1f} GB {row['step_seconds']:>7.3f}"
        )
    device = next((row["device"] for row in rows if "device" in row), "no device")
    return "\n".join(
        [
            *lines,
            f"{device}; peak 989 TFLOP/s (dense bf16 of an H100 or H200). 6N+full: 6 FLOPs a weight, all weights, and",
            "attention to the whole row. Strict: without the input embedding, causal, and only within conversations.",
        ]
    )


def _pairs(figures: dict[str, Any], *, digits: int = 2) -> str:
    lowest, highest = (f"{figures[name]:.{digits}f}" for name in ("lowest", "highest"))
    return f"(median of {figures['pairs']} pairs, {lowest} to {highest})"


def _packing(figures: dict[str, Any]) -> str:
    return (
        f"packed rows of 2048 train {figures['ratio']:.2f} x the tokens a second of padded ones "
        f"{_pairs(figures)}. Goal: 5"
    )


def _lora(figures: dict[str, Any]) -> str:
    return (
        f"a step of LoRA adapters (rank 16, all matrices) takes {figures['ratio']:.2f} of a full step "
        f"{_pairs(figures)}, and "
        f"{figures['cpu_time_ratio']:.2f} of its CPU time; full: {figures['token_seconds'] * 1e3:.2f} ms a token. "
        "Goal: 0.75"
    )


def _dpo(figures: dict[str, Any]) -> str:
    return (
        f"a token of DPO with a cached reference takes {figures['ratio']:.3f} of one of fine-tuning "
        f"{_pairs(figures)}, and "
        f"{figures['cpu_time_ratio']:.3f} of its CPU time; fine-tuning: {figures['token_seconds'] * 1e3:.2f} ms a "
        "token. Goal: 1.05"
    )


def _overhead(figures: dict[str, Any]) -> str:
    return (
        f"our step takes {figures['ratio']:.3f} of a bare megatron-core step {_pairs(figures, digits=3)}, "
        f"and {figures['cpu_time_ratio']:.3f} of its CPU time; "
        f"bare: {figures['bare_seconds']:.3f} s, {figures['threads']} thread; losses equal in all pairs. Goal: 1.03"
    )


if __name__ == "__main__":
    main()
