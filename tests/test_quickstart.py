"""The quickstart: its sample, its tokenizer and model, and the line with too few iterations."""

import json
from pathlib import Path

import pytest

from toolkits.foundation.errors import NumericsError, TemperError, UsageError
from toolkits.generation.prompts import read_questions
from toolkits.quickstart import __main__ as main
from toolkits.quickstart.answers import comparison, num_right, some_questions
from toolkits.quickstart.tiny import SAMPLE, VOCABULARY, write_tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert 2e6 <= write_tiny_checkpoint(folder) <= 5e6
    return folder


def test_the_sample_is_short_bilingual_and_unambiguous(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    known = read_questions(SAMPLE)
    prompts = [question.messages[0].content for question in known]
    assert len(known) == 200 == len(set(prompts))
    assert sum(any("\u4e00" <= sign <= "\u9fff" for sign in prompt) for prompt in prompts) == 100
    for question in known:
        turns = [message.for_template() for message in question.messages]
        turns.append({"role": "assistant", "content": question.expected})
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert len(tokenizer(whole)["input_ids"]) <= 40
        assert len(tokenizer(question.expected)["input_ids"]) <= 11  # the end of the turn is the twelfth
        assert tokenizer.decode(tokenizer(question.expected)["input_ids"]) == question.expected


def test_the_model_is_qwen_shaped_and_hard_to_split(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["tie_word_embeddings"]
    assert config["vocab_size"] == VOCABULARY and VOCABULARY % 2
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    sizes = [config["hidden_size"], config["intermediate_size"], VOCABULARY, config["hidden_size"] * groups // heads]
    assert groups < heads and len(set(sizes)) == len(sizes)
    from safetensors.torch import load_file

    weights = load_file(tiny / "model.safetensors")
    assert weights["model.layers.0.self_attn.q_proj.bias"].abs().min() > 0
    assert (
        write_tiny_checkpoint(tiny / "again")
        and (tiny / "model.safetensors").read_bytes() == (tiny / "again" / "model.safetensors").read_bytes()
    )


def test_prompts_are_spread_over_the_sample_and_its_languages() -> None:
    asked = some_questions(SAMPLE, 10)
    assert len(asked) == 10 == len({question.expected for question in asked})
    assert sum(question.messages[0].content.startswith("Write") for question in asked) == 5
    said = [question.expected for question in asked]
    assert num_right(asked, said) == 10 and num_right(asked, ["", *said[1:]]) == 9
    assert comparison(asked, said, said).row_count == 10


def test_the_whole_line(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(main.TINY, "TRAIN_TOKENS_OR_ITERS", "60")
    main.quickstart.callback(None, None, Path("out put"))
    said = capfd.readouterr().out
    assert "$ sh" in said and "convert_hf2mcore.sh" in said and " 'out put/tiny-hf' 'out put/mcore'\n" in said
    assert "right: 0 of 10 before" in said and "memorised its sample" in said and "HF_DIR DATA.jsonl" in said
    run = tmp_path / "out put" / "run"
    for pattern in ("checkpoint/*/loss.png", "log/*.log", "tensorboard/*/*", "huggingface/*/model.safetensors"):
        assert len(list(run.glob(pattern))) == 1, pattern
    assert main._unused(Path("out put")) == Path("out put-2")


def test_too_few_right_answers_are_a_failure(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        main, "_run", lambda command: (tmp_path / "out/run/huggingface/x").mkdir(parents=True, exist_ok=True)
    )
    monkeypatch.setattr(main, "_compare", lambda line, exported: 8)
    with pytest.raises(NumericsError, match="only 8 of 10 answers are right"):
        main.quickstart.callback(None, None, tmp_path / "out")


def test_a_step_that_fails_ends_the_line_with_its_code(tmp_path) -> None:
    (tmp_path / "no model").mkdir()
    with pytest.raises(TemperError, match="this step ended with exit code 4") as caught:
        main.quickstart.callback(tmp_path / "no model", SAMPLE, tmp_path / "out")
    assert caught.value.exit_code == 4


def test_rows_and_steps_follow_the_users_dataset(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(main, "visible_gpus", lambda: 2)
    for longest, tokens, row, step in ((40, 5000, "64", "16"), (40, 100, "64", "2"), (9000, 10**9, "1024", "16")):
        manifest = {"counts": {"longest": longest, "tokens": tokens}}
        (tmp_path / "d_text_document.json").write_text(json.dumps(manifest))
        words = main._words_for(tmp_path / "d")
        assert (words["SEQ_LEN"], words["GLOBAL_BATCH_SIZE"], words["PR"]) == (row, step, "bf16")


def test_half_an_input_is_refused() -> None:
    with pytest.raises(UsageError, match="both HF_DIR and DATA"):
        main.quickstart.callback(Path("."), None, Path("out"))
