"""What the data tests share: a tiny real tokenizer, templates in our own words, conversations, older datasets."""

import functools
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NO_SHARED = f"needs the real tokenizer and samples in {SHARED}"

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "</s>", "[INST]", "[/INST]", "<|head|>", "<|tail|>"]
CORPUS = [
    "the cat sat on the mat, hello world! user assistant system",
    "你好，世界。今天天气很好",
    "a\nb\n\nc 1234 don't",
] * 3

MARK, END_MARK = "{% generation %}", "{% endgeneration %}"
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3-like": (
        "{{- bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|tail|>\n\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
    ),
    "mistral-like": (
        "{% set turns = namespace(system='') %}{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set turns.system = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}{{ '[INST] ' + turns.system + m.content + ' [/INST]' }}{% set turns.system = '' %}"
        "{% else %}{% generation %}{{ ' ' + m.content + '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "words": (  # the roles are plain text, so tokens may lie across the border of an answer
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' }}"
        "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
        "{% else %}{{ 'Q:' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    ),
}


def unmarked(template):
    """Return the template without its generation markers."""
    return template.replace(MARK, "").replace(END_MARK, "")


@functools.cache
def _tokenizer_json(kind):
    tokenizer = _byte_level() if kind == "byte-level" else _sentencepiece_like(kind)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer.to_str()


def _sentencepiece_like(kind):
    """Spaces are ▁, unknown characters fall back to bytes; the first ▁ is put in front in one of two ways."""
    alphabet = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "prepending":  # before each stretch between special tokens
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:  # at the beginning of the text only
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=alphabet, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer makes special tokens of the bytes; in published vocabularies only <unk> is one.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:1]
    return Tokenizer.from_str(json.dumps(content))


def _byte_level():
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def write_tokenizer(folder, template=TEMPLATES["chatml"], kind="byte-level", **config):
    """Write the tiny tokenizer's folder and return it; `template` None leaves it without one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_tokenizer_json(kind), encoding="utf-8")
    named = {"eos_token": "<|im_end|>", "bos_token": "<bos>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def write_rows(path, rows):
    """Write JSONL and return its path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(*contents, system=None):
    """Return a `messages` row of user and assistant in turns."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + messages}


PIECES = [
    "hello",
    " world",
    "\n",
    "\n\n",
    "  ",
    "你好",
    "。",
    "é",
    "e\u0301",
    "🙂",
    "👩‍👩‍👧",
    "\u200b",
    "1234",
    "don't",
    "\t",
]
PIECES += [
    "Ω",
    "\u0301",
    "a",
    "<",
    "|",
    "<|im",
    "{{ x }}",
    "\\n",
    "\u3000",
    "ﬁ",
    "\U000f0000",
    "한",
    "\u1100\u1161",
    "\x7f",
]


def fuzzed_rows(count, seed=0):
    """Return `messages` rows of Unicode at random, without control text."""
    rng = random.Random(seed)

    def text(least):
        drawn = "".join(rng.choices(PIECES, k=rng.randint(least, 12)))
        return drawn if drawn.strip() or not least else drawn + "x"

    rows = []
    for _ in range(count):
        turns = [text(index % 2) for index in range(2 * rng.randint(1, 3))]
        rows.append(talk(*turns, system=text(1) if rng.random() < 0.3 else None))
    return rows


def write_index(prefix, documents, dtype="<i4"):
    """Write a Megatron indexed dataset by its description: one sequence a document."""
    codes = {"<i4": 4, "<i8": 5, "<u2": 8}
    arrays = [np.array(document, dtype) for document in documents]
    lengths = [len(array) for array in arrays]
    pointers = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, codes[dtype], len(lengths), len(lengths) + 1)
    body = np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes()
    body += np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(header + body)
    return prefix


def doubled(conversations, seq_len, pad=1):
    """Write documents from the layout's description: `conversations` is a list of lists of (tokens, mask)."""
    documents = []
    for packed in conversations:
        tokens, labels = [], []
        for ids, mask in packed:
            tokens += [*ids[:-1], -1 - ids[-1]]
            labels += [token if keep else -100 for token, keep in zip(ids[1:], mask[1:], strict=True)] + [-100]
        tokens += [pad] * (seq_len - len(tokens))
        labels += [-100] * (seq_len - len(labels))
        documents.append(tokens + labels)
    return documents


# Calls and results of tools, and reasoning, in the plainest words.
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|head|>' }}{% for t in tools %}{{ t.function.name }}{% endfor %}{{ '<|tail|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content and loop.index0 >= messages | length - 1 %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + (c.function.arguments | tojson) + ']' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def trained_of(dataset, folder, row):
    from data_preprocessing.tokenizer import load_tokenizer

    tokens, mask = dataset.tokens(row), dataset.mask(row)
    return load_tokenizer(folder).encoder.decode(tokens[mask == 1].tolist(), skip_special_tokens=False)


def text_of(dataset, folder, row):
    from data_preprocessing.tokenizer import load_tokenizer

    return load_tokenizer(folder).encoder.decode(dataset.tokens(row).tolist(), skip_special_tokens=False)


PAIRS = [
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"prompt": talk("q")["messages"], "chosen": [{"role": "assistant", "content": "good"}],
     "rejected": [{"role": "assistant", "content": "bad"}]},
    {"chosen": talk("q", "good")["messages"], "rejected": talk("q", "bad")["messages"]},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
     "rejected": {"from": "gpt", "value": "bad"}},
    {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    {"messages": talk("q")["messages"], "chosen": {"role": "assistant", "content": "good"},
     "rejected": {"role": "assistant", "content": "bad"}},
]  # fmt: skip


def command(*words, hash_seed="0"):
    """Run `temper data` in a process of its own; return its exit code and what it said on stdout and stderr."""
    script = "from toolkits.cli import main; main()"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", script, "data", *map(str, words)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        env=environment,
    )
    return done.returncode, done.stdout, done.stderr
