"""What an export says beside its weights: configs, tokenizers and templates as transformers reads them.

Runs with the transformers that is installed; PYTHONPATH in front of pytest can name another.
"""

import json

import numpy as np
import pytest
import torch

from conversion import hf_to_mcore, mcore_to_hf
from conversion.generation_config import stop_at
from conversion.older_spelling import add_older_spelling
from conversion.report import REPORT_FILE
from tests.conversion_models import MODELS, TIED, UNTIED, write_hf
from tests.data_world import TEMPLATES, write_tokenizer
from toolkits.foundation.errors import CheckpointError
from toolkits.training.ending import end_token

TEXTS = ["hello world", "你好，世界。", "  two  spaces\n\n", "🙂 <|im_end|> e\u0301"]
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]


def there_and_back(hf, folder):
    hf_to_mcore.convert(hf, folder / "mcore")
    mcore_to_hf.convert(folder / "mcore", folder / "back")
    return folder / "back"


def sentencepiece_model(folder):
    """Train a tiny sentencepiece model and write it as Llama 2's files have it: without a tokenizer.json."""
    import sentencepiece

    (folder / "corpus.txt").write_text("the cat sat on the mat\nhello world\n你好 世界\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "corpus.txt").unlink()
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATES["words"]}))


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates"])
@pytest.mark.parametrize("kind", ["byte-level", "prepending", "sentencepiece"])
def test_tokenizer_and_template_are_those_of_the_source(tmp_path, kind, place):  # [45]
    from transformers import AutoTokenizer

    hf = write_hf(tmp_path / "hf", TIED)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (hf / name).unlink()
    if kind == "sentencepiece":
        sentencepiece_model(hf)
    elif place == "tokenizer_config.json":
        write_tokenizer(hf, None, kind, chat_template=TEMPLATES["chatml"])
    else:
        write_tokenizer(hf, TEMPLATES["chatml"], kind)
    if place == "additional_chat_templates":
        (hf / place).mkdir()
        (hf / place / "tools.jinja").write_text("tools: {{ messages[0].content }}")
    back = there_and_back(hf, tmp_path)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (back, hf))
    assert type(ours) is type(theirs)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.eos_token == theirs.eos_token and len(ours) == len(theirs)
    render = {"tokenize": False, "chat_template": "tools"} if place.startswith("additional") else {"tokenize": False}
    assert ours.apply_chat_template(TALK, **render) == theirs.apply_chat_template(TALK, **render) != ""
    carried = {path.relative_to(hf).as_posix() for path in hf.rglob("*") if path.is_file()}
    exported = {path.relative_to(back).as_posix() for path in back.rglob("*") if path.is_file()}
    assert exported == carried | {REPORT_FILE}


# The field of transformers 4, and what it has to say.
NEWER = {
    "untied": {"rope_theta": 50000.0, "torch_dtype": "float32"},
    "llama3.2": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3": {"rope_theta": 50000.0},
    "phi3": {"rope_theta": 50000.0},
}


