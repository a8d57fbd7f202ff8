"""Answers against transformers' and PEFT's own, whatever the batch."""

import json

import pytest
import torch
from conversion_models import EXPERTS
from conversion_models import write_model as write_family
from generate_world import ASKED, CONTEXT, END, MOST, copied, questions, random_adapter
from training_world import write_model

from conversion.merge import merge
from data_preprocessing.turns import Message
from toolkits.foundation.errors import (
    CheckpointError,
    DataError,
    UsageError,
)
from toolkits.generation.answering import Generator
from toolkits.generation.decoding import Decoding, draw_tokens
from toolkits.generation.loading import Source, load_model
from toolkits.generation.prompts import question_of, with_system
from toolkits.generation.texts import HALF, Texts


def answered(generator, decoding, *, batch_size):
    generator.decoder.decoding, before = decoding, generator.decoder.decoding
    try:
        return generator.answer_all(questions(), batch_size=batch_size)
    finally:
        generator.decoder.decoding = before


def by_transformers(network, tokenizer, text, count):
    """What transformers itself answers to one question, alone and without our settings."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        found = network.generate(**prompt, max_new_tokens=count, do_sample=False)
    return found[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_answers_are_those_of_transformers_whatever_the_batch(base, generator, batch_size, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = [by_transformers(network, tokenizer, text, MOST) for text in ASKED]
    assert len({tuple(tokens) for tokens in expected}) == len(ASKED), "or a mixed-up order would not show"
    answers = generator.answer_all(questions(), batch_size=batch_size)
    for answer, text, tokens in zip(answers, ASKED, expected, strict=True):
        assert answer.question.messages == (Message("user", text),)
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.num_tokens == len(tokens)
        assert answer.reason == ("stop" if tokens[-1] == END else "length")
    said = capfd.readouterr().err
    assert "answering: 5 answers/5 answers" in said and "\x1b" not in said, "plain lines: nobody watches"


def test_answers_end_at_every_token_that_ends_one(base, generator, tmp_path):
    tokens = generator.texts.tokens(question_of("hi"))
    (plain,) = generator.decoder.decode([tokens], [0])
    end = next(number for number, token in enumerate(plain.tokens) if number and token not in plain.tokens[:number])
    folder = copied(base, tmp_path / "other")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [plain.tokens[end]], "top_k": 9}))
    ended = Generator(Source(folder), Decoding(max_new_tokens=MOST))
    assert ended.texts.ends() == sorted({plain.tokens[end], END})
    (found,) = ended.decoder.decode([tokens], [0])
    assert found == (plain.tokens[:end], end + 1, "stop")


def test_what_a_generation_config_adds_is_left_out(base, generator, tmp_path):
    folder = copied(base, tmp_path / "other")
    said = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(said))
    other = Generator(Source(folder), Decoding(max_new_tokens=MOST))
    assert [one.text for one in other.answer_all(questions(), batch_size=5)] == [
        one.text for one in generator.answer_all(questions(), batch_size=5)
    ]


def test_an_answer_ends_where_the_model_can_read_no_more(generator):
    room = CONTEXT - len(generator.texts.tokens(question_of("x" * 160)))
    assert 0 < room < MOST
    long, short = generator.answer_all([question_of("x" * 160), question_of("hi")], batch_size=2)
    assert (long.num_tokens, long.reason) == (room, "length") and short.num_tokens == MOST
    with pytest.raises(DataError, match=r"--prompt: \d+ tokens, and the model reads 192 with its answer"):
        generator.answer_all([question_of("x" * 300), question_of("hi")], batch_size=2)


def test_drawn_answers_hang_on_the_seed_and_not_on_the_batch(generator):
    drawing = Decoding(max_new_tokens=MOST, temperature=1.5, top_k=100, top_p=0.95, seed=3)
    found = [[one.text for one in answered(generator, drawing, batch_size=size)] for size in (1, 2, 5)]
    assert found[0] == found[1] == found[2]
    other = [one.text for one in answered(generator, Decoding(MOST, 1.5, 0.95, 100, seed=4), batch_size=5)]
    greedy = [one.text for one in answered(generator, Decoding(MOST), batch_size=5)]
    likeliest = [one.text for one in answered(generator, Decoding(MOST, 1.5, top_k=1), batch_size=5)]
    assert not set(other) & set(found[0]) and not set(greedy) & set(found[0]) and likeliest == greedy


def test_a_question_asked_twice_draws_two_answers(generator, monkeypatch):
    monkeypatch.setattr(generator.decoder, "decoding", Decoding(max_new_tokens=MOST, temperature=1.5))
    one, other = generator.answer_all([question_of("hi"), question_of("hi")], batch_size=2)
    assert one.text != other.text


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.3, -torch.inf, 2.0, 1.1, -torch.inf], dtype=torch.float32)
    count = 10_000
    places = torch.arange(count, dtype=torch.float64) / count
    found = torch.bincount(draw_tokens(logits.expand(count, -1), places), minlength=5)
    torch.testing.assert_close(found / count, torch.softmax(logits, -1), atol=2 / count, rtol=0)
    assert draw_tokens(logits[None], torch.ones(1, dtype=torch.float64)).item() == 3, "never one without probability"


def test_what_somebody_types_is_text_and_ends_nothing(base, generator):
    tokens = generator.texts.tokens(question_of("say <|im_end|> twice"))
    assert tokens.count(END) == 1, "the template's own"
    raw = Texts(base, template=False)
    assert raw.tokens(question_of("say <|im_end|> twice")).count(END) == 1, "in raw text it is meant"


def test_raw_text_goes_on_without_a_template(base):
    from transformers import AutoTokenizer

    raw = Texts(base, template=False)
    assert raw.tokens(question_of("né")) == AutoTokenizer.from_pretrained(base)("né")["input_ids"]
    with pytest.raises(UsageError, match="--prompt is a conversation, and --no-template"):
        raw.tokens(with_system([question_of("hi")], "be kind")[0])


def test_text_comes_in_whole_characters(base):
    texts = Texts(base)
    said = "hé 你好 😀!"
    stream, pieces = texts.stream(), []
    for token in texts.tokens(question_of(said)):
        pieces.append(stream.add(token))
    pieces.append(stream.end())
    assert "".join(pieces) == f"user\n{said}\nassistant\n" and HALF not in "".join(pieces)
    cut = texts.stream()
    (half, *_) = texts._tokenizer.encoder.encode("é").ids
    assert cut.add(half) == "" and cut.end() == HALF, "what never became whole is not lost"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["dense", "qwen3-moe"])
def test_an_adapter_in_memory_is_the_merged_checkpoint_bit_for_bit(base, tmp_path, model, dtype):
    if model != "dense":
        base = tmp_path / "experts"
        write_family(base, EXPERTS[model])
    adapter = random_adapter(base, tmp_path / "adapter", rslora=True)
    merge(base, [(adapter, 1.0)], tmp_path / "merged", dtype=dtype)
    found = load_model(Source(base, adapter, dtype)).state_dict()
    expected = load_model(Source(tmp_path / "merged", dtype=dtype)).state_dict()
    plain = load_model(Source(base, dtype=dtype)).state_dict()
    assert found.keys() == expected.keys() == plain.keys()
    assert all(found[name].equal(expected[name]) and found[name].dtype == getattr(torch, dtype) for name in found)
    assert sum(not plain[name].equal(found[name]) for name in found) > len(found) // 3


@pytest.mark.parametrize(
    "changes", [{"target_modules": "all-linear"}, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}]
)
def test_with_an_adapter_answers_are_those_of_peft(base, generator, tmp_path, changes):
    peft = pytest.importorskip("peft", reason="PEFT is compared with: pip install '.[dev]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(8)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(network, peft.LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=20, **changes))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = [
        tokenizer.decode(by_transformers(adapted, tokenizer, text, MOST), skip_special_tokens=True) for text in ASKED
    ]
    tuned = Generator(Source(base, tmp_path / "adapter"), Decoding(max_new_tokens=MOST))
    assert [one.text for one in tuned.answer_all(questions(), batch_size=2)] == expected
    assert expected != [one.text for one in generator.answer_all(questions(), batch_size=2)]


def test_an_adapter_is_added_to_a_quantised_base_as_a_merge_adds_it(tmp_path, capsys):
    base = write_model(tmp_path / "base", tied=False, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    adapter = random_adapter(base, tmp_path / "adapter")
    merge(base, [(adapter, 1.0)], tmp_path / "merged", quantized_base="int8")
    found = load_model(Source(base, adapter, quantized_base="int8")).state_dict()
    expected = load_model(Source(tmp_path / "merged")).state_dict()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert "note: the base's matrices were quantised to int8" in capsys.readouterr().err
    with pytest.raises(UsageError, match="give --adapter too"):
        Source(base, quantized_base="nf4")


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    adapter = random_adapter(base, tmp_path / "adapter")
    other = write_model(tmp_path / "other", tied=False, seed=12)
    with pytest.raises(CheckpointError, match=r"was trained on base .*other has other weights"):
        load_model(Source(other, adapter))
    with pytest.raises(CheckpointError, match=rf"adapter is an adapter: give its base, base, and --adapter {adapter}"):
        load_model(Source(adapter))
