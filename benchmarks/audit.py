"""How fast rows are checked: `temper data check` against `temper data build` on the same file, in turns.

\b
    python benchmarks/audit.py --tokenizer DIR                 # 74,775 samples, 92 MB: some minutes
    python benchmarks/audit.py --tokenizer DIR --rows 5000     # a first look

Each run is a process of its own, start-up included; the corpus is that of preprocessing.py. The build encodes all
rows too, so what checking costs beside that is the ratio of CPU time. The built set is checked as well.
"""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from preprocessing import BUILD, ROWS, make_corpus, run, words_of


@click.command(help=__doc__)
@click.option("--tokenizer", required=True, type=click.Path(exists=True, path_type=Path), help="HuggingFace folder.")
@click.option("--rows", default=ROWS, show_default=True)
@click.option("--pairs", default=3, show_default=True, help="Rounds; with more than two the first is dropped.")
def main(tokenizer: Path, rows: int, pairs: int) -> None:
    with TemporaryDirectory() as folder:
        source, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        size = make_corpus(source, rows, words_of(tokenizer))
        words = ["--tokenizer", str(tokenizer.resolve())]
        allowed = ["--seq-len", "2048", "--allow", "too_long", "--allow", "all_masked"]
        jobs = {
            "build": ["-c", BUILD, "data", "build", str(source), str(out), "--overwrite", *words],
            "check": ["-c", BUILD, "data", "check", str(source), *words, *allowed],
            "check the built set": ["-c", BUILD, "data", "check", str(out), *words, *allowed],
        }
        rounds = [{name: run(job) for name, job in jobs.items()} for _ in range(pairs)]
    rounds = rounds[1:] if len(rounds) > 2 else rounds
    click.echo(f"{rows:,} rows, {size / 1e6:.0f} MB; medians of {len(rounds)} rounds")
    for name in jobs:
        wall, cpu, peak = (statistics.median(one[name][key] for one in rounds) for key in ("wall", "cpu", "peak_mb"))
        ratio = statistics.median(one[name]["cpu"] / one["build"]["cpu"] for one in rounds)
        click.echo(
            f"{name:20} {wall:6.1f} s, {rows / wall:8,.0f} rows/s; CPU {cpu:6.1f} s, {rows / cpu:8,.0f} rows a second "
            f"of it, {ratio:.1f} x the build's; peak {peak:,.0f} MB"
        )


if __name__ == "__main__":
    main()
