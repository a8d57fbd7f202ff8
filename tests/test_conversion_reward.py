"""Reward models on disk: both ways bit for bit, transformers' scores, what is refused, and `temper score`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conversion_models import MODELS
from generate_world import write_base
from safetensors.torch import load_file, save_file
from training_world import mostly_full

from conversion import hf_to_mcore, mcore_to_hf
from conversion.inspect import inspect
from conversion.mcore_checkpoint import McoreCheckpoint
from conversion.plan import REWARD_HEAD, plan_for
from conversion.report import REPORT_FILE
from conversion.reward_model import as_reward_model, pad_token
from conversion.verify import verify
from toolkits.commands.score import score
from toolkits.foundation.errors import CheckpointError, DataError, UsageError, run_guarded
from toolkits.generation.answering import Generator
from toolkits.generation.decoding import Decoding
from toolkits.generation.loading import Source
from toolkits.training.batches import end_of

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["untied", "qwen3-tied", "phi3", "qwen2-moe"]
EXACT = ["tied", "qwen3", "llama3.1", "mistral", "phi-partial-rotary", "glm", "qwen3-moe-mixed", "mixtral"]
# Loading torch, transformers and megatron-core takes longer than all models together.
COMPARE = """
import json, sys
from pathlib import Path
from toolkits.training.logits import compare_logits, random_tokens

found = {}
for name in sys.argv[1:]:
    hf = Path(name, "hf")
    compared = compare_logits(hf, Path(name, "mcore"), random_tokens(hf, 60))
    found[name] = [compared.difference, compared.largest, compared.of_words]
Path("found.json").write_text(json.dumps(found))
"""


def write_reward(folder, config):
    """Let transformers write a reward model with random weights; return `folder`."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder.mkdir(parents=True)
    said = json.dumps(as_reward_model(config, folder))
    (folder / "config.json").write_text(said)
    torch.manual_seed(4)
    network = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    assert [type(network).__name__] == json.loads(said)["architectures"]
    with torch.no_grad():
        for weight in network.state_dict().values():
            noise = 0.1 * torch.randn_like(weight)
            weight.copy_(weight + noise if weight.ndim == 1 else noise)
    network.save_pretrained(folder)
    (folder / "config.json").write_text(said)
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A tiny reward model with a tokenizer, in transformers' own files."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("reward") / "model"
    write_base(folder)
    torch.manual_seed(5)
    network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=257)
    torch.nn.init.normal_(network.score.weight)
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", mostly_full(MODELS, QUICK))
def test_both_ways_are_bit_equal(tmp_path, name):
    hf = write_reward(tmp_path / "hf", MODELS[name])
    tensors = load_file(hf / "model.safetensors")
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and "lm_head.weight" not in back
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert torch.equal(McoreCheckpoint(tmp_path / "mcore").whole(REWARD_HEAD), tensors["score.weight"])
    assert verify(hf, tmp_path / "mcore") == len(tensors)


def test_transformers_and_megatron_core_give_the_same_scores(tmp_path):
    for name in EXACT:
        hf_to_mcore.convert(write_reward(tmp_path / name / "hf", MODELS[name]), tmp_path / name / "mcore")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPARE, *EXACT], cwd=tmp_path, env=env, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == set(EXACT)
    for name, (difference, largest, of_words) in found.items():
        assert difference < 1e-5 and largest > 0.1 and not of_words, (name, difference, largest)


