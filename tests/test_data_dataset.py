"""The bytes on disk: pinned, readable by megatron-core, checked when opened; and the doubled layout."""

import json
import struct

import numpy as np
import pytest
from data_world import doubled, write_index

from data_preprocessing.dataset import document_prefix, open_dataset
from data_preprocessing.writer import DatasetWriter
from toolkits.foundation.errors import DataError

ROWS = [([5, 6, 7], [0, 1, 1]), ([8], [1]), ([9, 300_000], [0, 1])]


def write(folder, rows=ROWS, name="tiny"):
    prefix = document_prefix(folder / name)
    with DatasetWriter(folder, prefix.name) as writer:
        for tokens, mask in rows:
            writer.add(np.array(tokens), np.array(mask))
        writer.finish({"tokenizer": {"name": "t", "folder": "/t", "fingerprint": "f" * 64}})
    return prefix


def file(prefix, suffix):
    return prefix.with_name(prefix.name + suffix)


def rows_of(dataset):
    return [(dataset.tokens(row).tolist(), dataset.mask(row).tolist()) for row in range(len(dataset))]


def test_the_bytes_are_these(tmp_path):
    prefix = write(tmp_path)
    assert prefix.name == "tiny_text_document"
    assert file(prefix, ".bin").read_bytes() == bytes.fromhex("05000000 06000000 07000000 08000000 09000000 e0930400")
    assert file(prefix, ".mask").read_bytes() == bytes([0, 1, 1, 1, 0, 1])
    assert file(prefix, ".idx").read_bytes() == bytes.fromhex(
        "4d4d494449445800 00 0100000000000000 04 0300000000000000 0400000000000000"
        "03000000 01000000 02000000"
        "0000000000000000 0c00000000000000 1000000000000000"
        "0000000000000000 0100000000000000 0200000000000000 0300000000000000"
    )


def test_a_dataset_reads_back_under_each_of_its_names(tmp_path):
    prefix = write(tmp_path)
    for name in (tmp_path / "tiny", prefix, str(prefix) + ".bin", str(prefix) + ".idx", str(prefix) + ".json"):
        dataset = open_dataset(name)
        assert rows_of(dataset) == ROWS
        assert dataset.path == prefix
    assert dataset.lengths.tolist() == [3, 1, 2]
    assert (dataset.max_token_id, dataset.num_trained_tokens, dataset.built_seq_len) == (300_000, 4, None)
    assert dataset.tokenizer_fingerprint == "f" * 64
    assert dataset.tokens(0).dtype == np.int32
    assert dataset.mask(0).dtype == np.uint8
    with pytest.raises(IndexError, match="row 3 of 3"):
        dataset.tokens(3)


def test_the_manifest_counts_and_checks(tmp_path):
    prefix = write(tmp_path)
    dataset = open_dataset(prefix)
    counts = {"rows": 3, "tokens": 6, "trained_tokens": 4, "weighted_tokens": 0, "max_token_id": 300_000, "longest": 3}
    assert dataset.manifest["counts"] == counts
    assert dataset.manifest["format_version"] == 1
    assert list(dataset.manifest["files"]) == [".bin", ".mask", ".idx"]
    dataset.verify()
    file(prefix, ".mask").write_bytes(bytes([1, 1, 1, 1, 0, 1]))
    with pytest.raises(DataError, match=r"\.mask: sha256 is .*, the manifest says"):
        open_dataset(prefix).verify()


