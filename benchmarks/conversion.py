"""How fast conversion is against `cp` and fsync of the same bytes: the random Qwen2.5-1.5B shape, 3.09 GB in bf16.

\b
    python benchmarks/conversion.py                     # five pairs each way, verification on and off; minutes
    python benchmarks/conversion.py --size small        # a 0.25 GB model: a quick try
    python benchmarks/conversion.py --workers 1

Copy and conversion alternate, page cache warm; the first pair is dropped; medians of ratios. Every export is held
byte for byte against the model that it came from. Goals: <= 1.5 without verification, <= 2.5 with it.
"""

import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
}
SIZES = {"full": QWEN, "small": {**QWEN, "vocab_size": 32000, "num_hidden_layers": 2}}


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), default="full", show_default=True)
@click.option("--pairs", default=5, show_default=True, help="Pairs measured, after one that is dropped.")
@click.option("--workers", default=2, show_default=True, help="Threads of the conversion.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Where to write; default: the folder for temporary files."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(size: str, pairs: int, workers: int, work: Path | None, as_json: bool) -> None:
    with tempfile.TemporaryDirectory(dir=work, prefix="conversion-") as folder:
        figures = measure(Path(folder), SIZES[size], pairs=max(1, pairs), workers=workers)
    print(json.dumps(figures, indent=1) if as_json else _table(figures))


def measure(folder: Path, config: dict, *, pairs: int, workers: int) -> dict:
    """Return the seconds of each (copy, conversion) pair by what was converted, and the bytes of the model."""
    from conversion import hf_to_mcore, mcore_to_hf

    source, there, back = folder / "hf", folder / "there", folder / "back"
    num_bytes = write_model(source, config)
    steps: dict[str, tuple[Path, Callable[[], object]]] = {}
    for verify, said in ((False, ""), (True, " verified")):
        options = {"verify": verify, "workers": workers}
        steps[f"hf2mcore{said}"] = (there, lambda o=options: hf_to_mcore.convert(source, there, **o))
        steps[f"mcore2hf{said}"] = (back, lambda o=options: mcore_to_hf.convert(there, back, **o))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(pairs + 1):
        for name, (output, convert) in steps.items():
            copy = _timed(folder / "copy", lambda: _copy(source, folder / "copy"))
            seconds[name].append((copy, _timed(output, convert)))
            print(f"pair {number}: {name}: cp {copy:.2f} s, {seconds[name][-1][1]:.2f} s", file=sys.stderr, flush=True)
            if output == back and not filecmp.cmp(source / "model.safetensors", back / "model.safetensors", False):
                raise SystemExit("what came back is not what went there")
    return {"bytes": num_bytes, "workers": workers, "seconds": {name: found[1:] for name, found in seconds.items()}}


def _timed(output: Path, do: Callable[[], object]) -> float:
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def write_model(folder: Path, config: dict) -> int:
    """Write a HuggingFace directory with random bf16 weights; return the bytes of its tensors."""
    import torch

    from conversion.filling import Span, write_files
    from conversion.hf_checkpoint import safetensors_files
    from conversion.plan import plan_for

    random = torch.randn(1 << 24, generator=torch.Generator().manual_seed(1)).bfloat16()

    def slices(number: int, num_elements: int):
        start = number * 7919 % (len(random) // 2)
        while num_elements:
            count = min(num_elements, len(random) // 2)
            yield random[start : start + count]
            num_elements -= count

    parts = {part.name: part.shape for step in plan_for(config).steps for part in step.parts}
    numbers = {name: number for number, name in enumerate(parts)}

    def span(name, place) -> Span:
        count = torch.Size(place.shape).numel()
        return Span(name, place.start, 2 * count, lambda: slices(numbers[name], count))

    files, index = safetensors_files({name: (torch.bfloat16, shape) for name, shape in parts.items()}, span)
    assert index is None
    write_files(folder, files)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(span.num_bytes for span in files[0].spans)


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _table(figures: dict) -> str:
    pairs = len(next(iter(figures["seconds"].values())))
    lines = [
        f"{figures['bytes'] / 1e9:.2f} GB, {figures['workers']} workers, {pairs} pairs each; cp is cp and fsync",
        "",
    ]
    lines.append(f"{'':18} {'s':>6} {'cp s':>6} {'ratio: median':>14} {'lowest':>7} {'highest':>8}")
    for name, found in figures["seconds"].items():
        ratios = [conversion / copy for copy, conversion in found]
        copy, conversion = (statistics.median(each) for each in zip(*found, strict=True))
        lines.append(
            f"{name:18} {conversion:6.2f} {copy:6.2f} {statistics.median(ratios):14.2f} "
            f"{min(ratios):7.2f} {max(ratios):8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