def test_a_damaged_head_is_seen(tmp_path, reward):
    hf_to_mcore.convert(reward, tmp_path / "mcore")
    shutil.copytree(reward, tmp_path / "changed")
    tensors = load_file(reward / "model.safetensors")
    tensors["score.weight"][0, 7] += 0.5
    save_file(tensors, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"score\.weight: 1 of 48 elements differ"):
        verify(tmp_path / "changed", tmp_path / "mcore")
    for change, said in (
        (lambda: tensors.pop("score.weight"), r"missing: score\.weight"),
        (lambda: tensors.update({"score.weight": torch.zeros(2, 48)}), r"score\.weight: checkpoint \[2, 48\]"),
        (lambda: tensors.update({"lm_head.weight": torch.zeros(261, 48)}), r"unexpected: lm_head\.weight"),
    ):
        change()
        save_file(tensors, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            hf_to_mcore.convert(tmp_path / "changed", tmp_path / "never")


def test_inspect_and_the_report_know_it(tmp_path, reward):
    hf_to_mcore.convert(reward, tmp_path / "mcore")
    for folder in (reward, tmp_path / "mcore"):
        said = inspect(folder)
        assert said["reward_model"] is True and said["problems"] == []
        assert said["parameters"] == said["config_parameters"]
    report = json.loads((tmp_path / "mcore" / REPORT_FILE).read_text())
    (head,) = (entry for entry in report["tensors"] if entry["source"] == ["score.weight"])
    assert (head["target"], head["shape"]) == (REWARD_HEAD, [1, 48])


def test_the_end_of_a_row_is_where_transformers_sees_it(reward):
    """Whatever the last tokens are: the pad token may end texts too."""
    from transformers import AutoModelForSequenceClassification

    network, pad = AutoModelForSequenceClassification.from_pretrained(reward).eval(), 257
    rows = ([5, 6, pad, 7], [5, 6, 7, pad, pad], [pad, pad, pad], [9], [pad, 4])
    for ids in rows:
        with torch.no_grad():
            hidden = network.model(torch.tensor([ids])).last_hidden_state[0]
            score = network(torch.tensor([ids])).logits[0, 0]
        expected = network.score(hidden)[end_of(np.array(ids), pad), 0]
        assert score.item() == pytest.approx(expected.item(), abs=1e-6), ids
    assert end_of(np.array([5, pad]), None) == 1


@pytest.mark.parametrize(
    ("labels", "count"),
    [({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3), ({}, 2), ({"num_labels": 5}, 5), ({"id2label": None}, None)],
)
def test_other_numbers_of_labels_are_refused_by_name(labels, count):
    config = as_reward_model(MODELS["untied"], Path("nowhere"))
    plain = {name: value for name, value in config.items() if name not in ("id2label", "label2id")}
    with pytest.raises(CheckpointError, match=f"Qwen2ForSequenceClassification with {count} labels"):
        plan_for(plain | labels)
    assert plan_for(plain | {"num_labels": 1}).is_reward_model


def test_a_config_becomes_that_of_a_reward_model_once():
    config = MODELS["llama3.2"] | {"auto_map": {"AutoModel": "evil.Model"}, "problem_type": "regression"}
    made = as_reward_model(config, Path("nowhere"))
    assert made["architectures"] == ["LlamaForSequenceClassification"] and made["id2label"] == {"0": "LABEL_0"}
    assert not {"auto_map", "problem_type"} & made.keys() and made["rope_parameters"] == config["rope_parameters"]
    assert as_reward_model(made | {"pad_token_id": 9}, Path("nowhere")) == made | {"pad_token_id": 9}
    plan = plan_for(made)
    assert config["tie_word_embeddings"] and not plan.tied, "there is nothing to tie"
    assert plan.num_parameters == plan_for(config).num_parameters + config["hidden_size"]


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({"pad_token": "<p>", "eos_token": "<e>"}, {"pad_token_id": 7}, 4),
        ({"pad_token": {"content": "<p>"}}, {}, 4),
        ({"pad_token": None, "eos_token": "<e>"}, {"pad_token_id": 7}, 7),
        ({"eos_token": "<e>"}, {}, 5),
        ({"eos_token": "word"}, {"pad_token_id": None}, 1),
        ({"pad_token": "<unknown>"}, {}, None),
        ({}, {"pad_token_id": -1}, None),
    ],
)
def test_the_pad_token_is_the_one_that_rows_are_padded_with(tmp_path, files, config, expected):
    added = [{"content": "<p>", "id": 4}, {"content": "<e>", "id": 5}]
    content = {"model": {"vocab": {"word": 1}}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(files))
    assert pad_token(config, tmp_path) == expected


def test_a_reward_model_writes_nothing(reward):
    with pytest.raises(UsageError, match=r"ForSequenceClassification: a reward model.*`temper score`") as error:
        Generator(Source(reward), Decoding())
    assert error.value.exit_code == 2


ROWS = (
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a longer one"}], "id": 7},
    {"prompt": "q", "chosen": "a", "rejected": "b" * 40},
    {"instruction": "q", "output": "a", "label": False},
)


def scored(*words):
    """The command's exit code, stdout and stderr."""
    result = CliRunner().invoke(score, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_scores_are_those_of_transformers(reward, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    code, out, said = scored(reward, "--input", tmp_path / "rows.jsonl", "--device", "cpu", "--batch-size", 3)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and "1 pairs" in said and "2 scores" in said
    assert [{name: row[name] for name in before} for row, before in zip(found, ROWS, strict=True)] == list(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(reward)
    network = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    expected = []
    for answer in ("a longer one", "a", "b" * 40, "a"):
        talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected.append(network(ids).logits.item())
    scores = [found[0]["score"], found[1]["score_chosen"], found[1]["score_rejected"], found[2]["score"]]
    assert scores == pytest.approx(expected, abs=1e-5) and len(set(expected)) == 3


def test_without_a_pad_token_rows_are_scored_one_by_one(reward, tmp_path):
    shutil.copytree(reward, tmp_path / "model")
    config = json.loads((reward / "config.json").read_text())
    del config["pad_token_id"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    outputs = [scored(folder, "--input", tmp_path / "rows.jsonl")[1] for folder in (reward, tmp_path / "model")]
    found, expected = ([json.loads(line) for line in each.splitlines()] for each in outputs)
    for one, other in zip(found, expected, strict=True):
        assert (
            one == pytest.approx(other, abs=1e-5)
            if "score" not in one
            else one["score"] == pytest.approx(other["score"], abs=1e-5)
        )


def test_what_cannot_be_scored_is_said(reward, base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "no answer"}) + "\n" + json.dumps({"prompt": "q", "answer": "7"}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*no answer to score\n.*rows\.jsonl:2: .*no answer to score"):
        scored(reward, "--input", rows)
    rows.write_text(json.dumps({"prompt": "q", "completion": "x" * 400}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 4\d\d tokens, and the model reads 192"):
        scored(reward, "--input", rows)
    rows.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UsageError, match=r"Qwen2ForCausalLM.* has no score; `temper train reward`"):
        scored(base, "--input", rows)
    two = tmp_path / "two"
    shutil.copytree(reward, two)
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(UsageError, match="describes 2 labels"):
        scored(two, "--input", rows)
    (tmp_path / "out.jsonl").write_text("mine")
    assert run_guarded(lambda: scored(reward, "--input", rows, "--output", tmp_path / "out.jsonl")) == 2
    assert (tmp_path / "out.jsonl").read_text() == "mine"