@pytest.mark.parametrize("name", NEWER)
def test_the_newer_spelling_of_a_config_is_exported_in_the_older_one_too(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    assert add_older_spelling(tmp_path) == ["config.json says what transformers 4 reads too"]
    assert json.loads((tmp_path / "config.json").read_text()) == MODELS[name] | NEWER[name]
    assert add_older_spelling(tmp_path) == []


@pytest.mark.parametrize("name", ["tied", "llama2", "llama3.1", "mistral", "phi-partial-rotary", "glm"])
def test_the_older_spelling_is_left_as_it_is(tmp_path, name):
    raw = json.dumps(MODELS[name], indent=7)
    (tmp_path / "config.json").write_text(raw)
    assert add_older_spelling(tmp_path) == []
    assert (tmp_path / "config.json").read_text() == raw


def test_rotary_positions_of_two_kinds_of_layers(tmp_path):
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
    add_older_spelling(tmp_path)
    older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert json.loads((tmp_path / "config.json").read_text()) == {"rope_parameters": rope} | older


def test_what_transformers_5_saves_of_a_tokenizer_is_exported_for_transformers_4(tmp_path):
    hf = write_hf(tmp_path / "hf", TIED)
    newer = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<|im_start|>"]}
    write_tokenizer(hf, **newer)
    back = there_and_back(hf, tmp_path)
    config = json.loads((back / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    notes = json.loads((back / REPORT_FILE).read_text())["notes"]
    assert notes == ["tokenizer_config.json says what transformers 4 reads too"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(back)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer("<|im_start|>")["input_ids"] == [start] and start in tokenizer.all_special_ids


def test_a_tokenizer_config_that_is_damaged_is_carried_and_said(tmp_path, capsys):
    hf = write_hf(tmp_path / "hf", TIED)
    (hf / "tokenizer_config.json").write_text('{"a": ')
    back = there_and_back(hf, tmp_path)
    assert (back / "tokenizer_config.json").read_text() == '{"a": '
    said = "tokenizer_config.json is carried as it is, but it is damaged: is not JSON: Expecting value"
    assert f"warning: {said}" in capsys.readouterr().err
    assert json.loads((back / REPORT_FILE).read_text())["notes"][0].startswith(said)


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["newer", "older"])
def test_an_export_computes_what_its_source_computes(tmp_path, config):
    from transformers import AutoModelForCausalLM

    hf = write_hf(tmp_path / "hf", {**config, "eos_token_id": 3})
    (hf / "generation_config.json").write_text('{"eos_token_id": [3, 7], "temperature": 0.7, "do_sample": true}')
    back = there_and_back(hf, tmp_path)
    add_older_spelling(hf)  # so that transformers 4 reads the source too
    ids = torch.arange(60)[None]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (back, hf))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.generation_config.eos_token_id == [3, 7] and ours.generation_config.temperature == 0.7
    assert ours.dtype == torch.float32


# Where generation ends --------------------------------------------------------------------------------------


def test_generation_ends_where_answers_were_trained_to_end(tmp_path):  # [62]
    (tmp_path / "config.json").write_text(json.dumps({**TIED, "eos_token_id": 1, "bos_token_id": 5}))
    raw = '{"eos_token_id": 1, "top_p": 0.8}'
    (tmp_path / "generation_config.json").write_text(raw)
    assert stop_at(tmp_path, 1) is None and (tmp_path / "generation_config.json").read_text() == raw
    assert stop_at(tmp_path, 2) == [1]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [2, 1], "top_p": 0.8}
    assert stop_at(tmp_path, 1) is None and stop_at(tmp_path, 2) is None
    (tmp_path / "generation_config.json").unlink()
    assert stop_at(tmp_path, 1) is None and not (tmp_path / "generation_config.json").exists()
    assert stop_at(tmp_path, 2) == [1]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 5, "eos_token_id": [2, 1]}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match=r"eos_token_id is 'x', which are no token ids"):
        stop_at(tmp_path, 2)


class Rows:
    """A dataset of given rows: tokens, and how many of the last are context again."""

    kind = "conversations"

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def tokens(self, row):
        return np.array(self._rows[row][0])

    def mask(self, row):
        tokens, behind = self._rows[row]
        return np.array([0] + [1] * (len(tokens) - 1 - behind) + [0] * behind, dtype=np.uint8)


def test_the_token_that_answers_end_with():
    whole, newline, cut = ([5, 6, 2], 0), ([5, 7, 2, 9], 1), ([5, 6, 7], 0)
    assert end_token(Rows([whole, newline])) == 2
    assert end_token(Rows([whole, newline, cut])) == 2
    assert end_token(Rows([whole, cut])) is None
    assert end_token(Rows([([5], 0)])) is None and end_token(Rows([])) is None


def test_a_run_carries_the_end_token_of_its_data_into_its_exports(tmp_path):  # [62]
    from tests.training_world import write_dataset, write_model
    from toolkits.training.config import TrainConfig
    from toolkits.training.run_folder import claimed
    from toolkits.training.sources import find_model

    model = write_model(tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": 7}')
    data = write_dataset(tmp_path / "data", model, rows=20)
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|im_end|>")
    values = {"checkpoint": str(model), "data": data, "output": tmp_path, "seq_len": 129, "train_iters": 2}
    config = TrainConfig.from_values(
        {**values, "global_batch_size": 2, "micro_batch_size": 1, "lr": 1e-3, "min_lr": 0.0}
    )
    with claimed(tmp_path / "run", config, find_model(config.model)) as remarks:
        said = json.loads((tmp_path / "run" / "hf" / "generation_config.json").read_text())
    assert said == {"eos_token_id": [end, 7]}
    assert remarks == [f"answers in the data end with token {end}: generation_config.json gets it beside [7]"]
