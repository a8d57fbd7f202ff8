"""Every family that trains, against a plain transformers + AdamW loop, and in other layouts against itself."""

import pytest
from conversion_models import EXPERTS, TRAINED, write_model
from training_world import VOCABULARY, run_cases, write_dataset, write_tokenizer

from toolkits.cards.lesson import LEARNT, LOSS_TOLERANCE, lesson, plain_losses

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
    "phi-partial-rotary": {"cp2": {"context_parallel": 2}},
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
    return lesson(folder / name, data, out, **changes).flags()


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


def losses(history):
    return [step["loss"] for step in history]


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_equal_a_plain_transformers_loop(inputs, alone, name):
    expected = plain_losses(lesson(inputs[0] / name, inputs[1], inputs[0]))
    assert losses(alone[name]) == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert expected[-1] < expected[0] - LEARNT, "nothing was learned: the comparison would prove little"


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
