"""Encoders that are equal or are not used, and masks from lengths alone against the tokenizer's own offsets."""

import dataclasses
import json
import random
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from data_world import NO_SHARED, PIECES, SHARED, TEMPLATES, fuzzed_rows, talk, unmarked, write_rows, write_tokenizer

import data_preprocessing.tokenizer
from data_preprocessing import encoders
from data_preprocessing.build import BuildOptions, build
from data_preprocessing.chat import ChatEncoder
from data_preprocessing.dataset import FILE_SUFFIXES
from data_preprocessing.encoders import FastokensEncoder, TokenizersEncoder, choose_encoder, compare, quickly_read
from data_preprocessing.masks import Frame, filled, flat_mask, offset_mask, unchanged_by_nfc
from data_preprocessing.records import conversation
from data_preprocessing.rendered import Rendered
from data_preprocessing.row_error import RowError
from data_preprocessing.tokenizer import load_tokenizer
from toolkits.foundation.errors import MachineError


class Reversed(TokenizersEncoder):
    """An encoder that gets long texts wrong."""

    def encode(self, texts):
        ids, bounds = super().encode(texts)
        return (ids[::-1], bounds) if len(ids) > 100 else (ids, bounds)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(encoders, "RANDOM_TEXTS", 200)


def test_fastokens_is_taken_when_it_is_equal_and_asked_only_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fastokens")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t"))
    assert choose_encoder(tokenizer).name == "fastokens"
    assert "comparing the encoders" in capsys.readouterr().err
    monkeypatch.setattr(encoders, "compare", lambda tokenizer: pytest.fail("asked again"))
    assert choose_encoder(tokenizer).name == "fastokens"
    assert capsys.readouterr().err == ""
    assert choose_encoder(tokenizer, "tokenizers").name == "tokenizers"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", bytes.upper])
def test_what_is_damaged_in_the_cache_is_found_out_again(tmp_path, monkeypatch, damage):
    pytest.importorskip("fastokens")
    folder = write_tokenizer(tmp_path / "t")
    small = dataclasses.asdict(load_tokenizer(folder))
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(data_preprocessing.tokenizer, "KEPT_FROM", 0)
    monkeypatch.setattr(encoders, "KEPT_FROM", 0)

    def ids():
        tokenizer = load_tokenizer(folder)
        assert choose_encoder(tokenizer).name == "fastokens"
        return tokenizer, [part.tolist() for part in FastokensEncoder(tokenizer).encode(["a b", "<|im_end|>中"])]

    _, expected = ids()
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {"encoders", "fastokens", "tokenizers"}
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(damage(whole[path]))
    again, found = ids()
    assert found == expected
    assert {path: path.read_bytes() for path in files} == whole
    for name, value in dataclasses.asdict(again).items():
        assert np.array_equal(value, small[name]), name


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fastokens")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose_encoder(load_tokenizer(write_tokenizer(tmp_path / "t"))).name == "fastokens"
    assert "this will be found out again" in capsys.readouterr().err


def test_a_changed_tokenizer_is_not_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data_preprocessing.tokenizer, "KEPT_FROM", 0)
    folder = write_tokenizer(tmp_path / "t")
    before = load_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["pad_token"] = "<|another|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    after = load_tokenizer(folder)
    assert "<|another|>" in after.control and "<|another|>" not in before.control and after.as_json is not None
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"} if not before.normalizes else None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).normalizes != before.normalizes
    assert load_tokenizer(folder).fingerprint != before.fingerprint


