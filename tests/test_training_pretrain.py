"""Pre-training against the truth: a plain transformers loop over the documents, and itself after an interruption."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_world import flags, run_cases, write_model

from data_preprocessing.build import build
from data_preprocessing.dataset import open_dataset
from toolkits.training.optimizer import learning_rate

STEPS, SEQ_LEN, GLOBAL, SEED = 6, 48, 4, 1234
HALF = "iter_0000003"


def write_texts(prefix, tokenizer, *, rows, seed):
    """Build a dataset of texts, some of several rows, some of many a row."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("xyz é"), rng.integers(1, 150))) + "." for _ in range(rows)]
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    build(source, prefix, tokenizer=tokenizer)
    return prefix


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = write_model(folder / "model")
    sizes = {"a": 40, "b": 9, "valid": 5}
    return {"model": model} | {
        name: write_texts(folder / name, model, rows=rows, seed=rows) for name, rows in sizes.items()
    }


def case(inputs, output, **changes):
    return flags(
        **{
            "checkpoint": inputs["model"], "data": inputs["a"], "valid_data": inputs["valid"], "rows": "documents",
            "seq_len": SEQ_LEN, "micro_batch_size": 2, "global_batch_size": GLOBAL, "train_iters": STEPS,
            "precision": "fp32", "export_hf": True, "output": output, "lr": 1e-3, "min_lr": 1e-4, "warmup_iters": 2,
            "save_interval": 3,
        }
        | changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """(folder, histories) of runs on one and on two ranks; the blend is interrupted and gone on with."""
    folder = tmp_path_factory.mktemp("runs")
    blend = f"0.7 {inputs['a']} 0.3 {inputs['b']}"
    one = {"alone": case(inputs, folder / "alone"), "blend": case(inputs, folder / "blend", data=blend)}
    two = {
        "cp2": case(inputs, folder / "cp2", context_parallel=2),
        "pp2": case(inputs, folder / "pp2", pipeline_parallel=2),
    }
    histories = run_cases(folder / "one", 1, one) | run_cases(folder / "two", 2, two)
    shutil.copytree(folder / "blend", folder / "blend-again")
    shutil.rmtree(folder / "blend-again" / "checkpoint" / "sft" / "iter_0000006")
    shutil.rmtree(folder / "blend-again" / "huggingface")
    again = {"blend-again": case(inputs, folder / "blend-again", data=blend)}
    return folder, histories | run_cases(folder / "again", 1, again)


def reference(inputs):
    """Train with transformers and torch alone, each stretch of a document by itself; return losses and weights."""
    from transformers import Qwen2ForCausalLM

    network = Qwen2ForCausalLM.from_pretrained(inputs["model"], dtype=torch.float32)
    groups = [
        {"params": [weight for weight in network.parameters() if (weight.dim() > 1) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    rows, losses = rows_of(inputs), []
    order = np.concatenate([np.random.default_rng([SEED, epoch]).permutation(len(rows)) for epoch in range(3)])
    for step in range(STEPS):
        total, trained = 0.0, 0
        for row in order[step * GLOBAL : (step + 1) * GLOBAL]:
            for stretch, targets in rows[row]:
                logits = network(torch.tensor(stretch)[None]).logits[0, : len(targets)]
                total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum")
                trained += len(targets)
        optimizer.zero_grad()
        (total / trained).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, steps=STEPS, warmup=2, peak=1e-3, floor=1e-4)
        optimizer.step()
        losses.append(float(total.detach()) / trained)
    return losses, network.state_dict()


def rows_of(inputs):
    """Lay the documents end to end in the seed's order; each row is stretches and the tokens that they predict."""
    dataset = open_dataset(inputs["a"])
    documents = [dataset.tokens(index).tolist() for index in np.random.default_rng(SEED).permutation(len(dataset))]
    rows, space = [[]], SEQ_LEN
    for document in documents:
        place = 0
        while place < len(document):
            if not space:
                rows.append([])
                space = SEQ_LEN
            end = min(len(document), place + space)
            rows[-1].append((document[place:end], document[place + 1 : end + 1]))
            space, place = space - (end - place), end
    return [[(stretch, targets) for stretch, targets in row if targets] for row in rows]


def losses(history):
    return [step["loss"] for step in history]


def exported(folder, name):
    return load_file(folder / name / "huggingface" / "sft" / "model.safetensors")


def test_the_losses_are_those_of_a_plain_transformers_loop(inputs, runs):
    folder, histories = runs
    expected, weights = reference(inputs)
    assert losses(histories["alone"]) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.5, "nothing was learned: the comparison would prove little"
    final = exported(folder, "alone")
    assert max(float((final[name] - weights[name]).norm() / weights[name].norm()) for name in final) < 1e-3
    assert [step["tokens"] for step in histories["alone"]] == [SEQ_LEN * GLOBAL] * STEPS, "rows are full"


@pytest.mark.parametrize("name", ["cp2", "pp2"])
def test_rows_do_not_depend_on_the_layout(runs, name):
    _, histories = runs
    assert losses(histories[name]) == pytest.approx(losses(histories["alone"]), abs=1e-4)
    counts = [[step["trained_tokens"] for step in history] for history in (histories[name], histories["alone"])]
    assert counts[0] == counts[1]


def test_a_blend_goes_on_bit_for_bit_in_the_middle_of_an_epoch(runs):
    folder, histories = runs
    whole, again = histories["blend"], histories["blend-again"]
    assert losses(again) == losses(whole)[3:] and [step["step"] for step in again] == [4, 5, 6]
    first, second = exported(folder, "blend"), exported(folder, "blend-again")
    assert all(torch.equal(first[name], second[name]) for name in first)
    (log,) = [path for path in (folder / "blend-again" / "log").iterdir() if "going on from" in path.read_text()]
    assert "data from row 12" in log.read_text()


def test_the_start_says_what_is_read_how_often(runs):
    (log,) = (runs[0] / "blend" / "log").iterdir()
    said = log.read_text()
    rows = [int(count) for count in re.findall(r"tokens in (\d+) rows of 48", said)]
    epochs = [float(number) for number in re.findall(r"([\d.]+) epochs in this run", said)]
    given = [round(0.7 * STEPS * GLOBAL), round(0.3 * STEPS * GLOBAL)]
    assert epochs == pytest.approx([count / rows for count, rows in zip(given, rows, strict=True)], abs=0.06)
