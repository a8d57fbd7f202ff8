"""Helpers of the pipeline tests: a folder with a pipeline's file, and lines that are run by something quick."""

import hashlib
import itertools
import json
import os
from pathlib import Path

from click.testing import CliRunner
from data_world import talk, write_rows, write_tokenizer

from conversion.digest import weights_digest
from toolkits.cli import temper
from toolkits.monitoring.lineage import Lineage, origin_of
from toolkits.monitoring.record import recorded
from toolkits.pipeline.child import Lines

WHOLE = """\
output: out
model: base
stages:
  - name: chats
    do: build
    input: chats.jsonl
  - name: tuned
    do: sft
    data: "{chats}"
    train_iters: 3
    lr: 1e-3
  - name: said
    do: pairs
    model: "{tuned}"
    prompts: chats.jsonl
    replace: [["(.*)", "better"]]
  - name: better
    do: build
    input: ["{said}"]
  - name: aligned
    do: dpo
    model: "{tuned}"
    data: "0.5 {better} 0.5 {chats}"
    train_iters: 2
    lr: 1e-5
    beta: 0.2
  - name: answers
    do: generate
    models: {before: "{tuned}", after: "{aligned}"}
    prompt: [who, "what [x] | y"]
"""


def write_world(folder, text=WHOLE):
    """Write a pipeline's file with what it reads; return the file."""
    base = write_tokenizer(folder / "base")
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"base")
    write_rows(folder / "chats.jsonl", [talk(f"question {number}", "answer") for number in range(4)])
    (folder / "pipeline.yaml").write_text(text, encoding="utf-8")
    return folder / "pipeline.yaml"


def change(file, *pairs):
    text = file.read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


def run(file, *words):
    return CliRunner().invoke(temper, ["pipeline", str(file), *map(str, words)])


class Quick(Lines):
    """Runs `data build` for real, and leaves what the other commands would leave; `codes` are those to end with."""

    def __init__(self, log, codes):
        super().__init__()
        self.log, self.codes = log, codes

    def run(self, words):
        self.log.append(list(words))
        code = self.codes.pop(str(words[1]), 0) if words[0] == "train" else 0
        if code:
            return code
        {"train": self._train, "data": self._data, "generate": self._generate}[words[0]](words)
        return 0

    def _data(self, words):
        if words[1] == "build":
            result = CliRunner().invoke(temper, words)
            assert result.exit_code == 0, result.exception
            return
        rows = [{"prompt": f"q{number}", "chosen": "better", "rejected": read(words, "--model")} for number in range(3)]
        write_rows(Path(words[3]), rows)

    def _train(self, words):
        at = dict(itertools.pairwise(words))
        folder = Path(at["--output"]) / "huggingface" / at["--name"]
        folder.mkdir(parents=True, exist_ok=True)
        settings = [word for word in words if not word.startswith(str(Path(at["--output"]).parent))]
        made = hashlib.sha256(f"{read(words, '--checkpoint')} {settings}".encode()).hexdigest()
        (folder / "model.safetensors").write_text(made)
        leave_lineage(Path(at["--output"]) / "checkpoint" / at["--name"], Path(at["--checkpoint"]), folder)

    def _generate(self, words):
        asked = [word for flag, word in itertools.pairwise(words) if flag == "--prompt"]
        weights = (Path(words[1]) / "model.safetensors").read_text()
        rows = [
            {"prompt": [{"role": "user", "content": each}], "completion": f"{each}: {weights[:8]}"} for each in asked
        ]
        write_rows(Path(words[words.index("--output") + 1]), rows)


def leave_lineage(run, base, export):
    """Leave what a run notes of where it came from and what it exported."""
    digest = weights_digest(base)
    about = {"kind": "huggingface", "path": str(base.absolute()), "digest": digest, "manifest": None}
    (run / "hf").mkdir(parents=True, exist_ok=True)
    with recorded(run, about={"steps": 1}, measure=dict) as record:
        lineage = Lineage(record, base={**about, "origin": origin_of(base)}, start={"started": "then"})
        lineage.exported(export, step="iter_0000001")


def read(words, flag):
    return (Path(words[words.index(flag) + 1]) / "model.safetensors").read_text()


def quick(monkeypatch, **codes):
    """Let pipelines run by `Quick`; return the list of the lines that run."""
    log = []
    monkeypatch.setattr("toolkits.pipeline.running.Lines", lambda: Quick(log, codes))
    return log


def state_of(file):
    return json.loads((file.parent / "out" / "pipeline.json").read_text())["stages"]


def everything_in(folder):
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "pipeline.json")
    return {os.path.relpath(path, folder): path.read_bytes() for path in found}