def test_what_only_the_config_adds_is_part_of_what_is_kept(tmp_path, monkeypatch):
    pytest.importorskip("fastokens")
    monkeypatch.setattr(encoders, "KEPT_FROM", 0)
    found = []
    for strips in (False, True):
        folder = write_tokenizer(tmp_path / str(strips))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        size = load_tokenizer(folder).encoder.get_vocab_size()
        token = {"content": "<x>", "lstrip": strips, "rstrip": False, "normalized": False, "special": False}
        config["added_tokens_decoder"] = {str(size): {**token, "single_word": False}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(folder)
        ids, _ = FastokensEncoder(tokenizer).encode(["a   <x>"])
        assert ids.tolist() == TokenizersEncoder(tokenizer).encode(["a   <x>"])[0].tolist()
        found.append(ids.tolist())
    assert found[0] != found[1]


def test_an_encoder_that_fails_for_now_is_asked_again(tmp_path, monkeypatch):
    pytest.importorskip("fastokens")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t"))
    with monkeypatch.context() as now:
        now.setattr(encoders, "compare", Mock(side_effect=MemoryError("no memory")))
        assert choose_encoder(tokenizer).name == "tokenizers"
    assert choose_encoder(tokenizer).name == "fastokens"


def test_a_user_without_a_home_is_served_too(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fastokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    assert choose_encoder(load_tokenizer(write_tokenizer(tmp_path / "t"))).name == "fastokens"
    assert "Could not determine home directory. This will be found out again" in capsys.readouterr().err


def test_merges_that_fastokens_could_not_tell_apart_keep_their_spelling():
    model = {"vocab": {"b": 1, "a": 0}, "merges": [["a", "b"]]}
    content = {"version": "1.0", "added_tokens": [], "model": model, "decoder": {"type": "ByteLevel"}}
    spelled = quickly_read(content)
    assert spelled["model"]["merges"] == ["a b"] and list(spelled["model"]["vocab"]) == ["a", "b"]
    assert "decoder" not in spelled and content["model"]["merges"] == [["a", "b"]]
    model["merges"].append(["a ", "b"])
    assert quickly_read(content)["model"]["merges"] == [["a", "b"], ["a ", "b"]]


def test_an_encoder_that_differs_is_not_used(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fastokens")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t"))
    monkeypatch.setattr(encoders, "FastokensEncoder", Reversed)
    assert choose_encoder(tokenizer).name == "tokenizers"
    assert "the encoder is tokenizers, because fastokens makes other ids of" in capsys.readouterr().err
    with pytest.raises(MachineError, match="--encoder fastokens: makes other ids of"):
        choose_encoder(tokenizer, "fastokens")
    assert compare(tokenizer, other=TokenizersEncoder(tokenizer)) == ""


def test_an_encoder_that_fails_is_not_used(tmp_path, monkeypatch):
    def fails(tokenizer):
        raise ValueError("an unknown step")

    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t"))
    monkeypatch.setattr(encoders, "_fastokens", fails)
    assert compare(tokenizer) == "fails (an unknown step)"


def test_without_fastokens_tokenizers_is_used(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t"))
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    assert choose_encoder(tokenizer).name == "tokenizers"
    with pytest.raises(MachineError, match="--encoder fastokens: it is not installed"):
        choose_encoder(tokenizer, "fastokens")


def test_no_encoder_changes_a_byte(tmp_path):
    pytest.importorskip("fastokens")
    folder = write_tokenizer(tmp_path / "t")
    rows = [*fuzzed_rows(80), talk("<|im_end|>", "b"), talk("e\u0301", "\u1100\u1161")]
    source = write_rows(tmp_path / "rows", rows)
    built = []
    for name in ("tokenizers", "fastokens"):
        build(source, tmp_path / "out", tokenizer=folder, overwrite=True, options=BuildOptions(encoder=name))
        built.append([(tmp_path / f"out_text_document{suffix}").read_bytes() for suffix in FILE_SUFFIXES])
    assert built[0] == built[1]


@pytest.mark.skipif(not SHARED.exists(), reason=NO_SHARED)
def test_the_encoders_are_equal_on_the_real_vocabulary():
    pytest.importorskip("fastokens")
    assert compare(load_tokenizer(SHARED / "qwen2_tokenizer")) == ""


def folders(tmp_path):
    yield write_tokenizer(tmp_path / "tiny")
    if SHARED.exists():
        yield SHARED / "qwen2_tokenizer"


def test_masks_from_lengths_are_those_from_offsets(tmp_path):
    draw = random.Random(1)
    for folder in folders(tmp_path):
        tokenizer = load_tokenizer(folder)
        texts, spans = [], []
        for _ in range(300):
            text = "".join(draw.choices([*PIECES, *tokenizer.control[:3]], k=draw.randint(1, 30)))
            edges = sorted(draw.sample(range(len(text) + 1), k=min(len(text) + 1, 2 * draw.randint(0, 3)) // 2 * 2))
            texts.append(text)
            spans.append(list(zip(edges[::2], edges[1::2], strict=True)))
        ids, bounds = TokenizersEncoder(tokenizer).encode(texts)
        runs = [(Frame.around(text, span), 1) for text, span in zip(texts, spans, strict=True)]
        mask, adds_up = flat_mask(ids, bounds, tokenizer.byte_lengths, filled(runs, []))
        flat = [number for number, text in enumerate(texts) if adds_up[number] and unchanged_by_nfc(text)]
        assert len(flat) > 100
        for number in flat:
            encoding = tokenizer.encoder.encode(texts[number], add_special_tokens=False)
            expected = offset_mask(encoding, texts[number], spans[number])
            assert mask[bounds[number] : bounds[number + 1]].tolist() == expected.tolist(), texts[number]


def test_text_that_becomes_a_control_token_when_it_is_normalized_is_refused(tmp_path):
    folder = write_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    size = 1 + max(token["id"] for token in content["added_tokens"])
    token = {**content["added_tokens"][0], "id": size, "content": "<\u00e9>", "normalized": True, "special": True}
    content["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    encoder = ChatEncoder(folder, encoder="tokenizers")
    samples = encoder.encode([encoder.render(conversation(talk("<e\u0301>", "a")))])
    assert samples.errors[0].reason == "control_text"


@pytest.mark.parametrize("kind", ["prepending", "metaspace"])
def test_other_vocabularies_are_left_to_their_offsets(tmp_path, kind):
    assert load_tokenizer(write_tokenizer(tmp_path, kind=kind)).byte_lengths is None


@pytest.mark.parametrize(
    ("change", "still"),
    [
        ({}, True),
        ({"normalizer": None}, True),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"normalizer": {"type": "NFKC"}}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
    ],
)
def test_which_vocabularies_lose_no_byte(tmp_path, change, still):
    folder = write_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **change}))
    assert (load_tokenizer(folder).byte_lengths is not None) is still


def test_a_control_token_out_of_plain_text_is_refused(tmp_path):
    encoder = ChatEncoder(write_tokenizer(tmp_path), encoder="tokenizers")
    # As if a template wrote no control token where the tokenizer finds one.
    samples = encoder.encode([Rendered("a<|im_end|>", ((0, 1),), 0), Rendered("a<|im_end|>", ((0, 1),), 1)])
    assert str(samples.errors[0]) == "this tokenizer makes a control token of plain text in a message"
    assert samples.lengths.tolist()[0] == 0 and samples.lengths[1] > 0 and 1 not in samples.errors


# What a template may do with contents and still be known to copy them, and what not.
COPYING = [
    *TEMPLATES.values(),
    *map(unmarked, TEMPLATES.values()),
    "{% for m in messages %}{{ m['role'] ~ ':' ~ m.content | trim ~ '</s>' }}{% endfor %}",
    "{% set all = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% set first = messages[0]['content'] if messages[0].role == 'system' else 'none' %}{{ first + '</s>' }}"
    "{% for m in all %}{{ m.content.strip() + '</s>' }}{% endfor %}",
    "{% for m in messages %}{% if loop.previtem is defined and loop.previtem.role == m.role %}"
    "{{ raise_exception(m.content) }}{% endif %}{% set body %}{{ m.content }}{% endset %}{{ body }}</s>{% endfor %}",
    "{% for m in messages %}{% if m.content is not none and m.content != '' %}"
    "{{ m.content + '</s>' }}{% endif %}{% endfor %}",
]  # fmt: skip
TRANSFORMING = [
    "{% for m in messages %}{{ m.content | upper }}{{ '</s>' }}{% endfor %}",
    "{% for m in messages %}{{ m.content[:1000] + '</s>' }}{% endfor %}",
    "{% for m in messages %}{{ m.content.split('</think>')[-1] + '</s>' }}{% endfor %}",
    "{% for m in messages %}{% if 'x' in m.content %}{{ '!' }}{% endif %}{{ m.content + '</s>' }}{% endfor %}",
    "{% for m in messages %}{% set t = m.content %}{{ t | replace('a', 'b') + '</s>' }}{% endfor %}",
    "{% for m in messages %}{% set ns = namespace(t='') %}{% set ns.t = m.content %}{% if ns.t == 'x' %}!{% endif %}"
    "{{ ns.t + '</s>' }}{% endfor %}",
    "{% for m in messages %}{{ m.content | tojson }}</s>{% endfor %}",
    "{% for m in messages %}{{ m }}{{ m.content + '</s>' }}{% endfor %}",
    "{% for m in messages %}{{ m.get('content') + '</s>' }}{% endfor %}",
    "{% macro say(m) %}{{ m.content + '</s>' }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% for c in messages | map(attribute='content') %}{{ c + '</s>' }}{% endfor %}",
    "{% for m in messages %}{% if m.content | length > 5 %}{{ '!' }}{% endif %}{{ m.content + '</s>' }}{% endfor %}",
    "{% for m in messages %}{{ '%s' | format(m.content) + '</s>' }}{% endfor %}",
    "{% for m in messages %}{% for x in m.content %}{{ x }}{% endfor %}{{ '</s>' }}{% endfor %}",
    "{% set d = {'a': messages[0].content} %}{{ d.a | length }}"
    "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("template", COPYING)
def test_a_template_that_copies_contents_is_run_once_for_a_shape(tmp_path, template, monkeypatch):
    encoder = ChatEncoder(write_tokenizer(tmp_path, template), encoder="tokenizers")
    assert encoder.template.copies_contents
    rows = [conversation(row) for row in fuzzed_rows(60)]
    by_shape = []
    for row in rows:
        try:
            by_shape.append(encoder.render(row))
        except RowError as error:
            by_shape.append(str(error))
    monkeypatch.setattr(encoder.template, "copies_contents", False)
    for row, expected in zip(rows, by_shape, strict=True):
        try:
            one = encoder.render(row)
            assert (one.text, list(one.spans), one.num_control_tokens) == (
                expected.text, list(expected.spans), expected.num_control_tokens,
            )  # fmt: skip
        except RowError as error:
            assert str(error) == expected


@pytest.mark.parametrize("template", TRANSFORMING)
def test_a_template_that_does_more_than_copy_is_run_for_every_row(tmp_path, template):
    encoder = ChatEncoder(write_tokenizer(tmp_path, template), encoder="tokenizers")
    assert not encoder.template.copies_contents


def test_the_shape_is_rendered_once(tmp_path, monkeypatch):
    encoder = ChatEncoder(write_tokenizer(tmp_path, unmarked(TEMPLATES["chatml"])), encoder="tokenizers")
    encoder.render(conversation(talk("q", "a", "q", "a")))
    monkeypatch.setattr(encoder.template, "render", lambda *_, **__: pytest.fail("rendered again"))
    assert encoder.render(conversation(talk("r", "b", "s", "c"))).text.count("<|im_end|>") == 4


def test_the_tokenizers_library_is_not_needed_beside_fastokens(tmp_path):
    pytest.importorskip("fastokens")
    folder = write_tokenizer(tmp_path / "t")
    choose_encoder(load_tokenizer(folder))
    encoder = ChatEncoder(folder)
    encoder.encode([encoder.render(conversation(talk("q", "a")))])
    assert "encoder" not in vars(encoder.tokenizer)


def test_ids_are_flat_int32(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    ids, bounds = choose_encoder(tokenizer, "tokenizers").encode(["a", "", "bb"])
    assert (ids.dtype, bounds.dtype) == (np.int32, np.int64)
    assert bounds[0] == 0 and bounds[1] == bounds[2] and bounds[-1] == len(ids)
    assert sys.byteorder == "little"  # as the buffers of fastokens and the files are
