"""Every family that trains, against a plain transformers + AdamW loop, and in other layouts against itself."""

import numpy as np
import pytest
import torch
from conversion_models import EXPERTS, TRAINED, write_model
from training_world import VOCABULARY, flags, run_cases, write_dataset, write_tokenizer

from data_preprocessing.dataset import open_dataset
from toolkits.training.batches import Batches
from toolkits.training.blend import Mix
from toolkits.training.config import BatchSettings, DataSettings
from toolkits.training.layout import Layout
from toolkits.training.optimizer import learning_rate
from toolkits.training.rows import Rows, make_rows, select

STEPS, GLOBAL, SEQ_LEN = 20, 4, 64
MODELS = TRAINED | EXPERTS
LAYOUTS = {
    "qwen2-moe": {
        "tp2": {"tensor_parallel": 2},
        "ep2": {"expert_parallel": 2},
        "tp2-ep2": {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1},
    },
    "qwen3-moe": {"cp2": {"context_parallel": 2}},
    "qwen3-moe-mixed": {"pp2": {"pipeline_parallel": 2}},
    "mixtral": {"ep2-plain": {"expert_parallel": 2, "distributed_optimizer": False}},
    "deepseek-v2-lite": {"tp2": {"tensor_parallel": 2}},
    "deepseek-v2": {"pp2": {"pipeline_parallel": 2}},
    "deepseek-v3": {
        "tp2": {"tensor_parallel": 2},
        "ep2": {"expert_parallel": 2},
        "cp2": {"context_parallel": 2},
    },
    "llama3.2": {"tp2": {"tensor_parallel": 2}},
    "phi4-mini": {"cp2": {"context_parallel": 2}},
    "glm": {"pp2": {"pipeline_parallel": 2}},
}
PAIRS = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]
# One for each mechanism; the rest are with the long tests.
QUICK = [
    ("qwen2-moe", "tp2-ep2"),
    ("qwen3-moe-mixed", "pp2"),
    ("mixtral", "ep2-plain"),
    ("deepseek-v3", "tp2"),
    ("deepseek-v3", "cp2"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for name, config in MODELS.items():
        write_model(folder / name, config | {"vocab_size": VOCABULARY})
        write_tokenizer(folder / name)
    return folder, write_dataset(folder / "data", folder / "mistral", rows=40)


def case(inputs, out, name, **changes):
    folder, data = inputs
    settings = {
        "checkpoint": folder / name,
        "data": data,
        "valid_data": data,
        "seq_len": SEQ_LEN,
        "micro_batch_size": 1,
        "global_batch_size": GLOBAL,
        "train_iters": STEPS,
        "precision": "fp32",
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup_iters": 3,
        "output": out,
    }
    return flags(**(settings | changes))


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return run_cases(folder / "world", 1, {name: case(inputs, folder / name, name) for name in MODELS})


@pytest.fixture(scope="module")
def layouts(inputs, tmp_path_factory):
    return run_pairs(inputs, tmp_path_factory.mktemp("layouts"), QUICK)


@pytest.fixture(scope="module")
def more_layouts(inputs, tmp_path_factory):
    return run_pairs(inputs, tmp_path_factory.mktemp("more"), [pair for pair in PAIRS if pair not in QUICK])


def run_pairs(inputs, folder, pairs):
    cases = {
        f"{name}-{layout}": case(inputs, folder / f"{name}-{layout}", name, **LAYOUTS[name][layout])
        for name, layout in pairs
    }
    return run_cases(folder / "world", 2, cases)


def reference(folder, data):
    """Train with transformers and torch alone, each conversation by itself; return losses and final weights."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = [
        {"params": [w for w in network.parameters() if w.dim() > 1], "weight_decay": 0.1},
        {"params": [w for w in network.parameters() if w.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    dataset, settings = open_dataset(data), DataSettings(data=data, seq_len=SEQ_LEN)
    selection, _ = select(dataset, settings)
    rows = Rows((make_rows(selection.hold_out(seed=1234)[0], settings),), Mix((1,)))
    batches = Batches(rows, BatchSettings(1, GLOBAL), Layout(1, 1, 1, False, GLOBAL), replica=0, seed=1234)
    losses = []
    for step in range(STEPS):
        total, trained = 0.0, 0
        numbers = batches.row_numbers(step * GLOBAL)
        for document, *_ in (segment for number in numbers for segment in rows.parts[0].segments(number)):
            tokens = torch.from_numpy(dataset.tokens(document).astype(np.int64))
            mask = torch.from_numpy(dataset.mask(document)[1:].astype(np.float32))
            logits = network(tokens[None, :-1]).logits[0]
            total += (torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none") * mask).sum()
            trained += int(mask.sum())
        optimizer.zero_grad()
        (total / trained).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, steps=STEPS, warmup=3, peak=1e-3, floor=1e-4)
        optimizer.step()
        losses.append(float(total.detach()) / trained)
    return losses


def losses(history):
    return [step["loss"] for step in history]


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_equal_a_plain_transformers_loop(inputs, alone, name):
    expected = reference(inputs[0] / name, inputs[1])
    assert losses(alone[name]) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.3, "nothing was learned: the comparison would prove little"


def same(found, expected):
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)
    norms = [[step["grad_norm"] for step in history] for history in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize(("name", "layout"), QUICK)
def test_another_layout_trains_the_same_model(alone, layouts, name, layout):
    same(layouts[f"{name}-{layout}"], alone[name])


@pytest.mark.full
@pytest.mark.parametrize(("name", "layout"), [pair for pair in PAIRS if pair not in QUICK])
def test_other_layouts_train_the_same_models(alone, more_layouts, name, layout):
    same(more_layouts[f"{name}-{layout}"], alone[name])
