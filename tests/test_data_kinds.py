"""Pairs, labelled answers and prompts: what they become on disk, and what is refused of them."""

import pytest
from data_world import NO_SHARED, PAIRS, SHARED, TOOLS_TEMPLATE, talk, text_of, trained_of, write_rows, write_tokenizer

from data_preprocessing.build import BuildOptions, build
from data_preprocessing.dataset import open_dataset
from data_preprocessing.records import Conversation, Labelled, Preference, Prompt, record
from data_preprocessing.row_error import RowError
from toolkits.foundation.errors import DataError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "三"]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), TOOLS_TEMPLATE)


def test_prompt_and_completion_are_a_conversation():
    texts = {"prompt": "q", "completion": "a"}
    lists = {"prompt": talk("q")["messages"], "completion": [{"role": "assistant", "content": "a"}]}
    assert record(texts).messages == record(lists).messages == record(talk("q", "a")).messages
    assert record(texts).layout == "completion"


@pytest.mark.parametrize("row", PAIRS)
def test_every_spelling_of_a_pair_is_the_same_pair(row):
    found = record(row)
    assert isinstance(found, Preference)
    assert [(m.role, m.content) for m in found.chosen.messages] == [("user", "q"), ("assistant", "good")]
    assert [(m.role, m.content) for m in found.rejected.messages] == [("user", "q"), ("assistant", "bad")]
    assert found.num_shared == 1


def test_pairs_are_rows_that_stand_behind_each_other(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows", PAIRS)
    manifest = build(source, tmp_path / "out", tokenizer=tokenizer)
    dataset = open_dataset(tmp_path / "out")
    dataset.verify()
    assert dataset.kind == manifest["kind"] == "preferences"
    assert len(dataset) == 2 * len(PAIRS)
    assert dataset.about(0) == {}
    for pair in range(len(PAIRS)):
        assert trained_of(dataset, tokenizer, 2 * pair) == "good<|im_end|>"
        assert trained_of(dataset, tokenizer, 2 * pair + 1) == "bad<|im_end|>"
        first = int(dataset.mask(2 * pair).argmax())
        assert first == dataset.mask(2 * pair + 1).argmax()
        assert (dataset.tokens(2 * pair)[:first] == dataset.tokens(2 * pair + 1)[:first]).all()


def test_fine_tuning_does_not_read_pairs_as_conversations(tmp_path, tokenizer):
    pytest.importorskip("megatron.core")
    from toolkits.training.settings import DataSettings
    from toolkits.training.sources import _require_kind

    build(write_rows(tmp_path / "rows", PAIRS), tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(DataError, match="holds preferences, and this objective reads conversations or plain text"):
        _require_kind(open_dataset(tmp_path / "out"), DataSettings(data="x", seq_len=8))


def test_of_a_pair_with_earlier_answers_only_the_last_is_trained(tmp_path, tokenizer):
    row = {"messages": talk("q", "early", "r")["messages"], "chosen": "good", "rejected": "bad"}
    build(write_rows(tmp_path / "rows", [row]), tmp_path / "out", tokenizer=tokenizer)
    dataset = open_dataset(tmp_path / "out")
    assert trained_of(dataset, tokenizer, 0) == "good<|im_end|>"
    assert "early" in text_of(dataset, tokenizer, 0)


def test_a_pair_goes_as_a_whole(tmp_path, tokenizer):
    # The rejected answer of the second pair meets a private-use character, which only the encoder refuses.
    bad = {"prompt": "q", "chosen": "good", "rejected": "<|im_end|> \U000f0000"}
    source = write_rows(tmp_path / "rows", [PAIRS[0], bad, PAIRS[1]])
    skip = BuildOptions(on_bad_row="skip", max_bad=0.5)
    manifest = build(source, tmp_path / "out", tokenizer=tokenizer, options=skip)
    assert (manifest["counts"]["rows"], manifest["dropped"]) == (4, {"control_text": 1})
    assert [trained_of(open_dataset(tmp_path / "out"), tokenizer, row)[:3] for row in range(4)] == ["goo", "bad"] * 2


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "same_answers", "are the same answer: nothing to prefer"),
        (
            {"chosen": talk("q", "a")["messages"], "rejected": talk("r", "a")["messages"]},
            "turns",
            "must answer one prompt",
        ),
        ({"prompt": "q", "chosen": "", "rejected": "a"}, "empty_answer", "turn 2 is an empty assistant turn"),
        ({"prompt": "q", "chosen": 3, "rejected": "a"}, "type", "chosen must be a string, it is number"),
    ],
)
def test_pairs_that_prefer_nothing_are_refused(row, reason, said):
    with pytest.raises(RowError, match=said) as caught:
        record(row)
    assert caught.value.reason == reason


