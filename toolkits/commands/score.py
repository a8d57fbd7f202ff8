"""`temper score`: what a reward model makes of answers."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("hf_dir", metavar="HF_DIR", type=_PATH)
@click.option("--input", "file", required=True, type=_PATH, help="Rows as for `temper data build`; - is stdin.")
@click.option("--output", type=_PATH, help="Write JSONL there; without it, to stdout.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--adapter", type=_PATH, help="LoRA adapter in PEFT's format, added to the model in memory.")
@click.option("--dtype", metavar="TYPE", help="float32, float16 or bfloat16; default: the checkpoint's.")
@click.option("--device", default="auto", show_default=True, help="auto (a GPU if there is one), cpu, cuda:N.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Answers scored at once.")
def score(
    hf_dir: Path,
    file: Path,
    output: Path | None,
    overwrite: bool,
    adapter: Path | None,
    dtype: str | None,
    device: str,
    batch_size: int,
) -> None:
    """Score conversations with the reward model HF_DIR, with or without a LoRA adapter.

    Each row comes out as it was, with `score` beside; a pair with `score_chosen` and `score_rejected`.
    """
    from ..foundation.publish import publish_files
    from ..generation.loading import Source
    from ..generation.scoring import Scorer, read_judged

    rows = read_judged(file)
    source = Source(hf_dir, adapter=adapter, dtype=dtype, device=device)
    with ExitStack() as stack:
        written = None
        if output is not None:  # what exists is refused before the model is loaded
            written = stack.enter_context(publish_files(output, [""], overwrite=overwrite)) / output.name
        told = Scorer(source).score_all(rows, batch_size=batch_size)
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in told)
        if written is None:
            sys.stdout.write(text)
        else:
            written.write_text(text, encoding="utf-8")
    click.echo(f"{f'written {output}: ' if output else ''}{_summary(told)}", err=True)


def _summary(rows: list[dict[str, Any]]) -> str:
    single = [row["score"] for row in rows if "score" in row]
    pairs = [row["score_chosen"] > row["score_rejected"] for row in rows if "score_chosen" in row]
    said = [f"{len(single):,} scores, mean {sum(single) / len(single):.4g}"] if single else []
    said += [f"{len(pairs):,} pairs, the chosen answer higher in {sum(pairs) / len(pairs):.1%}"] if pairs else []
    return "; ".join(said)
