"""Plain text: the tokens that transformers makes, the end token behind, and a file that holds nothing else."""

import json

import pytest
from click.testing import CliRunner
from data_world import NO_SHARED, SHARED, fuzzed_rows, talk, write_rows, write_tokenizer

from data_preprocessing import reading
from data_preprocessing.build import BuildOptions, build
from data_preprocessing.dataset import FILE_SUFFIXES, open_dataset
from data_preprocessing.text import TextEncoder
from data_preprocessing.tokenizer import load_tokenizer
from toolkits.commands.data import data
from toolkits.foundation.errors import DataError, UsageError

END = "<|endoftext|>"


def texts(count):
    """Rows of Unicode at random, some of which look like control tokens."""
    found = [" ".join(turn["content"] for turn in row["messages"]) for row in fuzzed_rows(count)]
    for number in range(0, count, 5):
        plain = found[number].replace("\U000f0000", "")  # which a row with control text may not hold
        found[number] = f"{plain}<|im_end|>{plain}"
    return [{"text": text} for text in found]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_document_is_its_tokens_and_an_end_all_trained(tmp_path, tokenizer):
    rows = texts(40)
    manifest = build(write_rows(tmp_path / "rows", rows), tmp_path / "out", tokenizer=tokenizer)
    dataset = open_dataset(tmp_path / "out")
    dataset.verify()
    end = load_tokenizer(tokenizer).encoder.token_to_id(END)
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer)
    for number, row in enumerate(rows):
        expected = reference(row["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert dataset.tokens(number).tolist() == [*expected, end]
        assert dataset.mask(number).all()
    assert dataset.kind == manifest["kind"] == "text" and "chat_template" not in manifest
    assert manifest["end_token"]["text"] == END and manifest["end_token"]["id"] == end
    assert manifest["input"]["layouts"] == {"text": 40}
    assert manifest["control_text"] == {"texts": 8, "rows": 8}
    assert manifest["counts"]["trained_tokens"] == manifest["counts"]["tokens"]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"eos_token": "<|im_end|>"}, ("<|endoftext|>", "separates documents with, eos_token is <|im_end|>")),
        ({"eos_token": "</s>"}, ("</s>", "the tokenizer's eos_token")),
        ({"eos_token": None}, ("<|endoftext|>", "what this vocabulary separates documents with")),
    ],
)
def test_the_end_of_a_document_is_not_the_end_of_a_turn(tmp_path, named, expected):
    encoder = TextEncoder(write_tokenizer(tmp_path, **named))
    assert encoder.end_token == expected[0] and encoder.end_reason.endswith(expected[1])


def test_an_end_token_can_be_named(tmp_path, tokenizer):
    assert TextEncoder(tokenizer, end_token="</s>").end_token == "</s>"
    with pytest.raises(UsageError, match=r"--end-token <nope>: .* has no such token"):
        TextEncoder(tokenizer, end_token="<nope>")
    source = write_rows(tmp_path / "rows", [talk("q", "a")])
    with pytest.raises(UsageError, match="--end-token is for plain text"):
        build(source, tmp_path / "out", tokenizer=tokenizer, options=BuildOptions(end_token="</s>"))


def test_a_tokenizer_without_any_end_token_is_asked_for_one(tmp_path):
    folder = write_tokenizer(tmp_path / "bare", eos_token=None, pad_token=None)
    content = json.loads((folder / "tokenizer.json").read_text())
    renamed = {"<|endoftext|>": "<|a|>", "</s>": "<|b|>"}
    for token in content["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    source = write_rows(tmp_path / "rows", [{"text": "t"}])
    with pytest.raises(DataError, match="names no token that ends a document; say which with --end-token"):
        build(source, tmp_path / "out", tokenizer=folder)
    build(source, tmp_path / "out", tokenizer=folder, options=BuildOptions(end_token="<|a|>"))


def test_text_needs_no_chat_template(tmp_path):
    folder = write_tokenizer(tmp_path / "t", template="{{ raise_exception('never rendered') }}")
    build(write_rows(tmp_path / "rows", [{"text": "t"}]), tmp_path / "out", tokenizer=folder)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "t"}, talk("q", "a")], r"rows:2: a conversation in a file of plain texts; a dataset holds one"),
        ([talk("q", "a"), {"text": "t"}], r"rows:2: plain text in a file of conversations; a dataset holds one"),
        ([{"text": "t"}, {"text": "  "}], r"rows:2: text is empty: nothing to train on"),
    ],
)
def test_text_and_conversations_do_not_mix(tmp_path, tokenizer, rows, said):
    source = write_rows(tmp_path / "rows", rows)
    with pytest.raises(DataError, match=said):
        build(source, tmp_path / "out", tokenizer=tokenizer)
    skip = BuildOptions(on_bad_row="skip", max_bad=0.5)
    manifest = build(source, tmp_path / "out", tokenizer=tokenizer, options=skip)
    assert manifest["counts"]["rows"] == 1 and sum(manifest["dropped"].values()) == 1


def test_the_result_does_not_depend_on_chunks(tmp_path, tokenizer, monkeypatch):
    source = write_rows(tmp_path / "rows", texts(30))
    built = []
    for chunk_rows, batch_bytes in ((1, 10**6), (1024, 50), (1024, 10**6)):
        monkeypatch.setattr(reading, "BATCH_BYTES", batch_bytes)
        options = BuildOptions(chunk_rows=chunk_rows)
        build(source, tmp_path / "out", tokenizer=tokenizer, overwrite=True, options=options)
        built.append([(tmp_path / f"out_text_document{suffix}").read_bytes() for suffix in FILE_SUFFIXES])
    assert built[0] == built[1] == built[2]


def test_the_command_says_which_token_ends_a_text(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows", [{"text": "hello"}])
    words = ["build", str(source), str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    said = CliRunner().invoke(data, words).output
    assert "JSONL, 1 rows, text 1\n" in said
    assert "end       <|endoftext|> (" in said and "eos_token is <|im_end|>" in said
    assert "(100.0%)" in said
    said = CliRunner().invoke(data, ["show", str(tmp_path / "out"), "0"]).output
    assert "⟦hello<|endoftext|>⟧" in said


@pytest.mark.skipif(not SHARED.exists(), reason=NO_SHARED)
def test_the_real_sample_builds_as_transformers_reads_it(tmp_path):
    source = SHARED / "samples" / "c4_demo.jsonl"
    manifest = build(source, tmp_path / "out", tokenizer=SHARED / "qwen2_tokenizer")
    assert (manifest["kind"], manifest["counts"]["rows"], manifest["end_token"]["id"]) == ("text", 300, 151643)
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(SHARED / "qwen2_tokenizer")
    dataset = open_dataset(tmp_path / "out")
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines()):
        expected = reference(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        assert dataset.tokens(number).tolist() == [*expected, 151643]