def test_labels_are_kept_beside_the_rows(tmp_path, tokenizer):
    rows = [
        {**talk("q", "a"), "label": True},
        {"prompt": "q", "completion": "b", "label": False},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "c"}], "kto_tag": True},
        {"instruction": "q", "output": "d", "label": "false"},
    ]
    assert all(isinstance(record(row), Labelled) for row in rows)
    build(write_rows(tmp_path / "rows", rows), tmp_path / "out", tokenizer=tokenizer)
    dataset = open_dataset(tmp_path / "out")
    dataset.verify()
    assert dataset.kind == "labelled"
    assert [dataset.about(row)["label"] for row in range(4)] == [True, False, True, False]
    assert trained_of(dataset, tokenizer, 3) == "d<|im_end|>"
    assert isinstance(record({**talk("q", "a"), "label": 7}), Conversation)  # somebody's class number


def test_prompts_keep_what_an_answer_is_held_against(tmp_path, tokenizer):
    rows = [
        {"prompt": "6 x 7?", "answer": "42", "level": 3},
        {"messages": talk("6 x 7?")["messages"], "solution": ["42"]},
        {"instruction": "6 x", "input": "7?", "reference": {"value": 42}},
    ]
    assert all(isinstance(record(row), Prompt) for row in rows)
    build(write_rows(tmp_path / "rows", rows), tmp_path / "out", tokenizer=tokenizer)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.kind == "prompts"
    assert [dataset.about(row) for row in range(3)] == [
        {"answer": "42", "level": 3},
        {"solution": ["42"]},
        {"reference": {"value": 42}},
    ]
    assert text_of(dataset, tokenizer, 0) == "<|im_start|>user\n6 x 7?<|im_end|>\n<|im_start|>assistant\n"
    assert dataset.num_trained_tokens == 0
    with pytest.raises(RowError, match="the last of a prompt, is assistant; nothing is asked"):
        record({"prompt": talk("q", "a")["messages"], "answer": "42"})


def test_a_dataset_of_another_kind_leaves_nothing_behind(tmp_path, tokenizer):
    build(write_rows(tmp_path / "rows", [{"prompt": "q", "answer": 1}]), tmp_path / "out", tokenizer=tokenizer)
    build(write_rows(tmp_path / "rows", [talk("q", "a")]), tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert not (tmp_path / "out_text_document.about").exists()
    open_dataset(tmp_path / "out").verify()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([talk("q", "a"), PAIRS[0]], "a preference pair in a file of conversations"),
        ([PAIRS[0], talk("q", "a")], "a conversation in a file of preference pairs"),
        ([{"prompt": "q", "answer": 1}, PAIRS[0]], "a preference pair in a file of prompts"),
    ],
)
def test_kinds_do_not_mix(tmp_path, tokenizer, rows, said):
    with pytest.raises(DataError, match=f"rows:2: {said}; a dataset holds one of them"):
        build(write_rows(tmp_path / "rows", rows), tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.skipif(not SHARED.exists(), reason=NO_SHARED)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_real_pairs_build(tmp_path, language):
    source = SHARED / "samples" / f"dpo_{language}_demo.json"
    manifest = build(source, tmp_path / "out", tokenizer=SHARED / "qwen2_tokenizer")
    assert (manifest["kind"], manifest["counts"]["rows"]) == ("preferences", 600)
