"""How fast a dataset is built: our whole job against the loops of others, and against the encoder alone.

\b
    python benchmarks/preprocessing.py --tokenizer DIR                 # 74,775 samples, 92 MB: some minutes
    python benchmarks/preprocessing.py --tokenizer DIR --rows 5000     # a first look

The corpus is made here, of single-turn samples in English, Chinese and arithmetic. The others' loops are written
anew in preprocessing_loops.py; they have no other name to run under. Every run is a process of its own; runs take
turns, and what counts is the median of the ratios. On a machine that others use too, the ratio of CPU time says more
than the ratio of wall time.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import click

ROOT = Path(__file__).resolve().parents[1]
ROWS = 74_775
CHINESE = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得"
    "经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政四日那社义事平"
    "形相全表间样与关各重新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解问意建月公无系军很情者最立代想已通并提直题党程展"
)


def english_words(tokenizer: Path) -> list[str]:
    """Return the whole words of a byte-level vocabulary, the common ones first."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return [token[1:] for token in ordered if token[0] == "Ġ" and token[1:].isalpha()]


def make_corpus(path: Path, rows: int, words: list[str]) -> int:
    """Write `rows` conversations of one question and one answer; return the size in bytes."""
    draw = random.Random(0)
    english = [word for word in words if word.isascii()]
    up_to = list(accumulate(1 / (rank + 10) for rank in range(len(english))))  # Zipf's law

    def prose(words: int) -> str:
        drawn = draw.choices(english, cum_weights=up_to, k=words)
        for place in range(11, words, 13):
            drawn[place] = drawn[place] + draw.choice([".", ",", ".\n\n", ":", "?"])
        return " ".join(drawn)

    def chinese(words: int) -> str:
        return "".join("".join(draw.choices(CHINESE, k=draw.randint(3, 12))) + "，" for _ in range(words // 6)) + "。"

    def arithmetic(words: int) -> str:
        lines = []
        for _ in range(words // 10):
            one, other = draw.randint(2, 999), draw.randint(2, 99)
            lines.append(f"{one} x {other} = {one * other}, so the {draw.choice(english)} costs ${one * other / 100}")
        return "\n".join(lines)

    kinds = (prose, prose, prose, chinese, arithmetic)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            kind = draw.choice(kinds)
            question, answer = kind(draw.randint(12, 60)), kind(min(900, int(draw.lognormvariate(5.0, 0.6)) + 20))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path.stat().st_size


def run(words: list[str]) -> dict[str, float]:
    """Run a process; return its wall seconds, CPU seconds with its children's, and peak memory in MB without them."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None  # it was asked for
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)[:300]} ended with {os.waitstatus_to_exitcode(status)}")
    figures = {"wall": time.perf_counter() - began, "cpu": used.ru_utime + used.ru_stime}
    last = output.decode().strip().splitlines()[-1:]
    figures |= json.loads(last[0]) if last and last[0].startswith("{") else {}
    return {"peak_mb": used.ru_maxrss * 1024 / 1e6, **figures}


ENCODER = """
import json, sys, time
from data_preprocessing.chat import ChatEncoder
from data_preprocessing.encoders import choose_encoder
from data_preprocessing.records import record
from data_preprocessing.tokenizer import load_tokenizer
source, folder, name = sys.argv[1:]
renderer = ChatEncoder(folder, encoder="tokenizers")
texts = [renderer.render(record(json.loads(line))).text for line in open(source, encoding="utf-8")]
encoder = choose_encoder(load_tokenizer(folder), name)
encoder.encode(texts[:10])
wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
for first in range(0, len(texts), 1024):
    tokens += len(encoder.encode(texts[first : first + 1024])[0])
print(json.dumps({"work": time.perf_counter() - wall, "work_cpu": time.process_time() - cpu, "tokens": tokens}))
"""

OURS = """
import json, sys, time
from data_preprocessing.build import BuildOptions, build
source, small, folder, out, name, workers = sys.argv[1:]
def timed(path):
    wall, cpu = time.perf_counter(), time.process_time()
    build(path, out, tokenizer=folder, overwrite=True, options=BuildOptions(encoder=name, workers=int(workers)))
    return time.perf_counter() - wall, time.process_time() - cpu
if __name__ == "__main__":
    start, all_of_it = timed(small), timed(source)
    print(json.dumps({"work": all_of_it[0] - start[0], "work_cpu": all_of_it[1] - start[1]}))
"""

BUILD = "from toolkits.cli import main; main()"


@click.command(help=__doc__)
@click.option("--tokenizer", required=True, type=click.Path(exists=True, path_type=Path), help="HuggingFace folder.")
@click.option("--rows", default=ROWS, show_default=True)
@click.option("--pairs", default=1, show_default=True, help="Rounds; with more than two the first is dropped.")
@click.option("--workers", default=1, show_default=True, help="Processes of ours.")
@click.option("--encoder", default="fastokens", type=click.Choice(["fastokens", "tokenizers"]), show_default=True)
@click.option("--ours-only", is_flag=True, help="Without the loops of others.")
def main(tokenizer: Path, rows: int, pairs: int, workers: int, encoder: str, ours_only: bool) -> None:
    with TemporaryDirectory() as folder:
        source, small, out = Path(folder, "corpus.jsonl"), Path(folder, "small.jsonl"), Path(folder, "out")
        words = english_words(tokenizer)
        size = make_corpus(source, rows, words)
        make_corpus(small, 64, words)
        where = [str(tokenizer.resolve())]
        loops = str(ROOT / "benchmarks" / "preprocessing_loops.py")
        flags = ["--encoder", encoder, "--workers", str(workers)]
        jobs = {
            "ours": ["-c", BUILD, "data", "build", str(source), str(out), "--overwrite", "--tokenizer", *where, *flags],
            "ours again": ["-c", OURS, str(source), str(small), *where, str(out), encoder, str(workers)],
            "encoder": ["-c", ENCODER, str(source), *where, encoder],
        }
        if not ours_only:
            for name in ("megatron", "pai"):
                jobs[name] = [loops, name, str(source), *where, str(Path(folder, name)), "2"]
        run(["-c", BUILD, "data", "build", str(small), str(out), "--tokenizer", *where])  # files are in memory now
        rounds = [{name: run(words) for name, words in jobs.items()} for _ in range(pairs)]
    rounds = rounds[1:] if len(rounds) > 2 else rounds
    click.echo(f"{rows:,} rows, {size / 1e6:.1f} MB, {rounds[0]['encoder']['tokens'] / 1e6:.2f} M tokens")
    click.echo(_report(rounds, ours_only))


def _report(rounds: list[dict[str, dict[str, float]]], ours_only: bool) -> str:
    def median(name: str, figure: str) -> float:
        return statistics.median(one[name][figure] for one in rounds)

    def ratio(of: str, to: str, figure: str) -> float:
        return statistics.median(one[of][figure] / one[to][figure] for one in rounds)

    lines = [f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {len(rounds)} rounds"]
    for name in ("ours",) if ours_only else ("ours", "megatron", "pai"):
        lines.append(f"{name:>9} whole job {median(name, 'wall'):7.1f} s wall, {median(name, 'cpu'):7.1f} s CPU")
    for name in () if ours_only else ("megatron", "pai"):
        goal = {"megatron": 12, "pai": 50}[name]
        lines.append(
            f"{name:>9} / ours: {ratio(name, 'ours', 'wall'):.1f} x wall, {ratio(name, 'ours', 'cpu'):.1f} x CPU; "
            f"goal {goal}"
        )
    work, alone = median("ours again", "work"), median("encoder", "work")
    lines.append(
        f"work {work:.2f} s against {alone:.2f} s of the encoder alone: "
        f"{ratio('ours again', 'encoder', 'work'):.2f} x wall, "
        f"{ratio('ours again', 'encoder', 'work_cpu'):.2f} x CPU; "
        "goal 2.0 (1.1 with tokenizers)"
    )
    lines.append(f"peak memory {median('ours', 'peak_mb'):.0f} MB; goal 300")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
