"""How fast a dataset is built: our whole job against the loops of others, and against the encoder alone.

\b
    python benchmarks/preprocessing.py --tokenizer DIR                 # 74,775 samples, 92 MB: some minutes
    python benchmarks/preprocessing.py --tokenizer DIR --rows 5000     # a first look

The corpus is made here, of single-turn samples in English, Chinese and word problems. The others' loops are written
anew in preprocessing_loops.py, which says what each does to a row. Pai's is compared twice: as its loop runs here,
and as the tool itself ran beside Megatron-LM's, times the latter's loop here. Every run is a process of its own; runs
take turns, and what counts is the median of the ratios. On a machine that others use too, the ratio of CPU time says
more than the ratio of wall time.
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
# Whole jobs of the tools themselves at 2 workers, seconds, measured side by side on one machine with 74,775 real
# samples of 92 MB and 21.35 M tokens (Megatron-LM took 38 to 47).
PUBLISHED = {"megatron": 42.5, "pai": 176.6}
CONSTANT = 10  # of Zipf's law with a shift: the word of rank n is drawn 1 / (n + CONSTANT) times as often

LOOKS = 6  # at the work alone, for each round

Round = dict[str, dict[str, float]]  # the figures of a job, by its name
Words = tuple[list[str], list[str]]  # English and Chinese, the common ones first


def words_of(tokenizer: Path) -> Words:
    """Return the whole words of a byte-level vocabulary; its order is about that of how common they are."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
    english, chinese = [], []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        text = bytes(byte_of.get(character, 0) for character in token).decode(errors="ignore")
        if text[:1] == " " and text[1:].isascii() and text[1:].isalpha():
            english.append(text[1:])
        elif text and all("\u4e00" <= character <= "\u9fff" for character in text):
            chinese.append(text)
    return english, chinese


def make_corpus(path: Path, rows: int, words: Words) -> int:
    """Write `rows` conversations of one question and one answer; return the size in bytes.

    Prose, Chinese and word problems have the bytes a token, and Chinese the length between marks, of real answers.
    """
    draw = random.Random(0)
    (english, of_english), (chinese, of_chinese) = (
        (known, list(accumulate(1 / (rank + CONSTANT) for rank in range(len(known))))) for known in words
    )

    def prose(count: int) -> str:
        drawn = draw.choices(english, cum_weights=of_english, k=count)
        for place in range(11, count, 13):
            drawn[place] = drawn[place] + draw.choice([".", ",", ".\n\n", ":", "?"])
        return " ".join(drawn)

    def in_chinese(count: int) -> str:
        clauses = ("".join(draw.choices(chinese, cum_weights=of_chinese, k=6)) for _ in range(count // 6))
        return "".join(clause + draw.choice("，，，。、") for clause in clauses) + "。"

    def problem(count: int) -> str:
        lines = []
        for _ in range(count // 20 + 1):
            one, other = draw.randint(2, 999), draw.randint(2, 99)
            lines.append(f"{prose(16)} {one} x {other} = {one * other}")
        return "\n".join(lines)

    kinds = (prose, prose, prose, in_chinese, problem)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            kind = draw.choice(kinds)
            question, answer = kind(draw.randint(12, 60)), kind(min(900, int(draw.lognormvariate(4.96, 0.6)) + 12))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path.stat().st_size


def run(words: list[str]) -> dict[str, float]:
    """Run a process; return its wall seconds, CPU seconds with its children's, and peak memory in MB without them."""
    os.sync()  # it does not pay for what the one before wrote
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
import json, os, sys, time
os.environ["FASTOKENS_BPE_THREADS"] = str(os.cpu_count())  # alone, it may have all cores
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
    timed(small)  # imports
    start, all_of_it = sorted(timed(small) for _ in range(3))[1], timed(source)
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
        words = words_of(tokenizer)
        size = make_corpus(source, rows, words)
        make_corpus(small, 64, words)
        where = [str(tokenizer.resolve())]
        loops = str(ROOT / "benchmarks" / "preprocessing_loops.py")
        flags = ["--encoder", encoder, "--workers", str(workers)]
        jobs = {
            "ours": ["-c", BUILD, "data", "build", str(source), str(out), "--overwrite", "--tokenizer", *where, *flags],
        }
        work = {
            "ours": ["-c", OURS, str(source), str(small), *where, str(out), encoder, str(workers)],
            "encoder": ["-c", ENCODER, str(source), *where, encoder],
        }
        if not ours_only:
            for name in ("megatron", "pai"):
                jobs[name] = [loops, name, str(source), *where, str(Path(folder, name)), "2"]
        run(["-c", BUILD, "data", "build", str(small), str(out), "--tokenizer", *where])  # files are in memory now
        rounds = _rounds(jobs, pairs)
        looks = _rounds(work, LOOKS * pairs)  # at seconds, of which a good part is start-up: it takes more of them
    click.echo(f"{rows:,} rows, {size / 1e6:.1f} MB, {looks[0]['encoder']['tokens'] / 1e6:.2f} M tokens")
    click.echo(_report(rounds, looks, ours_only))


def _rounds(jobs: dict[str, list[str]], count: int) -> list[Round]:
    """Run jobs in turns; with more than two rounds the first is dropped."""
    rounds = [{name: run(words) for name, words in jobs.items()} for _ in range(count)]
    return rounds[1:] if count > 2 else rounds


def _report(rounds: list[Round], looks: list[Round], ours_only: bool) -> str:
    def median(name: str, figure: str, of: list[Round] = rounds) -> float:
        return statistics.median(one[name][figure] for one in of)

    def ratio(of: str, to: str, figure: str, among: list[Round] = rounds) -> float:
        return statistics.median(one[of][figure] / one[to][figure] for one in among)

    tokens = looks[0]["encoder"]["tokens"]
    lines = [f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {len(rounds)} rounds"]
    for name in ("ours",) if ours_only else ("ours", "megatron", "pai"):
        lines.append(f"{name:>9} whole job {median(name, 'wall'):7.1f} s wall, {median(name, 'cpu'):7.1f} s CPU")
    for name, goal in {} if ours_only else {"megatron": 12, "pai": 50}.items():
        lines.append(
            f"{name:>9} loop here / ours: {ratio(name, 'ours', 'wall'):.1f} x wall, "
            f"{ratio(name, 'ours', 'cpu'):.1f} x CPU; goal {goal}"
        )
        lines.append(f"{'':>9} {1e6 * median(name, 'cpu') / tokens:.2f} us of CPU a token")
    if not ours_only:
        scale = PUBLISHED["pai"] / PUBLISHED["megatron"]
        lines.append(
            f"      pai as published / ours: {scale * ratio('megatron', 'ours', 'wall'):.1f} x wall, "
            f"{scale * ratio('megatron', 'ours', 'cpu'):.1f} x CPU (the megatron loop here times {scale:.2f}); goal 50"
        )
    work, alone = median("ours", "work", looks), median("encoder", "work", looks)
    lines.append(
        f"work {work:.2f} s against {alone:.2f} s of the encoder alone, {len(looks)} looks: "
        f"{ratio('ours', 'encoder', 'work', looks):.2f} x wall, "
        f"{ratio('ours', 'encoder', 'work_cpu', looks):.2f} x CPU; "
        "goal 2.0 (1.1 with tokenizers)"
    )
    lines.append(f"peak memory {median('ours', 'peak_mb'):.0f} MB; goal 300")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
