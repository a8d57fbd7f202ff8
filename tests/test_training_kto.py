"""Training on single judged answers: KTO by hand, as TRL does it, and the same at every layout."""

import json
import math

import numpy as np
import pytest
import torch
from training_world import LAYOUTS, flags, mostly_full, run_cases, selected, write_judged, write_model, write_pairs
from trl_world import steps_of_trl

from data_preprocessing.build import build
from data_preprocessing.dataset import open_dataset
from toolkits.foundation.errors import DataError
from toolkits.training.batches import Batches, micro_batch
from toolkits.training.config import TrainConfig
from toolkits.training.layout import layout_of
from toolkits.training.objectives.kto import answer_losses
from toolkits.training.settings import KtoSettings
from toolkits.training.sources import _balance, find_data, find_model

STEPS, LAYOUT_STEPS, GLOBAL = 20, 6, 8
RATE = 1e-3
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "reference": "adapters-off"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = write_model(folder / "model", tied=False)
    return {
        "model": model,
        "data": write_judged(folder / "data", model, rows=60),
        "valid": write_judged(folder / "valid", model, rows=21, seed=6),
    }


def settings(inputs, output, **changes):
    return {
        "checkpoint": inputs["model"],
        "data": inputs["data"],
        "valid_data": inputs["valid"],
        "rows": "answers",
        "seq_len": 129,
        "micro_batch_size": 2,
        "global_batch_size": GLOBAL,
        "train_iters": LAYOUT_STEPS,
        "precision": "fp32",
        "lr": RATE,
        "min_lr": RATE / 10,
        "output": output,
    } | changes


def run_all(inputs, folder, ranks, cases):
    lines = {name: flags(**settings(inputs, folder / name, **changes)) for name, changes in cases.items()}
    return run_cases(folder / "world", ranks, lines, objective="kto")


AS_TRL = {"packing": False, "min_lr": RATE, "train_iters": STEPS, "weight_decay": 0.0, "desirable_weight": 1.5}


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    cases = {"trl": AS_TRL, "short": {}, "adapters-off": LORA, "cached": LORA | {"reference": "cached"}}
    return run_all(inputs, tmp_path_factory.mktemp("alone"), 1, cases)


TWO_RANKS = {
    **LAYOUTS,
    "cp2-adapters-off": {"context_parallel": 2, **LORA},
    "pp2-adapters-off": {"pipeline_parallel": 2, **LORA},
}


@pytest.fixture(scope="module")
def together(request, inputs, alone, tmp_path_factory):
    names = sorted(selected(request, "layout"))
    return run_all(inputs, tmp_path_factory.mktemp("two"), 2, {name: TWO_RANKS[name] for name in names})


