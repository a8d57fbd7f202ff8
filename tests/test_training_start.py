"""What is wrong with the data is said at the start of a run, before a process group or a model is made."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from data_world import doubled, write_index
from training_world import write_dataset, write_model

from data_preprocessing.build import build
from data_preprocessing.convert import write_ours
from data_preprocessing.dataset import document_prefix, open_dataset
from toolkits.foundation.errors import DataError, UsageError
from toolkits.training import run as module
from toolkits.training.config import TrainConfig
from toolkits.training.objectives import OBJECTIVES


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    model = write_model(folder / "model")
    return {"folder": folder, "model": model, "talks": write_dataset(folder / "talks", model, rows=40)} | {
        name: write_texts(folder / name, model, rows=rows) for name, rows in (("texts", 30), ("few", 3), ("one", 1))
    }


def write_texts(prefix, tokenizer, *, rows, seed=0):
    """Build a dataset of plain texts of very different lengths."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abc é"), rng.integers(1, 90))) + f"{number}" for number in range(rows)]
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    build(source, prefix, tokenizer=tokenizer)
    return prefix


class Begun(Exception):
    """Nothing was wrong: the run went on to make process groups."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank, whose run ends where the first process group or model would be made."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    def begun(*_, **__):
        raise Begun

    for name in ("process_groups", "build_model"):
        monkeypatch.setattr(module, name, begun)


def start(inputs, tmp_path, objective="pretrain", **changes):
    """Start a run up to its first process group."""
    values = {
        "checkpoint": str(inputs["model"]), "data": str(inputs["texts"]), "output": tmp_path / "out", "seq_len": 16,
        "train_iters": 3, "global_batch_size": 4, "rows": OBJECTIVES[objective].rows, "name": objective,
    }  # fmt: skip
    module.run(TrainConfig.from_values(values | changes), OBJECTIVES[objective])


def other_tokenizer(inputs, folder):
    """Write texts that were built with a tokenizer of which one token is spelled otherwise."""
    shutil.copytree(inputs["model"], folder / "other")
    tokenizer = json.loads((folder / "other" / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|another|>"
    (folder / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    source = folder / "t.jsonl"
    source.write_text('{"text": "hello"}\n' * 9)
    build(source, folder / "foreign", tokenizer=folder / "other")
    return folder / "foreign"


def test_what_fits_begins(inputs, tmp_path):
    with pytest.raises(Begun):
        start(inputs, tmp_path)
    with pytest.raises(Begun):
        start(inputs, tmp_path / "sft", "sft", data=str(inputs["talks"]), seq_len=128)


def test_another_tokenizer_is_found_in_every_part_of_a_blend(inputs, tmp_path):
    foreign = other_tokenizer(inputs, tmp_path)
    said = r"foreign_text_document was built with another tokenizer \(\w{12}\) than .*model has \(\w{12}\)"
    for blend in ({"data": f"0.9 {inputs['texts']} 0.1 {foreign}"}, {"valid_data": str(foreign)}):
        with pytest.raises(DataError, match=said):
            start(inputs, tmp_path, **blend)


def test_a_token_without_an_embedding_row_is_found_with_its_row(inputs, tmp_path):
    documents = [[5, 6, 7, 2]] * 40
    documents[17] = [5, 300, 2]
    plain = write_index(document_prefix(tmp_path / "plain"), documents)
    said = r"plain_text_document: row 17 has token id 300, the embedding has 261 rows"
    with pytest.raises(DataError, match=said):
        start(inputs, tmp_path, data=str(plain))
    with pytest.raises(DataError, match=said):
        start(inputs, tmp_path, valid_data=f"1 {inputs['few']} 1 {plain}")
    # A file that was mended is read anew: nothing remembers the scan.
    documents[17] = [5, 60, 2]
    write_index(plain, documents)
    with pytest.raises(Begun):
        start(inputs, tmp_path, data=str(plain))


def test_narrow_tokens_cannot_overflow_a_wide_vocabulary_and_are_not_read(inputs, tmp_path, monkeypatch):
    from data_preprocessing.unlabelled import PlainDataset
    from toolkits.training import sources

    monkeypatch.setattr(PlainDataset, "max_token_id", property(lambda self: pytest.fail("it was read")))
    dataset = sources.open_dataset(write_index(document_prefix(tmp_path / "narrow"), [[1, 2, 3]] * 9, "<u2"))

    class Wide:
        settings = {"vocab_size": 65_536}  # noqa: RUF012

    sources._require_tokens(dataset, Wide())


def test_data_of_another_seq_len_is_read_and_said(inputs, tmp_path):
    from toolkits.training.settings import DataSettings, ModelSettings
    from toolkits.training.sources import find_data, find_model

    conversations = [[([40, 41, 42, 43], [0, 0, 1, 1])]] * 12
    old = write_index(document_prefix(tmp_path / "old"), doubled(conversations, 8))
    model = find_model(ModelSettings(checkpoint=str(inputs["model"])))
    found = find_data(DataSettings(data=str(old), seq_len=16), model)
    assert found.training.parts[0].num_tokens == 4 * 11
    assert [remark.removeprefix(f"{old}: ") for remark in found.remarks[:2]] == [
        "no manifest; taken for the doubled [tokens | labels] layout of 8 tokens a row",
        "it was packed to 8 tokens a row; rows of 16 are made anew",
    ]
    write_ours(open_dataset(old), document_prefix(tmp_path / "new"))  # what `temper data convert` does
    converted = find_data(DataSettings(data=str(tmp_path / "new"), seq_len=16), model)
    assert converted.training.parts[0].num_tokens == 4 * 11
    assert [converted.training.segments(row)[1] for row in range(len(converted.training))] == [
        found.training.segments(row)[1] for row in range(len(found.training))
    ]
    assert "taken for" not in str(converted.remarks)


def test_too_little_data_is_said_with_numbers(inputs, tmp_path):
    said = r"few_text_document: \d+ rows of 16 tokens are fewer than one global batch of 64; use a smaller GLOBAL"
    with pytest.raises(DataError, match=said):
        start(inputs, tmp_path, data=str(inputs["few"]), global_batch_size=64)
    with pytest.raises(DataError, match=r"one_text_document: 1 that fits is too few to hold one out for validation"):
        start(inputs, tmp_path, data=f"1 {inputs['texts']} 1 {inputs['one']}")


@pytest.mark.parametrize(
    ("objective", "data", "said"),
    [
        ("sft", "texts", r"texts_text_document holds plain text, and fine-tuning reads conversations; .*SFT=false"),
        ("sft", "plain", r"holds plain text \(no manifest; it was taken for plain tokens of type uint16, 9 documents"),
        ("sft", "1 talks 1 texts", r"texts_text_document holds plain text"),
    ],
)
def test_fine_tuning_on_text_is_refused(inputs, tmp_path, objective, data, said):
    plain = write_index(document_prefix(tmp_path / "plain"), [[1, 2, 3]] * 9, "<u2")
    paths = {name: str(path) for name, path in inputs.items()} | {"plain": str(plain)}
    with pytest.raises(DataError, match=said):
        start(inputs, tmp_path, objective, data=" ".join(paths.get(word, word) for word in data.split()), seq_len=128)


def test_pre_training_on_conversations_says_that_the_prompts_are_trained(inputs, tmp_path):
    from toolkits.training.settings import DataSettings, ModelSettings
    from toolkits.training.sources import find_data, find_model

    settings = DataSettings(data=str(inputs["talks"]), rows="documents", seq_len=32)
    found = find_data(settings, find_model(ModelSettings(checkpoint=str(inputs["model"]))))
    assert (
        f"{inputs['talks']}_text_document: it holds conversations: every token of them is trained" in found.remarks[0]
    )
    assert found.training.parts[0].every_token and "1 of 40 documents are held out" in found.remarks[1]


def test_a_blend_names_each_set_once(inputs, tmp_path):
    twice = f"1 {inputs['texts']} 2 {inputs['texts']}_text_document.bin"
    with pytest.raises(
        UsageError, match=r"a blend names each dataset once: .*texts_text_document\.bin stands there again"
    ):
        start(inputs, tmp_path, data=twice)


def test_what_a_validation_shares_with_the_training_is_held_out_and_the_rest_read_whole(inputs):
    from toolkits.training.settings import DataSettings, ModelSettings
    from toolkits.training.sources import find_data, find_model

    settings = DataSettings(
        data=f"3 {inputs['texts']} 1 {inputs['talks']}",
        valid_data=f"1 {inputs['talks']} 1 {inputs['few']}",
        rows="documents",
        seq_len=32,
    )
    found = find_data(settings, find_model(ModelSettings(checkpoint=str(inputs["model"]))))
    assert [len(part.documents) for part in found.training.parts] == [30, 39]
    assert [len(part.documents) for part in found.validation.parts] == [1, 3]
    assert found.training.mix.counts == (3, 1)
    shared = set(found.training.parts[1].documents) & set(found.validation.parts[0].documents)
    assert not shared and found.training.parts[1].dataset is found.validation.parts[0].dataset


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "1 texts 2 few"}, r"(?s)another run:\n  data: 1 x (\w{16}), 1 x (\w{16}) -> 1 x \1, 2 x \2\n"),
        ({"data": "texts"}, r"(?s)  data: 1 x \w{16}, 1 x \w{16} -> \w{16}\n"),
        ({"seq_len": 8}, r"(?s)  seq_len: 16 -> 8\n"),
        (
            {"objective": "sft", "name": "pretrain", "data": "talks", "seq_len": 128},
            r"(?s)  rows: documents -> conversations\n",
        ),
    ],
)
def test_other_data_in_a_used_folder_is_refused_with_old_and_new(inputs, tmp_path, changes, said):
    def begin(data="1 texts 1 few", **settings):
        start(inputs, tmp_path, data=" ".join(str(inputs.get(word, word)) for word in data.split()), **settings)

    with pytest.raises(Begun):
        begin()
    (tmp_path / "out" / "checkpoint" / "pretrain" / "iter_0000001").mkdir()
    with pytest.raises(UsageError, match=said):
        begin(**changes)


def test_a_dataset_without_a_manifest_is_told_from_another_with_the_same_index(tmp_path):
    from data_preprocessing.dataset import dataset_fingerprint

    one, other = (
        write_index(document_prefix(tmp_path / name), [[first, 5, 2]] * 9) for name, first in (("one", 3), ("other", 4))
    )
    assert one.with_name(f"{one.name}.idx").read_bytes() == other.with_name(f"{other.name}.idx").read_bytes()
    assert dataset_fingerprint(one) != dataset_fingerprint(other)


def test_the_disk_that_adapters_need_is_that_of_adapters(inputs, tmp_path, monkeypatch):
    from toolkits.training.layout import layout_of
    from toolkits.training.lora import Lora
    from toolkits.training.sources import find_data, find_model

    asked = []
    monkeypatch.setattr(module, "require_space", lambda _, needed: asked.append(needed))

    def needed(**changes):
        values = {"checkpoint": str(inputs["model"]), "data": str(inputs["talks"]), "output": tmp_path / "out"}
        values |= {"seq_len": 128, "train_iters": 3, "global_batch_size": 1, "precision": "fp32"}
        config = TrainConfig.from_values(values | changes)
        source = find_model(config.model)
        layout = layout_of(config, source.settings, 1)
        plan = module.RunPlan(config, source, find_data(config.data, source), layout, Lora.of(config, source))
        module._require_space(plan)
        return asked.pop(), source.plan.num_parameters

    full, parameters = needed()
    assert full == parameters * (4 + 12)
    adapters, _ = needed(lora_rank=1)
    exported, _ = needed(lora_rank=1, export_hf=True)
    assert adapters < full / 10 and exported == adapters + 4 * parameters
