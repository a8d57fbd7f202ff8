"""The cards in docs/cards: one a family, what they say, what the READMEs say of them, and that they are really made."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from conversion import mcore_to_hf
from conversion.families import FAMILIES
from conversion.settings import mcore_settings, untrainable_reasons
from toolkits.cards.card import LOGIT_TOLERANCE, Card, ModelFigures, Training, markdown, read_card, write_card
from toolkits.cards.lesson import LOSS_TOLERANCE, STEPS
from toolkits.cards.models import MODELS, TITLES, models_of
from toolkits.cards.support import LANGUAGES, MARKS, read_cards, support_table, with_table
from toolkits.cli import temper
from toolkits.foundation.errors import CheckpointError, UsageError

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "docs" / "cards"
NAMES = [family.name for family in FAMILIES]


def make(*words):
    return CliRunner().invoke(temper, ["verify", "card", *map(str, words)])


def test_every_family_has_a_title_and_tiny_models():
    assert set(TITLES) == set(NAMES)
    assert sum(len(models_of(name)) for name in NAMES) == len(MODELS)
    assert all(models_of(name) for name in NAMES)


def test_there_is_a_card_for_every_family_and_no_other():
    assert {path.name for path in CARDS.iterdir()} == {name + end for name in NAMES for end in (".json", ".md")}


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_the_issue_asks_of_a_family(name):
    card, models = read_card(CARDS / f"{name}.json"), models_of(name)
    assert (card.family, card.title) == (name, TITLES[name]) and card.problems == []
    assert [model.name for model in card.models] == list(models), "other models than those of today: make it anew"
    assert set(card.versions) == {"temper", "torch", "megatron-core", "transformers", "python"}
    assert card.ran_on == ("2 CPU ranks under gloo" if card.trained else "a CPU")
    for model in card.models:
        reasons = untrainable_reasons(models[model.name])
        assert model.tensors > 20 and model.parameters > 50_000
        assert model.refused == reasons
        if reasons:
            assert model.logits == {} and model.training is None
            continue
        experts = "num_moe_experts" in mcore_settings(models[model.name])
        assert list(model.logits) == ["TP1", "TP2", "PP2", *["EP2"] * experts]
        assert 0 < max(model.logits.values()) <= LOGIT_TOLERANCE < model.largest_logit
        assert model.training.steps == STEPS and 0 < model.training.difference <= LOSS_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_what_the_json_says_and_names_no_machine(name):
    page = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert page == markdown(read_card(CARDS / f"{name}.json"))
    said = page + (CARDS / f"{name}.json").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/\w+/|\bhost|@", said)


@pytest.mark.parametrize("readme", LANGUAGES)
def test_the_readmes_tables_are_made_of_the_cards(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    shown = text.split(MARKS[0])[1].split(MARKS[1])[0].strip()
    assert shown == support_table(read_cards(CARDS), LANGUAGES[readme]), "run python -m toolkits.cards"
    assert with_table(text, read_cards(CARDS), LANGUAGES[readme]) == text
    links = re.findall(r"\]\((docs/cards/\w+\.md)\)", shown)
    assert len(links) == len(FAMILIES) and all((ROOT / link).is_file() for link in links)


def test_a_table_needs_its_place_and_every_card(tmp_path):
    with pytest.raises(UsageError, match="no <!-- cards --> and <!-- /cards --> to put the table between"):
        with_table("# A README\n<!-- cards -->\n", [], LANGUAGES["README.md"])
    with pytest.raises(UsageError, match="has no card of qwen2, qwen2_moe"):
        read_cards(tmp_path)


GOOD = ModelFigures(
    "one",
    parameters=5,
    tensors=2,
    different=[],
    logits={"TP1": 1e-6, "TP2": 2e-6},
    largest_logit=3.0,
    training=Training("DP2", STEPS, first_loss=6.0, last_loss=3.0, difference=1e-6),
)
OF_CARD = {
    "versions": {"temper": "0"},
    "seconds": 1.0,
    "ran_on": "2 CPU ranks under gloo",
    "gpu": "not run on a GPU yet",
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"different": ["lm_head.weight"]}, "one: lm_head.weight came back with other bits"),
        ({"logits": {"TP1": 1e-6, "TP2": 2e-4}}, "one: logits at TP2 differ from transformers' by 2.0e-04"),
        ({"logits": {"PP2": float("nan")}}, "one: logits at PP2 differ from transformers' by nan"),
        ({"training": {"difference": 2e-4}}, "one: losses differ from plain transformers' by 2.0e-04"),
        ({"training": {"difference": float("nan")}}, "one: losses differ from plain transformers' by nan"),
        ({"training": {"last_loss": 5.9}}, "one: the loss went from 6.000 to 5.900: nothing was learned"),
    ],
)
def test_what_is_not_as_it_should_be_is_a_problem(changes, problem):
    changes = {
        name: dataclasses.replace(GOOD.training, **value) if name == "training" else value
        for name, value in changes.items()
    }
    card = Card("f", "F", ["FForCausalLM"], models=[GOOD, dataclasses.replace(GOOD, **changes)], **OF_CARD)
    assert card.problems == ([problem] if problem else [])


def test_a_card_is_written_whole_and_read_again(tmp_path):
    card = Card("f", "F", ["FForCausalLM"], models=[GOOD, dataclasses.replace(GOOD, refused=["a"])], **OF_CARD)
    write_card(card, tmp_path / "new")
    assert read_card(tmp_path / "new" / "f.json") == card
    assert "| one | 5 | 2 tensors equal | 1.0e-06 | 2.0e-06 |" in (tmp_path / "new" / "f.md").read_text()
    with pytest.raises(UsageError, match="use --overwrite"):
        write_card(card, tmp_path / "new")
    write_card(dataclasses.replace(card, title="G"), tmp_path / "new", overwrite=True)
    assert read_card(tmp_path / "new" / "f.json").title == "G"


# Made by the command -----------------------------------------------------------------------------------


def same_figures(made, kept):
    """Compare two cards in what does not depend on the machine and its packages."""

    def facts(card):
        return [
            (m.name, m.parameters, m.tensors, m.different, list(m.logits), m.refused, m.training and m.training.steps)
            for m in card.models
        ]

    assert facts(made) == facts(kept)
    assert made.problems == []


def test_a_card_of_a_family_that_is_only_converted(tmp_path):
    result = make("gemma3", "--out", tmp_path)
    assert result.exception is None and result.output.startswith(f"gemma3: {tmp_path}/gemma3.md, ")
    same_figures(read_card(tmp_path / "gemma3.json"), read_card(CARDS / "gemma3.json"))
    assert "| gemma3 | 139,456 | 54 tensors equal | refused |" in (tmp_path / "gemma3.md").read_text()
    before = (tmp_path / "gemma3.json").read_bytes()
    refused = make("gemma3", "--out", tmp_path)
    assert isinstance(refused.exception, UsageError) and "gemma3.json exists already" in str(refused.exception)
    assert (tmp_path / "gemma3.json").read_bytes() == before


def test_a_conversion_that_loses_a_bit_gets_no_card(tmp_path, monkeypatch):
    convert = mcore_to_hf.convert

    def lossy(src, dst):
        convert(src, dst)
        tensors = load_file(dst / "model.safetensors")
        tensors["model.norm.weight"][5] *= -1
        save_file(tensors, dst / "model.safetensors")

    monkeypatch.setattr(mcore_to_hf, "convert", lossy)
    result = make("glm4", "--out", tmp_path)
    assert isinstance(result.exception, CheckpointError)
    assert "family glm4: glm4: model.norm.weight came back with other bits" in str(result.exception)
    assert list(tmp_path.glob("*.*")) == []


def test_an_unknown_family_is_named_with_all_that_there_are(tmp_path):
    result = make("gpt", "--out", tmp_path)
    assert isinstance(result.exception, UsageError)
    assert str(result.exception) == f"no family gpt; there is {', '.join(NAMES)}, or all"


def make_apart(name, folder):
    """Make a card in a process of its own: starting ranks changes the environment of the process that does."""
    command = [sys.executable, "-m", "toolkits.cli", "verify", "card", name, "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    same_figures(read_card(folder / f"{name}.json"), read_card(CARDS / f"{name}.json"))
    return done


@pytest.mark.full  # eight seconds of an idle machine, most of them imports of the three processes
def test_a_card_of_a_family_that_trains(tmp_path):
    done = make_apart("mistral", tmp_path)
    assert done.stderr == "", "what the checks say is not shown"
    made = read_card(tmp_path / "mistral.json")
    (model,) = made.trained
    assert made.layouts == ["TP1", "TP2", "PP2"] and model.training.last_loss < 4 < model.training.first_loss


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gemma3", "mistral")])
def test_the_other_cards_can_be_made_again(tmp_path, name):
    make_apart(name, tmp_path)