def test_megatron_core_reads_it(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = indexed.IndexedDataset(str(write(tmp_path)))
    assert [dataset[row].tolist() for row in range(len(dataset))] == [tokens for tokens, _ in ROWS]
    assert dataset.sequence_lengths.tolist() == [3, 1, 2]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset[0].dtype == np.int32


def test_an_empty_dataset_opens(tmp_path):
    assert len(open_dataset(write(tmp_path, rows=[]))) == 0


@pytest.mark.parametrize(
    ("suffix", "content", "said"),
    [
        (".bin", None, r"missing .*tiny_text_document\.bin; there is no unfinished build"),
        (".idx", None, r"missing .*tiny_text_document\.idx"),
        (".mask", None, r"\.mask is missing"),
        (".json", None, r"\.json is missing, .*\.mask is there"),
        (".bin", lambda old: old[:-4], r"\.bin: tiny_text_document.idx ends at byte 24, the file has 20: truncated"),
        (".bin", lambda old: old + b"\0\0\0\0", "ends at byte 24, the file has 28"),
        (".mask", lambda old: old[:-1], r"\.mask: 5 bytes, the manifest says 6: truncated, or of another build"),
        (".idx", lambda old: old[:20], r"\.idx: truncated, 20 bytes of a header of 34"),
        (".idx", lambda old: old[:-1], r"\.idx: 3 rows take 102 bytes, the file has 101"),
        (".idx", lambda old: b"X" + old[1:], r"\.idx: not a Megatron index: it begins with b'XMIDIDX"),
        (".idx", lambda old: old[:9] + b"\x02" + old[10:], "index version 2 with token type 4 is not known"),
        (".idx", lambda old: old[:17] + b"\x63" + old[18:], "index version 1 with token type 99 is not known"),
        (".idx", lambda old: old[:17] + b"\x07" + old[18:], "tokens of type float32, expected int32"),
        (".json", lambda old: b"{}", "not a dataset manifest of ours"),
        (".json", lambda old: old[:-9], "not a dataset manifest of ours"),
        (".json", lambda old: old.replace(b'"format_version": 1', b'"format_version": 9'), "format 9, .* up to 2"),
        (".json", lambda old: old.replace(b'"rows": 3', b'"rows": 4'), "the manifest counts 4 rows, the index 3"),
    ],
)  # fmt: skip
def test_damage_is_seen_at_the_door(tmp_path, suffix, content, said):
    path = file(write(tmp_path), suffix)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()))
    with pytest.raises(DataError, match=said):
        open_dataset(tmp_path / "tiny")


def test_files_of_two_builds_are_not_taken_for_one(tmp_path):
    one, other = write(tmp_path, name="one"), write(tmp_path, ROWS[:2], name="other")
    file(other, ".bin").replace(file(one, ".bin"))
    with pytest.raises(DataError, match="truncated, or of another build"):
        open_dataset(one)


def test_an_unfinished_build_is_mentioned(tmp_path):
    prefix = document_prefix(tmp_path / "tiny")
    (tmp_path / ".tmp-tiny_text_document").mkdir()
    with pytest.raises(DataError, match=r"missing .*\.bin and .*\.idx; .*\.tmp-tiny_text_document is there: a build"):
        open_dataset(prefix)


