"""The figures on the page about LoRA are those of the planner, in both languages."""

import re
from pathlib import Path

import pytest
from launch_world import SEVEN_B

from conversion.plan import plan_for
from toolkits.planning.memory import run_memory
from toolkits.planning.weights import Tuning, adapter_parameters
from toolkits.training.config import TrainConfig
from toolkits.training.layout import layout_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
PLAN = plan_for(SEVEN_B)
METHODS = ("full", "lora", "qlora")


@pytest.mark.parametrize("page", ["lora.md", "lora.zh.md"])
def test_the_memory_table_is_what_the_planner_says(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    rows = [line.strip(" |").split(" | ") for line in text.splitlines() if re.search(r"(\| \d+\.\d\d ){6}\|$", line)]
    assert [[float(number) for number in row[1:]] for row in rows] == [planned(method) for method in METHODS]
    assert "16" in rows[1][0] and "16" in rows[2][0]
    parameters = adapter_parameters(PLAN, Tuning("lora", 8))
    assert f"{parameters / PLAN.num_parameters:.3%}" in text


def planned(method):
    """What a rank holds of the published 7B at 4096 tokens, in GB of 10^9 bytes, as the page's columns have it."""
    values = {"checkpoint": "CKPT", "data": Path("DATA"), "output": Path("OUT"), "train_iters": 1, "seq_len": 4096}
    config = TrainConfig.from_values(values | {"global_batch_size": 1})
    (rank,) = run_memory(PLAN, config, layout_of(config, PLAN.settings, 1), Tuning(method, 16))
    held = rank.states
    columns = (held.parameters, held.gradients, held.masters + held.moments, rank.activations, rank.logits, rank.total)
    return [round(each / 1e9, 2) for each in columns]
