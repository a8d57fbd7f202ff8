"""The loops that others build datasets with, written anew from their descriptions, as what ours is measured against.

    megatron    one text a row through the tokenizer, an end token behind it, plain tokens on disk; no chat template,
                no mask (Megatron-LM, tools/preprocess_data.py)
    pai         each turn through the chat template and the tokenizer, lists of tokens and labels, rows of 2 x SEQ_LEN
                integers filled one behind the other (Pai-Megatron-Patch, its builder for fine-tuning)

Both run in a pool of processes that hand Python lists back to the first one.
"""

import json
import multiprocessing
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN = 2048
STATE: dict[str, Any] = {}


def _load(folder: str) -> None:
    from transformers import AutoTokenizer

    STATE["tokenizer"] = AutoTokenizer.from_pretrained(folder)


def _plain(line: str) -> list[int]:
    tokenizer = STATE["tokenizer"]
    text = "\n".join(message["content"] for message in json.loads(line)["messages"])
    ids: list[int] = tokenizer(text)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def _turns(line: str) -> tuple[list[int], list[int]]:
    tokenizer, tokens, labels = STATE["tokenizer"], [], []
    messages = json.loads(line)["messages"]
    for index, message in enumerate(messages):
        text = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False) if index else ""
        ids = tokenizer(text[len(before) :])["input_ids"]
        trained = message["role"] == "assistant"
        for token in ids:
            tokens.append(token)
            labels.append(token if trained else -100)
    return tokens[:SEQ_LEN], [*labels[1:SEQ_LEN], -100]


def megatron(lines: Any, pool: Any, out: Path) -> None:
    lengths = []
    with open(out.with_suffix(".bin"), "wb") as file:
        for ids in pool.imap(_plain, lines, 32):
            file.write(np.array(ids, np.int32).tobytes())
            lengths.append(len(ids))
    _write_index(out, lengths)


def pai(lines: Any, pool: Any, out: Path) -> None:
    tokens: list[int] = []
    labels: list[int] = []
    rows = 0
    with open(out.with_suffix(".bin"), "wb") as file:
        for ids, wanted in pool.imap(_turns, lines, 32):
            if len(tokens) + len(ids) > SEQ_LEN:
                padding = SEQ_LEN - len(tokens)
                file.write(np.array(tokens + [0] * padding + labels + [-100] * padding, np.int32).tobytes())
                tokens, labels, rows = [], [], rows + 1
            tokens += [*ids[:-1], -1 - ids[-1]]
            labels += wanted
    _write_index(out, [2 * SEQ_LEN] * rows)


def _write_index(out: Path, lengths: list[int]) -> None:
    pointers = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * 4
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(lengths), len(lengths) + 1)
    bounds = np.arange(len(lengths) + 1, dtype=np.int64)
    out.with_suffix(".idx").write_bytes(
        header + np.array(lengths, np.int32).tobytes() + pointers.tobytes() + bounds.tobytes()
    )


def main(name: str, source: str, folder: str, out: str, workers: str) -> None:
    loops: dict[str, Callable[[Any, Any, Path], None]] = {"megatron": megatron, "pai": pai}
    with open(source, encoding="utf-8") as lines, multiprocessing.Pool(int(workers), _load, (folder,)) as pool:
        loops[name](lines, pool, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
