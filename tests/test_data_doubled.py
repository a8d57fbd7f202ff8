"""The doubled layout there and back: written from its description alone, read token for token, and what refuses."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from data_world import doubled, talk, write_index, write_rows, write_tokenizer

from data_preprocessing.build import build
from data_preprocessing.dataset import document_prefix, open_dataset
from data_preprocessing.doubled_writer import write_doubled
from data_preprocessing.tokenizer import tokenizer_fingerprint
from toolkits.commands.data import data
from toolkits.foundation.errors import DataError, UsageError


def run(*words):
    return CliRunner().invoke(data, ["convert", *map(str, words)])


def rows_of(dataset):
    return [(dataset.tokens(row).tolist(), dataset.mask(row).tolist()) for row in range(len(dataset))]


def conversations(count, longest, seed=0):
    """Return (tokens, mask) of random lengths; the first token is never trained: nothing predicts it."""
    rng, rows = np.random.default_rng(seed), []
    for length in rng.integers(1, longest + 1, count).tolist():
        mask = np.append(0, np.repeat(rng.integers(0, 2, length), 3)[: length - 1])
        rows.append((rng.integers(0, 200, length).tolist(), mask.tolist()))
    return rows


def in_documents(rows, seq_len):
    """Share documents out in order, as the simplest builder does."""
    documents, space = [], 0
    for row in rows:
        if len(row[0]) > space:
            documents.append([])
            space = seq_len
        documents[-1].append(row)
        space -= len(row[0])
    return documents


def old_set(folder, rows, seq_len, name="old"):
    return write_index(document_prefix(folder / name), doubled(in_documents(rows, seq_len), seq_len))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("seq_len", [2, 7, 16, 64, 301])
def test_there_and_back_is_equal_token_for_token(tmp_path, seq_len):
    rows = conversations(300, seq_len, seed=seq_len)
    old = old_set(tmp_path, rows, seq_len)
    assert rows_of(open_dataset(old)) == rows
    assert run(old, tmp_path / "ours").exit_code == 0
    ours = open_dataset(tmp_path / "ours")
    assert rows_of(ours) == rows and ours.built_seq_len is None
    ours.verify()
    result = run(tmp_path / "ours", tmp_path / "again", "--to", "doubled", seq_len, "--pad-id", 1)
    assert result.exit_code == 0, result.exception
    again = open_dataset(tmp_path / "again")
    assert again.built_seq_len == seq_len
    assert sorted(rows_of(again)) == sorted(rows)
    assert run(tmp_path / "again", tmp_path / "ours2").exit_code == 0
    assert rows_of(open_dataset(tmp_path / "ours2")) == rows_of(again)
    # Best fit needs no more documents than sharing them out in order.
    documents = (tmp_path / "again_text_document.bin").stat().st_size // (8 * seq_len)
    assert documents <= len(in_documents(rows, seq_len))


def test_the_bytes_are_those_of_the_description(tmp_path):
    # The example of the layout, and a second document: 300 does not fit beside the others.
    rows = [([3, 4, 107, 108, 109, 2], [0] * 6), ([5, 130, 131, 2], [0, 1, 1, 1]), ([300] * 9, [0, 1] * 4 + [0])]
    assert run(old_set(tmp_path, rows, 16), tmp_path / "ours").exit_code == 0
    write_doubled(open_dataset(tmp_path / "ours"), document_prefix(tmp_path / "new"), seq_len=16, pad=1)
    numbers = np.fromfile(tmp_path / "new_text_document.bin", "<i4").reshape(2, 2, 16)
    assert numbers[0, 0].tolist() == [3, 4, 107, 108, 109, -3, *[300] * 8, -301, 1]
    assert numbers[0, 1].tolist() == [-100] * 6 + [300, -100] * 4 + [-100] * 2
    assert numbers[1, 0].tolist() == [5, 130, 131, -3] + [1] * 12
    assert numbers[1, 1].tolist() == [130, 131, 2] + [-100] * 13
    simplest = write_index(tmp_path / "simplest", doubled([[rows[0], rows[2]], [rows[1]]], 16))
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"new_text_document{suffix}").read_bytes()
        assert ours == simplest.with_name(simplest.name + suffix).read_bytes()


def test_megatron_core_reads_what_is_written(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    rows = conversations(50, 20)
    write_doubled(open_dataset(old_set(tmp_path, rows, 20)), document_prefix(tmp_path / "new"), seq_len=32, pad=1)
    dataset = indexed.IndexedDataset(str(document_prefix(tmp_path / "new")))
    assert set(dataset.sequence_lengths.tolist()) == {64}
    ends = sum(int((dataset[row][:32] < 0).sum()) for row in range(len(dataset)))
    assert ends == len(rows)


def test_what_was_cut_off_keeps_its_last_label_at_the_same_length(tmp_path):
    cut = [10, 11, 12, 13, -100, 12, 13, 14]  # the token behind 13 was cut off, its label stayed
    early = [20, -22, 1, 1, 21, 22, -100, -100]
    old = write_index(document_prefix(tmp_path / "old"), [cut, early])
    expected = [([10, 11, 12, 13, 14], [0, 0, 1, 1, 1]), ([20, 21, 22], [0, 1, 1])]
    assert rows_of(open_dataset(old)) == expected
    assert run(old, tmp_path / "ours").exit_code == 0
    result = run(tmp_path / "ours", tmp_path / "new", "--to", "doubled", 4, "--pad-id", 1)
    assert result.exit_code == 0, result.exception
    assert rows_of(open_dataset(tmp_path / "new")) == expected
    assert np.fromfile(tmp_path / "new_text_document.bin", "<i4")[:8].tolist() == [10, 11, 12, -14, -100, 12, 13, 14]


def test_blocks_change_nothing(tmp_path, monkeypatch):
    from data_preprocessing import convert, doubled_writer

    old = open_dataset(old_set(tmp_path, conversations(200, 24), 24))
    said = []
    for number, at_once in enumerate((1, 200, 1 << 22)):
        monkeypatch.setattr(doubled_writer, "NUMBERS_AT_ONCE", at_once)
        monkeypatch.setattr(convert, "TOKENS_AT_ONCE", at_once)
        write_doubled(old, document_prefix(tmp_path / f"d{number}"), seq_len=40, pad=0)
        assert run(old.path, tmp_path / f"o{number}").exit_code == 0
        names = [f"d{number}_text_document.bin", f"d{number}_text_document.idx"]
        names += [f"o{number}_text_document{suffix}" for suffix in (".bin", ".idx", ".mask", ".json")]
        said.append([(tmp_path / name).read_bytes() for name in names])
    assert said[0] == said[1] == said[2]


# ---------------------------------------------------------------------------------- what is written beside


def test_the_manifest_names_the_tokenizer_or_says_that_nobody_knows(tmp_path, tokenizer):
    old = old_set(tmp_path, conversations(30, 10), 16)
    said = run(old, tmp_path / "unknown").output
    assert f"read      {old}: the doubled [tokens | labels] layout of 16 tokens a row, 30 rows\n" in said
    assert "names no tokenizer: training cannot compare it" in said
    unknown = open_dataset(tmp_path / "unknown")
    assert unknown.tokenizer_fingerprint is None and unknown.manifest["tokenizer"] is None
    said = run(old, tmp_path / "known", "--tokenizer", tokenizer)
    assert said.exit_code == 0 and "names no tokenizer" not in said.output
    known = open_dataset(tmp_path / "known")
    assert known.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert known.manifest["input"]["name"] == "old_text_document" and known.manifest["input"]["rows"] == 30
    old = old_set(tmp_path, [([5, 9999], [0, 1])], 16, name="large")
    result = run(old, tmp_path / "wrong", "--tokenizer", tokenizer)
    assert isinstance(result.exception, DataError) and "has token 9,999" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir() if "wrong" in path.name and not path.name.startswith(".")] == []


def test_training_takes_the_converted_set_for_the_same_rows(tmp_path):
    from toolkits.training.rows import make_rows, select
    from toolkits.training.settings import DataSettings

    old = open_dataset(old_set(tmp_path, conversations(80, 16), 16))
    assert run(old.path, tmp_path / "ours").exit_code == 0
    settings = DataSettings(data="x", seq_len=16, too_long="truncate")
    found = []
    for dataset in (old, open_dataset(tmp_path / "ours")):
        selection, _ = select(dataset, settings)
        rows = make_rows(selection, settings)
        found.append([rows.segments(row) for row in range(len(rows))])
    assert found[0] == found[1] and len(found[0]) > 10


def test_plain_tokens_get_a_manifest_too(tmp_path):
    plain = write_index(document_prefix(tmp_path / "plain"), [[1, 2, 3, 9], [], [4, 9]], "<u2")
    result = run(plain, tmp_path / "ours")
    assert result.exit_code == 0 and "dropped   1 rows without a token" in result.output
    ours = open_dataset(tmp_path / "ours")
    assert rows_of(ours) == [([1, 2, 3, 9], [1] * 4), ([4, 9], [1, 1])]
    assert ours.kind == "text" and ours.manifest["dropped"] == {"empty_row": 1}


def test_padding_is_the_tokenizers_pad_token(tmp_path, tokenizer):
    build(write_rows(tmp_path / "rows.jsonl", [talk("q", "a")] * 3), tmp_path / "ours", tokenizer=tokenizer)
    ours = open_dataset(tmp_path / "ours")
    result = run(ours.path, tmp_path / "new", "--to", "doubled", 100)
    assert result.exit_code == 0, result.exception
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    pad = next(token["id"] for token in vocabulary if token["content"] == "<|endoftext|>")
    length = 3 * int(ours.lengths[0])
    assert np.fromfile(tmp_path / "new_text_document.bin", "<i4")[length:100].tolist() == [pad] * (100 - length)
    assert f"3 conversations in 1 documents of 100 tokens ({length / 100:.2%} full), padded with {pad}" in result.output
    assert rows_of(open_dataset(tmp_path / "new")) == rows_of(ours)


# ---------------------------------------------------------------------------------------- too long, refused


def test_conversations_that_are_too_long_are_cut_behind_a_whole_answer_or_refused(tmp_path):
    rows = [([1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 1, 0, 0, 1, 1, 0]), ([1, 2, 3], [0, 1, 0]), ([9] * 8, [0, 0, 0, 1] * 2)]
    rows.append(([5] * 8, [0, 1, 0, 0, 1, 1, 0, 0]))  # its second answer ends with the sixth token
    ours = tmp_path / "ours"
    assert run(old_set(tmp_path, rows, 8), ours).exit_code == 0
    words = [ours, tmp_path / "new", "--to", "doubled", 6, "--pad-id", 0]
    result = run(*words)
    assert isinstance(result.exception, DataError)
    assert "3 of 4 conversations (75.0%) are longer than SEQ_LEN 6, the longest 8 tokens (row 0)" in str(
        result.exception
    )
    result = run(*words, "--too-long", "truncate")
    assert result.exit_code == 0
    assert "3 conversations over 6 tokens were cut behind their last whole answer that fits" in result.output
    cut = [([1, 2, 3], [0, 1, 1]), rows[1], ([9] * 4, [0, 0, 0, 1]), ([5] * 6, [0, 1, 0, 0, 1, 1])]
    assert sorted(rows_of(open_dataset(tmp_path / "new"))) == sorted(cut)
    result = run(*words, "--too-long", "drop", "--overwrite")
    assert result.exit_code == 0 and "3 conversations were left out: over 6 tokens" in result.output
    assert rows_of(open_dataset(tmp_path / "new")) == [rows[1]]
    result = run(ours, tmp_path / "none", "--to", "doubled", 2, "--pad-id", 0, "--too-long", "drop")
    assert isinstance(result.exception, DataError) and "no conversation fits 2 tokens" in str(result.exception)


def test_what_convert_refuses(tmp_path, tokenizer):
    old = old_set(tmp_path, conversations(10, 8), 8)
    assert run(old, tmp_path / "ours").exit_code == 0

    def refused(kind, said, *words):
        result = run(*words)
        assert isinstance(result.exception, kind) and said in str(result.exception), result.output

    refused(UsageError, "has a manifest already: there is nothing to convert", tmp_path / "ours", tmp_path / "x")
    refused(UsageError, "output exists already", old, tmp_path / "ours")
    refused(UsageError, "--pad-id: only with --to doubled SEQ_LEN", old, tmp_path / "x", "--pad-id", 0)
    refused(UsageError, "OLD and NEW are both", old, tmp_path / "old", "--overwrite")
    doubled_again = (tmp_path / "ours", tmp_path / "new", "--to", "doubled", 8)
    refused(UsageError, "does not say which tokenizer built it; give --tokenizer DIR", *doubled_again)
    assert run(*doubled_again, "--pad-id", 1).exit_code == 0
    refused(UsageError, "output exists already", *doubled_again, "--pad-id", 1)
    onto = (old, tmp_path / "ours", "--to", "doubled", 8, "--pad-id", 1, "--overwrite")
    refused(UsageError, "a dataset with a manifest stands there", *onto)
    plain = write_index(document_prefix(tmp_path / "plain"), [[1, 2, 3, 9], [4, 9]])
    refused(DataError, "plain text needs it not", plain, tmp_path / "y", "--to", "doubled", 8, "--pad-id", 1)
    pair = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": [{"role": "user", "content": "q"}], **pair}]
    build(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "pairs", tokenizer=tokenizer)
    refused(DataError, "it has no place for pairs", tmp_path / "pairs", tmp_path / "y", "--to", "doubled", 99)
    assert run(old, tmp_path / "z", "--to", "halved", 8).exit_code == 2


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    from data_preprocessing import doubled_writer

    old = open_dataset(old_set(tmp_path, conversations(10, 8), 8))
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(doubled_writer, "_put", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_doubled(old, document_prefix(tmp_path / "new"), seq_len=8, pad=0)
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".lock-"))
    assert left == before
