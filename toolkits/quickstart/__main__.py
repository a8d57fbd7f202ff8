"""`python -m toolkits.quickstart [HF_DIR DATA.jsonl]`: the whole line, from a HuggingFace checkpoint back to one."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from ..foundation.errors import NumericsError, TemperError, UsageError, run_guarded
from ..foundation.progress import clock
from ..launch.arguments import LAUNCHERS
from ..launch.ranks import visible_gpus
from .tiny import SAMPLE, write_tiny_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_PROMPTS, RIGHT_ENOUGH = 10, 9
# What the launcher's positions are when the tiny model learns its sample; found by trying.
TINY = {"BATCH_SIZE": "4", "GLOBAL_BATCH_SIZE": "16", "LR": "2e-3", "MIN_LR": "1e-4", "SEQ_LEN": "64", "PR": "fp32"}
TINY |= {"TP": "2", "TRAIN_TOKENS_OR_ITERS": "120", "WARMUP_TOKENS_OR_ITERS": "12", "SAVE_INTERVAL": "60"}
YOURS = {"BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "8", "LR": "1e-5", "MIN_LR": "1e-6", "SEQ_LEN": "1024", "PR": "bf16"}
YOURS |= {"TP": "1", "TRAIN_TOKENS_OR_ITERS": "100", "WARMUP_TOKENS_OR_ITERS": "10", "SAVE_INTERVAL": "100"}
ALWAYS = {"ENV": "dsw", "MODEL_SIZE": "auto", "PP": "1", "CP": "1", "SP": "true", "DO": "true", "FL": "true"}
ALWAYS |= {"SFT": "true", "AC": "false", "OPTIMIZER_OFFLOAD": "false"}

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Line:
    """The inputs and outputs of one pass through the line."""

    hf_dir: Path
    data: Path
    out: Path
    tiny: bool = False

    @property
    def prefix(self) -> Path:
        return self.out / "data" / self.data.stem

    @property
    def run(self) -> Path:
        return self.out / "run"

    def preparation(self) -> list[list[str]]:
        """Return the commands that convert the checkpoint and build the dataset."""
        return [
            ["sh", _script("convert_hf2mcore.sh"), str(self.hf_dir), str(self.out / "mcore")],
            ["sh", _script("build_sft_data.sh"), str(self.data), str(self.hf_dir), str(self.prefix)],
        ]

    def training(self, words: Mapping[str, str]) -> list[str]:
        """Return the launcher's command with `words` at the positions that are chosen."""
        words = {**ALWAYS, **words, "PAD_LEN": words["SEQ_LEN"], "OUTPUT_BASEPATH": str(self.run)}
        words |= {"DATASET_PATH": str(self.prefix), "VALID_DATASET_PATH": str(self.prefix)}
        words |= {"PRETRAIN_CHECKPOINT_PATH": str(self.out / "mcore")}
        positions = [words[entry.name] for entry in LAUNCHERS["qwen"].positions]
        return ["env", "EXPORT_HF=true", "sh", _script("run_mcore_qwen.sh"), *positions]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("hf_dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.argument("data", metavar="DATA.jsonl", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--output", type=click.Path(path_type=Path), default=Path("quickstart-output"), show_default=True)
def quickstart(hf_dir: Path | None, data: Path | None, output: Path) -> None:
    """Run the whole line on a tiny model made here, or on the checkpoint HF_DIR with the records in DATA.jsonl."""
    if (hf_dir is None) != (data is None):
        raise UsageError("give both HF_DIR and DATA.jsonl, or neither")
    out, start = _unused(output), time.monotonic()
    if hf_dir is not None and data is not None:
        line = Line(hf_dir, data, out)
    else:
        line = Line(out / "tiny-hf", SAMPLE, out, tiny=True)
        parameters = write_tiny_checkpoint(line.hf_dir)
        console.print(f"made {line.hf_dir}: a Qwen2.5-shaped model of {parameters:,} random weights and its tokenizer")
    for command in line.preparation():
        _run(command)
    _run(line.training(TINY if line.tiny else _words_for(line.prefix)))
    exported = next((line.run / "huggingface").iterdir())
    right = _compare(line, exported)
    _say_what_is_where(line, exported, time.monotonic() - start)
    if line.tiny and right < RIGHT_ENOUGH:
        raise NumericsError(f"only {right} of {NUM_PROMPTS} answers are right after training; the line is broken")


def _unused(folder: Path) -> Path:
    """Return `folder`, or `folder-2` and so on when it exists: nothing of an earlier run is touched."""
    candidates = (folder.with_name(f"{folder.name}-{number}") if number > 1 else folder for number in range(1, 1000))
    return next(path for path in candidates if not path.exists())


def _words_for(prefix: Path) -> dict[str, str]:
    """Return the positions for the dataset `prefix`: rows as long as its records need, a step of a few rows."""
    counts = json.loads(Path(f"{prefix}_text_document.json").read_text(encoding="utf-8"))["counts"]
    row = min(int(YOURS["SEQ_LEN"]), -(-counts["longest"] // 64) * 64)
    gpus = visible_gpus()
    step = min(8, max(1, counts["tokens"] // row // 2)) * max(1, gpus)
    return YOURS | {"SEQ_LEN": str(row), "GLOBAL_BATCH_SIZE": str(step), "PR": "bf16" if gpus else "fp32"}


def _run(command: list[str]) -> None:
    console.print(f"\n[bold]$ {_escaped(shlex.join(command[command[0] == 'env' :]))}[/]")
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, check=False)
    if done.returncode:
        code = done.returncode if done.returncode > 0 else 128 - done.returncode
        failure = TemperError(f"this step ended with exit code {code}; its own message is above")
        failure.exit_code = code
        raise failure


def _compare(line: Line, exported: Path) -> int:
    from .answers import answers, comparison, num_right, some_questions

    asked = some_questions(line.data, NUM_PROMPTS)
    tokens = 16 if line.tiny else 64
    before = answers(line.hf_dir, asked, max_new_tokens=tokens)
    after = answers(exported, asked, max_new_tokens=tokens)
    right = num_right(asked, after)
    console.print("\nThe checkpoint before and the exported one after, in transformers:")
    console.print(comparison(asked, before, after), soft_wrap=False)
    console.print(f"right: {num_right(asked, before)} of {len(asked)} before, {right} of {len(asked)} after")
    if line.tiny:
        console.print("A tiny random model memorised its sample. That proves the line, not any intelligence.")
    return right


def _say_what_is_where(line: Line, exported: Path, seconds: float) -> None:
    found = {"HuggingFace checkpoint": exported, "loss curve": next(line.run.glob("checkpoint/*/loss.png"), None)}
    found |= {"TensorBoard": line.run / "tensorboard", "log": next(line.run.glob("log/*.log"), None)}
    console.print()
    for name, path in found.items():
        console.print(f"{name:<22} {path}")
    console.print(f"\nDone in {clock(seconds)}. The same line with a model and records of yours:")
    mine = Line(Path("HF_DIR"), Path("DATA.jsonl"), Path("OUT"))
    for command in (*mine.preparation(), mine.training(YOURS)):
        console.print("  " + _escaped(shlex.join(command[command[0] == "env" :])))
    console.print(f"or all of it at once: sh {shlex.quote(_script('quickstart.sh'))} HF_DIR DATA.jsonl")


def _script(name: str) -> str:
    path = REPOSITORY / "run_scripts" / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def main() -> None:
    """Entry point of run_scripts/quickstart.sh."""
    sys.exit(run_guarded(quickstart))


if __name__ == "__main__":
    main()
