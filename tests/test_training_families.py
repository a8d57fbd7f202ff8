"""Every family that trains, against a plain transformers + AdamW loop, and in other layouts against itself."""

import pytest
from conversion_models import EXPERTS, TRAINED, write_model
from training_world import VOCABULARY, mostly_full, run_cases, selected, write_dataset, write_tokenizer

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
PAIRS = {f"{name}-{layout}": (name, more) for name, layouts in LAYOUTS.items() for layout, more in layouts.items()}
# One for each mechanism; the rest are with the long tests, and twenty steps of each in its card.
QUICK = ["qwen2-moe-tp2-ep2", "qwen3-moe-mixed-pp2", "mixtral-ep2-plain", "deepseek-v3-tp2"]
QUICK_ALONE = ["phi3", "glm", "qwen2-moe", "qwen3-moe-mixed", "mixtral", "deepseek-v3"]


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
def alone(inputs, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("alone")
    names = selected(request, "name") | {PAIRS[pair][0] for pair in selected(request, "pair")}
    return run_cases(folder / "world", 1, {name: case(inputs, folder / name, name) for name in sorted(names)})


@pytest.fixture(scope="module")
def layouts(inputs, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("layouts")
    cases = {pair: PAIRS[pair] for pair in sorted(selected(request, "pair"))}
    return run_cases(
        folder / "world", 2, {pair: case(inputs, folder / pair, name, **more) for pair, (name, more) in cases.items()}
    )


def losses(history):
    return [step["loss"] for step in history]


@pytest.mark.parametrize("name", mostly_full(MODELS, QUICK_ALONE))
def test_twenty_steps_equal_a_plain_transformers_loop(inputs, alone, name):
    expected = plain_losses(lesson(inputs[0] / name, inputs[1], inputs[0]))
    assert losses(alone[name]) == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert expected[-1] < expected[0] - LEARNT, "nothing was learned: the comparison would prove little"


def same(found, expected):
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)
    norms = [[step["grad_norm"] for step in history] for history in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("pair", mostly_full(PAIRS, QUICK))
def test_another_layout_trains_the_same_model(alone, layouts, pair):
    same(layouts[pair], alone[PAIRS[pair][0]])