@pytest.mark.parametrize("layout", mostly_full(TWO_RANKS, ["dp2", "cp2-adapters-off"]))
def test_another_layout_trains_the_same(alone, together, layout):
    steps = alone["adapters-off" if "off" in layout else "short"]
    assert len(steps) == LAYOUT_STEPS
    for one, other in zip(steps, together[layout], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        # Of the first step all answers are as probable as under the reference, but for the last digit.
        unsure = ("accuracy",) if one["step"] == 1 else ()
        expected, found = ({k: v for k, v in step["more"].items() if k not in unsure} for step in (one, other))
        assert found == pytest.approx(expected, abs=1e-3)


def test_it_learns_and_the_base_is_the_cached_reference(alone):
    first, *_, last = alone["short"]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and first["more"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert last["more"]["rewards/chosen"] > 0 > last["more"]["rewards/rejected"] and last["loss"] < 0.45
    cached, asked = alone["cached"], alone["adapters-off"]
    assert [step["loss"] for step in cached] == pytest.approx([step["loss"] for step in asked], abs=1e-6)
    assert cached[-1]["more"] == pytest.approx(asked[-1]["more"], abs=1e-4)


@pytest.mark.parametrize(
    ("good", "said"),
    [
        ([True] * 4 + [False] * 3, "4 answers are good, 3 are not"),
        ([True] * 6 + [False] * 3, "--undesirable-weight 1.5 to 2 both count as much"),
        ([True] * 2 + [False] * 8, "--undesirable-weight 0.19 to 0.25 both"),
        ([True] * 3, "3 answers are good, 0 are not: nothing tells the two apart but the reference"),
    ],
)
def test_how_the_answers_are_balanced_is_said(good, said):
    assert said in _balance(np.array(good))


def test_values_by_hand():
    weights = KtoSettings(desirable_weight=1.5, undesirable_weight=0.5)
    ratio, good = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0])
    losses = answer_losses(ratio, good, torch.tensor(0.5), beta=0.2, settings=weights)
    expected = [1.5 * (1 - 1 / (1 + math.exp(-0.3))), 0.5 * (1 - 1 / (1 + math.exp(-0.3)))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_every_answer_stands_once_behind_another_prompt(inputs, tmp_path):
    config = TrainConfig.from_values(settings(inputs, tmp_path / "out"))
    source = find_model(config.model)
    rows = find_data(config.data, source).training
    (part,), dataset = rows.parts, open_dataset(inputs["data"])
    partners = part.others.dataset.partners
    assert sorted(partners) == list(range(60)) and (partners != np.arange(60)).all()
    assert part.good.tolist() == [dataset.about(row)["label"] for row in range(60)]
    for document in (0, 7, 59):
        prompt, answer = (np.flatnonzero(dataset.mask(each)) for each in (document, partners[document]))
        tokens, mask = part.others.dataset.tokens(document), part.others.dataset.weights(document)
        assert tokens[: prompt[0]].tolist() == dataset.tokens(document)[: prompt[0]].tolist()
        assert tokens[prompt[0] :].tolist() == dataset.tokens(partners[document])[answer[0] : answer[-1] + 1].tolist()
        assert mask[: prompt[0]].sum() == 0 and mask[prompt[0] :].all()
    batches = Batches(rows, config.batch, layout_of(config, source.settings, 1), replica=0, seed=1)
    batch = next(batches.micro_batches(batches.row_numbers(0)))
    assert batch.answers.numbers.tolist() == batch.others.answers.numbers.tolist()
    assert set(batch.answers.good.tolist()) == {0.0, 1.0}
    assert micro_batch(rows, [None, None], length=129).answers.numbers.tolist() == []


def test_no_answer_is_held_against_the_other_answers_to_its_own_prompt(inputs, tmp_path):
    rows = [{"prompt": f"p{n // 2}", "completion": f"a{n}", "label": bool(n % 2)} for n in range(10)]
    for name, asked in (("twice", rows), ("one", [row | {"prompt": "p"} for row in rows])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        build(tmp_path / f"{name}.jsonl", tmp_path / name, tokenizer=inputs["model"])
    for packing in (True, False):
        changes = {"data": tmp_path / "twice", "valid_data": None, "packing": packing}
        config = TrainConfig.from_values(settings(inputs, tmp_path / "out", **changes))
        found = find_data(config.data, find_model(config.model))
        partners = found.training.parts[0].others.dataset.partners
        assert (partners // 2 != np.arange(10) // 2).all()
        assert partners.tolist() == found.validation.parts[0].others.dataset.partners.tolist()
    config = TrainConfig.from_values(settings(inputs, tmp_path / "out", data=tmp_path / "one"))
    with pytest.raises(DataError, match="all answers are to one prompt"):
        find_data(config.data, find_model(config.model))


def test_other_data_is_refused_by_name(inputs, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", inputs["model"], rows=5)
    for rows, data, said in (
        ("answers", pairs, "holds preferences, .* reads labelled.*`temper train dpo`"),
        ("pairs", inputs["data"], "holds labelled, .* reads preferences.*`temper train kto`"),
    ):
        config = TrainConfig.from_values(settings(inputs, tmp_path / "out", rows=rows, data=data))
        with pytest.raises(DataError, match=said):
            find_data(config.data, find_model(config.model))


def test_twenty_steps_equal_the_trainer_of_trl(inputs, alone, tmp_path):
    config = TrainConfig.from_values(settings(inputs, tmp_path / "out", **AS_TRL))
    source = find_model(config.model)
    rows = find_data(config.data, source).training
    batches = Batches(rows, config.batch, layout_of(config, source.settings, 1), replica=0, seed=config.data.seed)
    dataset, partners = open_dataset(inputs["data"]), rows.parts[0].others.dataset.partners

    def parts(document):
        trained = np.flatnonzero(dataset.mask(document))
        tokens = dataset.tokens(document).tolist()
        return tokens[: trained[0]], tokens[trained[0] : trained[-1] + 1]

    documents = [
        rows.segments(number)[1][0].document for step in range(STEPS) for number in batches.row_numbers(step * GLOBAL)
    ]
    told = [
        {
            "prompt_ids": parts(document)[0],
            "completion_ids": parts(document)[1],
            "KL_completion_ids": parts(partners[document])[1],
            "label": bool(dataset.about(document)["label"]),
        }
        for document in documents
    ]

    given = {"model": inputs["model"], "folder": tmp_path / "trl", "steps": STEPS}
    theirs = steps_of_trl("KTO", told, config, **given, desirable_weight=config.kto.desirable_weight)
    for mine, step in zip(alone["trl"], theirs, strict=True):
        assert mine["loss"] == pytest.approx(step["loss"], abs=1e-4)
        assert mine["more"]["kl"] == pytest.approx(step["kl"], abs=1e-4)
        for name in ("rewards/chosen", "rewards/rejected"):
            assert mine["more"].get(name) == pytest.approx(step.get(name), abs=1e-4)
    assert max(step["more"]["kl"] for step in alone["trl"]) > 0.01
