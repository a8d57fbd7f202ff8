"""Something to train the tiny models on: a tokenizer of single bytes, and conversations of very different lengths."""

import json
import random
from pathlib import Path

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
    from data_preprocessing.build import build

    rng = random.Random(seed)
    source = prefix.with_suffix(".jsonl")
    with open(source, "w", encoding="utf-8") as file:
        for number in range(rows):
            question = f"{number} " + "".join(rng.choices("abc é", k=rng.randint(1, 12)))
            chosen, rejected = ("".join(rng.choices(letters, k=rng.randint(1, 25))) for letters in ("xyzv", "xyzw"))
            row = {"prompt": question.strip(), "chosen": chosen + "v", "rejected": rejected + "w"}
            print(json.dumps(row), file=file)
    build(source, prefix, tokenizer=tokenizer)
    return prefix
