"""Something to train the tiny models on: a tokenizer of single bytes, and conversations of very different lengths."""

import json
import random
from pathlib import Path
from typing import Any

VOCABULARY = 261  # odd: TP=2 pads it
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes and three marks beside a model of VOCABULARY words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_dataset(prefix: Path, tokenizer: Path, *, rows: int, seed: int = 5) -> Path:
    """Build a dataset of conversations with very different lengths and shares of trained tokens."""
    from data_preprocessing.build import build

    rng = random.Random(seed)
    source = prefix.with_suffix(".jsonl")
    with open(source, "w", encoding="utf-8") as file:
        for number in range(rows):
            question = f"{number} " + "".join(rng.choices("abc é", k=rng.randint(1, 12)))
            answer = "".join(rng.choices("xyz", k=rng.randint(1, 25)))
            print(json.dumps({"instruction": question.strip(), "output": answer}), file=file)
    build(source, prefix, tokenizer=tokenizer)
    return prefix


def write_pairs(prefix: Path, tokenizer: Path, *, rows: int, seed: int = 5) -> Path:
    """Build a dataset of preference pairs whose answers have very different lengths."""
    rng = random.Random(seed)
    pairs = [{"prompt": _question(rng, number), **_answers(rng)} for number in range(rows)]
    return _built(prefix, tokenizer, pairs)


def write_judged(prefix: Path, tokenizer: Path, *, rows: int, seed: int = 5) -> Path:
    """Build a dataset of single answers, two of five of them good."""
    rng = random.Random(seed)
    judged = []
    for number in range(rows):
        good = number % 5 in (1, 2)
        question, answer = _question(rng, number), _answers(rng)["chosen" if good else "rejected"]
        judged.append({"prompt": question, "completion": answer, "label": good})
    return _built(prefix, tokenizer, judged)


def _question(rng: random.Random, number: int) -> str:
    return f"{number} " + "".join(rng.choices("abcé", k=rng.randint(1, 12)))


def _answers(rng: random.Random) -> dict[str, str]:
    """Return a better answer with v in it and a worse one with w."""
    letters = {"chosen": "v", "rejected": "w"}
    return {key: "".join(rng.choices(f"xyz{one}", k=rng.randint(1, 25))) + one for key, one in letters.items()}


def _built(prefix: Path, tokenizer: Path, rows: list[dict[str, Any]]) -> Path:
    from data_preprocessing.build import build

    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build(source, prefix, tokenizer=tokenizer)
    return prefix
