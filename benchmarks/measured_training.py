"""Runs of the real training line whose loop is exchanged for one that measures."""

import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bare_loop import BareLoop
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

import toolkits.training.run as line
from conversion.plan import plan_for
from data_preprocessing.writer import DatasetWriter
from toolkits.planning.timing import PEAK_FLOPS, flops_per_token
from toolkits.planning.weights import Tuning, sizes_of
from toolkits.training import loop
from toolkits.training.batches import MicroBatch
from toolkits.training.loop import Training, train_step, upcoming
from toolkits.training.objectives import OBJECTIVES
from toolkits.training.options import parse_flags
from toolkits.training.sources import find_model

WARM_UP = 3  # steps: compilation, the allocator
CONSTANT_RATE = ["--lr", "1e-5", "--min-lr", "1e-5", "--weight-decay", "0"]  # the bare loop knows no schedule
MEAN_TOKENS = 285  # of a conversation
SHAPES: dict[str, dict[str, Any]] = {  # of the published Qwen2.5 configs
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "0.5B/12": {  # the same layers; two of 24, and a twelfth of the vocabulary
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 2,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 12661,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
}
Measure = Callable[[Training, Iterator[MicroBatch]], dict[str, Any]]


def on_gpu(shape: str, *, seq_len: int, rows: int, steps: int, recompute: str) -> dict[str, Any]:
    """Train a shape on one GPU; return tokens a second, MFU in two conventions and the peak memory."""
    flags = ["--seq-len", str(seq_len), "--micro-batch-size", str(rows), "--global-batch-size", str(rows)]
    flags += ["--train-iters", str(WARM_UP + steps), "--precision", "bf16", "--recompute", recompute]
    return {"shape": shape, "seq_len": seq_len, "rows": rows, **_run(shape, flags, _speed, rows_needed=16 * rows)}


def overhead_on_cpu(*, pairs: int) -> dict[str, Any]:
    """Return how long our step takes, as a share of a bare megatron-core step with the same model and batches."""
    torch.set_num_threads(1)
    flags = ["--seq-len", "256", "--global-batch-size", "4", "--train-iters", str(pairs), "--precision", "fp32"]
    return _run("tiny", flags, _overhead, rows_needed=4 * pairs)


def packing_on_cpu(*, pairs: int) -> dict[str, Any]:
    """Return how many more tokens a second packed rows of 2048 train than rows of one conversation each, padded."""
    torch.set_num_threads(1)
    flags = ["--seq-len", "2048", "--global-batch-size", "1", "--train-iters", "4", "--precision", "fp32"]
    ratios = []
    for _ in range(pairs):
        packed, padded = (_run("tiny", [*flags, word], _rate, rows_needed=6) for word in ("--packing", "--no-packing"))
        ratios.append(packed["tokens_per_second"] / padded["tokens_per_second"])
    kept = ratios[1:]
    return {"ratio": float(np.median(kept)), "lowest": min(kept), "highest": max(kept), "pairs": len(kept)}


def lora_on_cpu(*, pairs: int) -> dict[str, Any]:
    """Return how long a step takes that trains LoRA adapters of rank 16, as a share of one that trains all weights.

    All else is the same: fp32, 2048 tokens a step in rows of 512. The layers are those of Qwen2.5-0.5B, and layers
    and vocabulary are cut alike, so that the output layer has its share of the work. Adapters cost a wider model
    less: a matrix has width^2 numbers, its adapter rank x width. Both models are there at once and take their steps
    in turn, so that what else the machine does slows both.
    """
    torch.set_num_threads(1)
    flags = ["--seq-len", "512", "--global-batch-size", "4", "--train-iters", str(pairs), "--precision", "fp32"]
    asked = {"rows_needed": 4 * pairs, "weights": True}

    def beside(full: Training, batches: Iterator[MicroBatch]) -> dict[str, Any]:
        def in_turn(lora: Training, of_lora: Iterator[MicroBatch]) -> dict[str, Any]:
            return _pairs_of_steps((lora, of_lora), (full, batches))

        with mock.patch.object(line, "process_groups", lambda *_, **__: contextlib.nullcontext()):  # they are up
            return _run("0.5B/12", [*flags, "--lora-rank", "16"], in_turn, **asked)

    return _run("0.5B/12", flags, beside, **asked)


def dpo_on_cpu(*, pairs: int) -> dict[str, Any]:
    """Return how long DPO with a cached reference takes for a token, as a share of fine-tuning on the same answers.

    The model is that of `lora_on_cpu`, fp32, 2048 tokens a step in rows of 512. The reference was computed before.
    """
    torch.set_num_threads(1)
    flags = ["--global-batch-size", "4", "--train-iters", str(pairs), "--precision", "fp32", "--seq-len"]
    asked = {"rows_needed": 4 * pairs, "weights": True, "longest": 256}

    def beside(sft: Training, batches: Iterator[MicroBatch]) -> dict[str, Any]:
        def in_turn(dpo: Training, of_dpo: Iterator[MicroBatch]) -> dict[str, Any]:
            return _pairs_of_steps((dpo, of_dpo), (sft, batches))

        with mock.patch.object(line, "process_groups", lambda *_, **__: contextlib.nullcontext()):  # they are up
            return _run("0.5B/12", [*flags, "256", "--rows", "pairs"], in_turn, objective="dpo", **asked)

    return _run("0.5B/12", [*flags, "512"], beside, **asked)


def _pairs_of_steps(*runs: tuple[Training, Iterator[MicroBatch]]) -> dict[str, Any]:
    """Return what a token takes in the first run as a share of the second, step beside step."""
    times = []
    for index in range(runs[0][0].steps):
        found = []
        for run, batches in runs:
            begins = _now()
            figures, _ = train_step(run, index, batches)
            found.append((_now() - begins) / figures.tokens)
        times.append(found)
    ours, theirs = np.array(times[1:]).transpose(1, 0, 2)
    wall, cpu = (ours / theirs).T
    return {
        "ratio": float(np.median(wall)),
        "lowest": float(wall.min()),
        "highest": float(wall.max()),
        "cpu_time_ratio": float(np.median(cpu)),
        "pairs": len(wall),
        "token_seconds": float(np.median(theirs[:, 0])),
    }


def _rate(run: Training, batches: Iterator[MicroBatch]) -> dict[str, Any]:
    train_step(run, 0, batches)
    began = _now()
    tokens = sum(train_step(run, index, batches)[0].tokens for index in range(1, run.steps))
    wall, cpu = _now() - began
    return {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu}


def _speed(run: Training, batches: Iterator[MicroBatch]) -> dict[str, Any]:
    tokens, began = 0, 0.0
    for index in range(run.steps):
        if index == WARM_UP:
            torch.cuda.synchronize()
            tokens, began = 0, time.perf_counter()
        figures, _ = train_step(run, index, batches)
        run.reporter.step(figures)
        tokens += figures.tokens
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    plan, data = find_model(run.config.model).plan, run.batches.rows.parts[0]
    sizes, lengths = sizes_of(plan), np.diff(data.ends, prepend=0).astype(float)
    whole = 6 * plan.num_parameters + 12 * sizes.layers * sizes.query * data.row_tokens
    strict = flops_per_token(plan, int((lengths**2).sum() / lengths.sum()), Tuning())
    rate, peak = tokens / seconds, PEAK_FLOPS["bf16"]
    return {
        "device": torch.cuda.get_device_name(),
        "tokens_per_second": rate,
        "mfu_6n_full_attention": rate * whole / peak,
        "mfu_strict": rate * strict / peak,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "step_seconds": seconds / (run.steps - WARM_UP),
    }


def _overhead(run: Training, batches: Iterator[MicroBatch]) -> dict[str, Any]:
    bare, prepared, times = BareLoop(run), upcoming(run), []
    for index in range(run.steps):
        share = [next(prepared) for _ in range(run.layout.micro_batches)]
        begins = _now()
        figures, _ = train_step(run, index, batches)
        run.reporter.step(figures)
        between = _now()
        loss = bare.step(share)
        ends = _now()
        assert loss == figures.loss, f"step {index + 1}: {figures.loss} here, {loss} in the bare loop"
        times.append((between - begins, ends - between))
    ours, theirs = np.array(times[1:]).transpose(1, 0, 2)
    ratios = ours / theirs
    return {
        "ratio": float(np.median(ratios[:, 0])),
        "lowest": float(ratios[:, 0].min()),
        "highest": float(ratios[:, 0].max()),
        "cpu_time_ratio": float(np.median(ratios[:, 1])),
        "pairs": len(ratios),
        "bare_seconds": float(np.median(theirs[:, 0])),
        "threads": torch.get_num_threads(),
    }


def _now() -> np.ndarray:
    """Return the seconds on the wall, and those that all threads of this process have computed."""
    return np.array([time.perf_counter(), time.process_time()])


def _run(
    shape: str,
    flags: list[str],
    measure: Measure,
    *,
    rows_needed: int,
    weights: bool = False,
    objective: str = "sft",
    longest: int = 2048,
) -> dict[str, Any]:
    """Start a training run of `shape` on this rank alone, with `measure` in the place of its loop.

    It starts from random weights, which with `weights` are a checkpoint that it reads. Its conversations have at most
    `longest` tokens; those of DPO are pairs.
    """
    found: dict[str, Any] = {}

    def measured(run: Training, batches: Iterator[MicroBatch]) -> Path:
        found.update(measure(run, batches))
        return run.checkpoints

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        model, data = _write_config(folder, SHAPES[shape]), folder / "data"
        seq_len = int(flags[flags.index("--seq-len") + 1])
        kind, tokens = ("preferences", 2) if objective == "dpo" else ("conversations", 1)
        tokens *= rows_needed * seq_len
        _write_conversations(data, kind, vocabulary=SHAPES[shape]["vocab_size"], tokens=tokens, longest=longest)
        if weights:
            _write_weights(model)
        start = ["--checkpoint", model] if weights else ["--checkpoint", "none", "--hf-config", model]
        words = [*start, "--data", data, "--output", folder / "out"]
        config = parse_flags([*map(str, words), *CONSTANT_RATE, *flags])
        with (
            mock.patch.dict(os.environ, _alone()),
            mock.patch.object(loop, "_take_steps", measured),
            mock.patch.object(line, "_require_space", lambda plan: None),  # nothing is saved
        ):
            line.run(config, OBJECTIVES[objective])
    return found


def _alone() -> dict[str, str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _write_config(folder: Path, shape: dict[str, Any]) -> Path:
    fixed = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6}
    rope = {"max_position_embeddings": 32768, "rope_theta": 1e6, "torch_dtype": "bfloat16"}
    path = folder / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**fixed, **rope, **shape}))
    Tokenizer(BPE()).save(str(path.with_name("tokenizer.json")))  # a run wants one; the data is tokens already
    return path.parent


def _write_weights(folder: Path) -> None:
    """Write a HuggingFace checkpoint of small random weights beside its config.json."""
    plan, generator = plan_for(json.loads((folder / "config.json").read_text())), torch.Generator().manual_seed(1)
    shapes = {name: step.parts[number].shape for name, (step, number) in plan.hf_tensors.items()}
    save_file(
        {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _write_conversations(prefix: Path, kind: str, *, vocabulary: int, tokens: int, longest: int) -> None:
    """Write conversations of random tokens, log-normal in length as chat data is; the second half is trained on."""
    random, mean = np.random.default_rng(1), min(MEAN_TOKENS, longest // 2)
    lengths = np.clip(random.lognormal(np.log(mean) - 0.32, 0.8, 4 * (tokens // mean)), 16, longest)
    with DatasetWriter(prefix.parent, f"{prefix.name}_text_document") as writer:
        for length in lengths.astype(int):
            mask = (np.arange(length) >= length // 2).astype(np.uint8)
            writer.add(random.integers(0, vocabulary, length, dtype=np.int32), mask)
        writer.finish({"kind": kind, "tokenizer": {"fingerprint": None}})
