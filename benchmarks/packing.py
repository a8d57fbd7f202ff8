"""How full packed rows are, and how fast they are found, against a plain best-fit loop.

\b
    python benchmarks/packing.py                          # lengths drawn like chat samples, 74,775 of them
    python benchmarks/packing.py PREFIX --seq-len 4096    # the lengths of a dataset
    python benchmarks/packing.py --tokenizer DIR          # those of benchmarks/preprocessing.py's corpus: a minute

The loop looks at every open row for each sample, so it gets the first samples alone; both pack the same ones in turns,
and the ratio is the median over the rounds.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from preprocessing import ROWS, make_corpus, words_of

from data_preprocessing.build import build
from data_preprocessing.dataset import open_dataset
from data_preprocessing.packing import pack

GOAL_FILL, GOAL_RATE = 0.998, 300_000


def plain_best_fit(lengths: np.ndarray, capacity: int) -> int:
    """Return how many rows it takes: longest sample first, each into the fullest row that has room."""
    spaces: list[int] = []
    for size in sorted(lengths.tolist(), reverse=True):
        best = -1
        for row, space in enumerate(spaces):
            if space >= size and (best < 0 or space < spaces[best]):
                best = row
        if best < 0:
            spaces.append(capacity - size)
        else:
            spaces[best] -= size
    return len(spaces)


def in_order(lengths: np.ndarray, capacity: int) -> int:
    """Return how many rows it takes to fill one after the other."""
    rows, space = 0, 0
    for size in lengths.tolist():
        if size > space:
            rows, space = rows + 1, capacity
        space -= size
    return rows


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def lengths_of(prefix: Path | None, tokenizer: Path | None) -> tuple[str, np.ndarray]:
    """Return what the lengths are of, and them."""
    if prefix is not None:
        return str(prefix), np.array(open_dataset(prefix).lengths, np.int64)
    if tokenizer is None:
        drawn = np.random.default_rng(0).lognormal(5.3, 0.75, ROWS)
        return "drawn lengths", np.clip(drawn, 12, 2048).astype(np.int64)
    with TemporaryDirectory() as folder:
        source, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        make_corpus(source, ROWS, words_of(tokenizer))
        build(source, out, tokenizer=tokenizer)
        return "the corpus of benchmarks/preprocessing.py", np.array(open_dataset(out).lengths, np.int64)


@click.command(help=__doc__)
@click.argument("prefix", type=click.Path(path_type=Path), required=False)
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="HuggingFace folder.")
@click.option("--seq-len", default=2048, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--loop-samples", default=4000, show_default=True, help="Samples that the plain loop packs.")
def main(prefix: Path | None, tokenizer: Path | None, seq_len: int, rounds: int, loop_samples: int) -> None:
    name, lengths = lengths_of(prefix, tokenizer)
    long = int((lengths > seq_len).sum())
    lengths = lengths[lengths <= seq_len]
    first = lengths[:loop_samples]
    seconds, ratios = [], []
    for _ in range(rounds + 1):  # the first round warms up
        seconds.append(timed(lambda: pack(lengths, seq_len)))
        ours, plain = timed(lambda: pack(first, seq_len)), timed(lambda: plain_best_fit(first, seq_len))
        ratios.append(plain / ours)
    num_rows = len(pack(lengths, seq_len)[1]) - 1
    total, rate = int(lengths.sum()), len(lengths) / statistics.median(seconds[1:])
    click.echo(f"{name}: {len(lengths):,} samples, {total:,} tokens; {long:,} over {seq_len} left out")
    click.echo(f"fill      {total / (num_rows * seq_len):.3%} of {num_rows:,} rows of {seq_len}; goal {GOAL_FILL:.1%}")
    click.echo(f"in order  {total / (in_order(lengths, seq_len) * seq_len):.3%}")
    click.echo(f"padded    {total / (len(lengths) * seq_len):.3%}, one sample a row")
    click.echo(f"speed     {rate:,.0f} samples/s; goal {GOAL_RATE:,}")
    rows, of_loop = len(pack(first, seq_len)[1]) - 1, plain_best_fit(first, seq_len)
    click.echo(
        f"loop      takes {statistics.median(ratios[1:]):.1f} x as long for the first {len(first):,} samples, and "
        f"{of_loop:,} rows ({first.sum() / (of_loop * seq_len):.3%}) where ours takes {rows:,}"
    )


if __name__ == "__main__":
    main()
