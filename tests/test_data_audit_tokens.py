"""`temper data check`: lengths, what becomes of rows at a SEQ_LEN, and control tokens."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from audit_world import checker, clean_pairs, clean_rows, lines_of, only, prose
from data_world import TEMPLATES, doubled, talk, write_index, write_rows, write_tokenizer

from data_preprocessing.audit.block import Block, Entry, Places, Setting
from data_preprocessing.audit.lengths import Lengths
from data_preprocessing.audit.run import audit
from data_preprocessing.audit.tokens import SpecialTokens
from data_preprocessing.build import build
from data_preprocessing.tokenizer import load_tokenizer

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def found(tmp_path, tokenizer):
    """What checks rows and returns the report; see `checker`."""
    return checker(tmp_path, tokenizer)


# ---------------------------------------------------------------------------------------- lengths (55, 56, 77)


def test_too_long_rows_say_how_many_and_where_the_longest_is(found):
    rows = clean_rows(40)
    rows[20] = talk("short", prose(1, 400))
    rows[30] = talk("short", "first answer", "short", prose(2, 500))
    longest = found(rows).facts["lengths"]["longest"]
    finding = only(found(rows, seq_lens=(1000,)), "too_long")
    assert finding.count == 2 and lines_of(finding) == [21, 31] and finding.is_harmful
    assert f"2 rows (5.0%) > 1,000 tokens, longest {longest:,} at " in finding.message
    assert "rows.jsonl:31; training cuts 1 of them" in finding.message and "leaves out 1" in finding.message
    assert found(rows, seq_lens=(longest,)).findings == ()
    # Several lengths are a choice: what counts is the longest.
    assert found(rows, seq_lens=(1000, longest)).findings == ()


def test_what_becomes_of_rows_is_what_training_makes_of_them(found, tmp_path, tokenizer):
    from data_preprocessing.dataset import open_dataset
    from data_preprocessing.fitting import fit
    from data_preprocessing.packing import pack

    draw = random.Random(0)
    rows = [talk(*(prose(10 * n + m, draw.randint(1, 40)) for m in range(2 * draw.randint(1, 4)))) for n in range(60)]
    build(write_rows(tmp_path / "r.jsonl", rows), tmp_path / "set", tokenizer=tokenizer)
    dataset = open_dataset(tmp_path / "set")
    for facts in found(rows, seq_lens=(200, 350, 700)).facts["seq_lens"]:
        seq_len = facts["seq_len"]
        fitted = fit(dataset, seq_len, "truncate")
        kept = fitted.lengths[(fitted.lengths > 0) & (fitted.targets > 0)]
        masked = sum(not dataset.mask(row)[1:seq_len].any() for row in range(len(dataset)))
        packed = len(pack(kept, seq_len)[1]) - 1
        assert (facts["cut"], facts["left_out"]) == (fitted.num_cut, len(rows) - len(kept))
        assert (facts["rows"], facts["rows_unpacked"], facts["all_masked"]) == (packed, len(kept), masked)
        assert facts["fill"] == pytest.approx(kept.sum() / packed / seq_len)
        assert facts["too_long"] == (dataset.lengths > seq_len).sum()


def test_a_pair_of_which_one_side_is_too_long_is_left_out(found):
    rows = clean_pairs(9)
    rows[4]["rejected"] = prose(1, 500)
    report = found(rows, seq_lens=(1500,))
    assert only(report, "too_long").count == 1 and "1 answer (5.6%) > 1,500 tokens" in report.findings[0].message
    facts = report.facts["seq_lens"][0]
    assert (facts["too_long"], facts["left_out"], facts["rows_unpacked"]) == (1, 2, 16)


def blocks_at_random(draw, alphabet, count=12):
    """Blocks of samples in every shape of mask, the first and the last token trained too."""
    for _ in range(count):
        lengths = draw.integers(1, 9, draw.integers(1, 9))
        total = int(lengths.sum())
        entries = [Entry(number, "", "", str(number), ("x",)) for number in range(len(lengths))]
        yield Block(entries, draw.choice(alphabet, total), draw.integers(0, 2, total).astype(np.uint8), lengths)


def samples_of(block):
    ends = np.cumsum(block.lengths)
    return [
        (block.tokens[e - n : e].tolist(), block.mask[e - n : e].tolist())
        for n, e in zip(block.lengths, ends, strict=True)
    ]


def test_what_is_remembered_of_masks_is_all_of_them(tokenizer):
    lengths = Lengths(Setting("conversations", load_tokenizer(tokenizer), Places([Path("x")]), "x"))
    masks = []
    for block in blocks_at_random(np.random.default_rng(0), np.arange(5, dtype=np.int32), 40):
        lengths.add(block)
        masks += [mask for _, mask in samples_of(block)]
    measured = lengths.measured
    assert [measured.mask(row).tolist() for row in range(len(masks))] == masks
    assert measured.trained_targets().tolist() == [sum(mask[1:]) for mask in masks]
    first = [next((at for at in range(1, len(mask)) if mask[at]), len(mask)) for mask in masks]
    assert measured.first_trained.tolist() == first


def test_prompts_as_long_as_the_row_are_all_masked(found):
    rows = clean_rows(5)
    rows[3] = talk(prose(1, 300), "short")
    codes = {finding.code: finding for finding in found(rows, seq_lens=(600,)).findings}
    assert set(codes) == {"all_masked", "too_long"}
    assert codes["all_masked"].count == 1 and lines_of(codes["all_masked"]) == [4]


def test_fewer_rows_than_a_global_batch(found):
    rows = clean_rows(20)
    report = found(rows, seq_lens=(1024,), global_batch_size=64)
    finding, facts = only(report, "few_rows"), report.facts["seq_lens"][0]
    assert facts["rows"] == finding.count < 20 and facts["steps_an_epoch"] == 0
    assert f"{facts['rows']} rows of 1,024 tokens, and a global batch takes 64" in finding.message
    enough = found(rows, seq_lens=(1024,), global_batch_size=2)
    assert enough.findings == () and enough.facts["seq_lens"][0]["steps_an_epoch"] == facts["rows"] // 2
    assert only(found(rows, global_batch_size=21), "few_rows").count == 20


def test_a_validation_set_without_rows(found, tmp_path, tokenizer):
    path, valid = write_rows(tmp_path / "rows.jsonl", clean_rows()), tmp_path / "none.jsonl"
    valid.write_text("")
    report = audit([str(path)], tokenizer=tokenizer, valid=[str(valid)])
    assert only(report, "valid_empty").is_harmful


def test_the_histogram_holds_every_row_once(found):
    rows = [*clean_rows(50), talk("x", prose(5, 900))]
    about = found(rows).facts["lengths"]
    bars = about["histogram"]
    assert sum(bar["rows"] for bar in bars) == 51 and len(bars) <= 17
    assert bars[0]["from"] == 0 and bars[-1]["below"] > about["longest"]
    assert all(one["below"] == other["from"] for one, other in pairwise(bars))


# ---------------------------------------------------------------------------------------- special tokens (60, 62)


def test_a_template_that_writes_bos_twice(found, tmp_path):
    folder = write_tokenizer(tmp_path / "twice", "{{ bos_token }}{{ bos_token }}" + TEMPLATES["chatml"])
    finding = only(found(clean_rows(4), tokenizer=folder), "wrong_bos")
    assert finding.count == 4 and lines_of(finding) == [1, 2, 3] and "exactly one <bos> in front" in finding.message
    once = write_tokenizer(tmp_path / "once", "{{ bos_token }}" + TEMPLATES["chatml"], add_bos_token=True)
    assert found(clean_rows(4), tokenizer=once).findings == ()


def test_a_bos_that_the_tokenizer_writes_and_the_template_does_not(found, tmp_path):
    folder = write_tokenizer(tmp_path / "none", TEMPLATES["chatml"], add_bos_token=True)
    finding = only(found(clean_rows(4), tokenizer=folder), "missing_bos")
    assert finding.count == 4 and finding.is_harmful


def test_an_end_token_twice(found, tmp_path):
    template = TEMPLATES["chatml"].replace("+ '<|im_end|>' }}{% endgen", "+ '<|im_end|><|im_end|>' }}{% endgen")
    folder = write_tokenizer(tmp_path / "twice", template)
    assert only(found(clean_rows(4), tokenizer=folder), "double_end").count == 4


def test_documents_have_no_bos(found, tmp_path):
    folder = write_tokenizer(tmp_path / "bos", TEMPLATES["chatml"], add_bos_token=True)
    assert found([{"text": prose(number)} for number in range(5)], tokenizer=folder).findings == ()


def test_endings_are_those_that_a_loop_finds(tokenizer):
    loaded = load_tokenizer(tokenizer)
    control = set(loaded.control_ids)
    check = SpecialTokens(Setting("conversations", loaded, Places(dataset=Path("x")), "x"))
    wanted = {"missing_end": 0, "untrained_end": 0, "double_end": 0}
    for block in blocks_at_random(np.random.default_rng(1), np.array([300, 301, *sorted(control)[1:3]], np.int32), 60):
        check.add(block)
        for ids, mask in samples_of(block):
            codes = set()
            for at in range(len(ids)):
                if not mask[at] or mask[at + 1 : at + 2] == [1]:
                    continue
                behind, before = (ids[at + 1 : at + 2] or [None])[0], ids[at - 1] if at else None
                if ids[at] in control:
                    codes |= {"double_end"} if ids[at] in (behind, before) else set()
                else:
                    codes.add("untrained_end" if behind in control else "missing_end")
            for code in codes:
                wanted[code] += 1
    found = {finding.code: finding.count for finding in check.finish()}
    assert min(wanted.values()) > 20 and {code: found[code] for code in wanted} == wanted


@pytest.mark.parametrize(
    ("mask", "code"),
    [([0, 0, 1, 1, 0], "untrained_end"), ([0, 0, 1, 0, 0], "missing_end"), ([0, 0, 1, 1, 1], None)],
)
def test_end_tokens_of_sets_that_others_built(tmp_path, tokenizer, mask, code):
    end = load_tokenizer(tokenizer).ids[END]
    talks = [[([100 + n, 101, 102 + n, 103, end], mask)] for n in range(8)]
    write_index(tmp_path / "old_text_document", doubled(talks, 16))
    report = audit([str(tmp_path / "old")], tokenizer=tokenizer)
    codes = {finding.code: finding.count for finding in report.findings if "duplicates" not in finding.code}
    assert codes == ({code: 8} if code else {})


def test_the_end_that_generation_does_not_stop_at(found, tmp_path, tokenizer):
    folder = write_tokenizer(tmp_path / "base", eos_token="<|endoftext|>")
    ids = {
        token["content"]: token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    finding = only(found(clean_rows(4), tokenizer=folder), "eos_differs")
    assert not finding.is_harmful and finding.count == 4
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["<|endoftext|>"]}))
    finding = only(found(clean_rows(4), tokenizer=folder), "eos_mismatch")
    assert finding.is_harmful and f"<|im_end|> ({ids[END]})" in finding.message
    assert f"stops at <|endoftext|> ({ids['<|endoftext|>']})" in finding.message
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|endoftext|>"], ids[END]]}))
    assert found(clean_rows(4), tokenizer=folder).findings == ()


def test_control_text_in_messages_is_counted(found):
    rows = clean_rows(4)
    rows[1] = talk("what is <|im_end|> and <|im_start|>?", prose(7))
    finding = only(found(rows), "control_text")
    assert (finding.count, finding.more) == (1, {"texts": 2}) and not finding.is_harmful