def test_offsets_beyond_four_gigabytes_are_right(tmp_path):
    rows, length = 3, 1 << 29  # tokens: row 2 begins at byte 4 Gi; the files are sparse
    prefix = document_prefix(tmp_path / "big")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, rows, rows + 1)
    pointers = np.arange(rows, dtype="<i8") * 4 * length
    index = header + np.full(rows, length, "<i4").tobytes() + pointers.tobytes()
    file(prefix, ".idx").write_bytes(index + np.arange(rows + 1, dtype="<i8").tobytes())
    for suffix, size in ((".bin", 4 * rows * length), (".mask", rows * length)):
        with open(file(prefix, suffix), "wb") as sparse:
            sparse.truncate(size)
            sparse.seek(size - size // (rows * length))
            sparse.write(b"\x01")
    sizes = {suffix: {"bytes": file(prefix, suffix).stat().st_size} for suffix in (".bin", ".mask", ".idx")}
    manifest = {"format": "temper-dataset", "format_version": 1, "counts": {"rows": rows, "tokens": rows * length}}
    file(prefix, ".json").write_text(json.dumps({**manifest, "files": sizes}))
    dataset = open_dataset(prefix)
    assert dataset.tokens(2)[-2:].tolist() == [0, 1]
    assert dataset.mask(2)[-2:].tolist() == [0, 1]


# -------------------------------------------------------------------------------------- the doubled layout


def test_the_doubled_example_is_one_row(tmp_path):
    tokens = [3, 4, 107, 108, 109, 2, 5, 130, 131, -3, *[1] * 6]
    labels = [*[-100] * 5, 5, 130, 131, 2, *[-100] * 7]
    dataset = open_dataset(write_index(document_prefix(tmp_path / "old"), [tokens + labels]))
    assert rows_of(dataset) == [([3, 4, 107, 108, 109, 2, 5, 130, 131, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1])]
    assert dataset.lengths.tolist() == [10]
    assert dataset.built_seq_len == 16
    assert (dataset.manifest, dataset.tokenizer_fingerprint) == (None, None)
    assert (dataset.max_token_id, dataset.num_trained_tokens) == (131, 4)


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
@pytest.mark.parametrize("at_once", [1, 640, 1 << 22])
def test_packed_documents_come_apart_exactly(tmp_path, monkeypatch, dtype, at_once):
    from data_preprocessing import doubled as module

    rng = np.random.default_rng(0)
    packed = []
    for _ in range(40):
        document, space = [], 32
        while space >= 2 and rng.random() < 0.9:
            length = int(rng.integers(1, space + 1))
            mask = np.append(0, rng.integers(0, 2, length - 1))
            document.append((rng.integers(0, 200, length).tolist(), mask.tolist()))
            space -= length
        packed.append(document or [([99], [0])])  # a last token of 99 is stored as -100
    prefix = write_index(document_prefix(tmp_path / "old"), doubled(packed, 32), dtype)
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", at_once)
    assert rows_of(open_dataset(prefix)) == [row for document in packed for row in document]


def test_a_sub_sequence_that_was_cut_off_keeps_its_last_target(tmp_path):
    # seq_len 4: the fifth token, 14, was cut off, its label stayed. Beside it a document that ends early.
    cut = [10, 11, 12, 13, -100, 12, 13, 14]
    ended = [20, -22, 1, 1, 21, -100, -100, -100]
    dataset = open_dataset(write_index(document_prefix(tmp_path / "old"), [cut, ended]))
    assert rows_of(dataset) == [([10, 11, 12, 13, 14], [0, 0, 1, 1, 1]), ([20, 21], [0, 1])]


def test_labels_that_do_not_follow_the_tokens_are_refused(tmp_path):
    wrong = [10, 11, 12, -14, -100, 99, 13, -100]
    dataset = open_dataset(write_index(document_prefix(tmp_path / "old"), [wrong]))
    with pytest.raises(DataError, match="document 0: the label at place 1 is 99, the next token 12: not the doubled"):
        len(dataset)


def test_negative_numbers_in_documents_of_any_length_are_refused(tmp_path):
    uneven = write_index(document_prefix(tmp_path / "uneven"), [[1, -2, 3, 4], [4, -5]])
    with pytest.raises(DataError, match=r"negative numbers as only the doubled .* would all have the same even length"):
        open_dataset(uneven)


def test_the_trained_targets_of_each_row_are_counted(tmp_path, monkeypatch):
    from data_preprocessing import dataset as module

    rng = np.random.default_rng(1)
    rows = [(rng.integers(0, 200, n).tolist(), rng.integers(0, 2, n).tolist()) for n in rng.integers(1, 12, 60)]
    expected = [sum(mask[1:]) for _, mask in rows]
    for at_once in (1, 10, 1 << 26):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
        assert open_dataset(write(tmp_path, rows)).trained_targets().tolist() == expected
    packed = [[(tokens, [0, *mask[1:]])] for tokens, mask in rows]
    old = open_dataset(write_index(document_prefix(tmp_path / "old"), doubled(packed, 12)))
    assert old.trained_targets().tolist() == expected and old.num_trained_tokens == sum(expected)
    assert old.taken_for == "the doubled [tokens | labels] layout of 12 tokens a row" and old.kind == "conversations"


# --------------------------------------------------------------------------------------------- plain tokens


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_plain_tokens_are_documents_of_which_every_token_is_trained(tmp_path, dtype):
    dataset = open_dataset(write_index(document_prefix(tmp_path / "plain"), [[1, 2, 3, 9], [4, 9], [9]], dtype))
    assert rows_of(dataset) == [([1, 2, 3, 9], [1, 1, 1, 1]), ([4, 9], [1, 1]), ([9], [1])]
    assert (dataset.kind, dataset.max_token_id, dataset.num_trained_tokens) == ("text", 9, 7)
    assert dataset.trained_targets().tolist() == [3, 1, 0]
    assert dataset.taken_for == f"plain tokens of type {np.dtype(dtype)}, 3 documents, each ends with token 9"
    assert (dataset.manifest, dataset.tokenizer_fingerprint, dataset.built_seq_len) == (None, None, None)


def test_a_document_may_be_several_sequences(tmp_path):
    builder = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDatasetBuilder
    torch = pytest.importorskip("torch")
    documents = [[[1, 2], [3]], [[4, 5, 6]], [], [[7], [8], [9]]]  # as megatron-core's own writer has them
    prefix = document_prefix(tmp_path / "sentences")
    writer = builder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        for sentence in document:
            writer.add_item(torch.tensor(sentence))
        writer.end_document()
    writer.finalize(f"{prefix}.idx")
    dataset = open_dataset(prefix)
    assert [tokens for tokens, _ in rows_of(dataset)] == [[1, 2, 3], [4, 5, 6], [], [7, 8, 9]]
    assert dataset.taken_for.endswith("4 documents, without a common end token")


def test_what_could_be_either_kind_is_not_guessed(tmp_path):
    both = write_index(document_prefix(tmp_path / "both"), [[10, 11, 12, 11, 12, 13], [20, 21, 22, 21, 22, 23]])
    said = r"reads as \[tokens \| labels\] of 3 tokens as well as plain tokens; build it from its source"
    with pytest.raises(DataError, match=said):
        open_dataset(both)
    one_differs = write_index(document_prefix(tmp_path / "one"), [[10, 11, 12, 11, 12, 13], [20, 21, 22, 21, 29, 23]])
    assert open_dataset(one_differs).kind == "text"


def test_what_is_no_token_is_found_with_its_document(tmp_path, monkeypatch, capsys):
    from data_preprocessing import unlabelled as module

    documents = [[1, 2, 3]] * 30_000 + [[4, -7]]  # behind what is looked at when it is opened
    prefix = write_index(document_prefix(tmp_path / "plain"), documents)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 1000)
    with pytest.raises(DataError, match=r"document 30000 holds -7, which is no token"):
        _ = open_dataset(prefix).max_token_id
    fine = open_dataset(write_index(document_prefix(tmp_path / "fine"), [*documents[:-1], [4, 7]]))
    assert fine.max_token_id == 7 and f"reading the tokens of {fine.path}: 90,002 tokens" in capsys.readouterr().err
    floats = tmp_path / "floats_text_document.idx"
    floats.write_bytes(
        file(prefix, ".idx").read_bytes().replace(b"\x01" + bytes(7) + b"\x04", b"\x01" + bytes(7) + b"\x07")
    )
    file(prefix, ".bin").rename(tmp_path / "floats_text_document.bin")
    with pytest.raises(DataError, match="numbers of type float32: these are not tokens"):
        open_dataset(tmp_path / "floats")


def test_an_index_whose_sequences_do_not_follow_each_other_is_refused(tmp_path):
    prefix = write_index(document_prefix(tmp_path / "plain"), [[1, 2], [3, 4], [5, 6]])
    index = bytearray(file(prefix, ".idx").read_bytes())
    pointers = 34 + 4 * 3
    index[pointers + 8 : pointers + 16] = (0).to_bytes(8, "little")
    file(prefix, ".idx").write_bytes(index)
    with pytest.raises(DataError, match=r"sequences do not lie one behind the other in the \.bin"):
        open_dataset(prefix)
    index[pointers + 8 : pointers + 16] = (8).to_bytes(8, "little")
    index[-8:] = (2).to_bytes(8, "little")
    file(prefix, ".idx").write_bytes(index)
    with pytest.raises(DataError, match="its documents are not stretches of its 3 sequences"):
        open_dataset(prefix)
