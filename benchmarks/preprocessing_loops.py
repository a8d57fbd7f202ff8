"""The loops that others build datasets with, written anew from their descriptions, as what ours is measured against.

    megatron    a row: json.loads, the texts joined, one call of transformers' fast tokenizer, an end token behind it;
                the list of ids travels to the first process, which makes an array of it and appends it to the .bin.
                No chat template, no mask (Megatron-LM, tools/preprocess_data.py).
    pai         a row: json.loads, the chat template and the tokenizer for each turn's conversation so far, a Python
                loop over its tokens for the labels, both filled up to SEQ_LEN; the list of 2 x SEQ_LEN ints travels
                to the first process, which makes an array of it and appends it (Pai-Megatron-Patch, its builder for
                fine-tuning, a sample a row as it was measured: 1.2 GB for 74,775 samples).

Both run in a pool of processes. Neither imports torch, which the real ones do: that is in their favour here.
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


def _turns(line: str) -> list[int]:
    tokenizer, messages = STATE["tokenizer"], json.loads(line)["messages"]
    tokens: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        so_far = tokenizer.apply_chat_template(messages[: index + 1], tokenize=True, return_dict=False)
        trained = message["role"] == "assistant"
        for token in so_far[len(tokens) :]:
            tokens.append(token)
            labels.append(token if trained else -100)
    tokens, labels = tokens[:SEQ_LEN], labels[1 : SEQ_LEN + 1]
    tokens[-1] = -1 - tokens[-1]
    tokens += [tokenizer.pad_token_id] * (SEQ_LEN - len(tokens))
    labels += [-100] * (SEQ_LEN - len(labels))
    return tokens + labels


def megatron(lines: Any, pool: Any, out: Path) -> None:
    lengths = []
    with open(out.with_suffix(".bin"), "wb") as file:
        for ids in pool.imap(_plain, lines, 32):
            file.write(np.array(ids, np.int32).tobytes())
            lengths.append(len(ids))
    _write_index(out, lengths)


def pai(lines: Any, pool: Any, out: Path) -> None:
    rows = 0
    with open(out.with_suffix(".bin"), "wb") as file:
        for row in pool.imap(_turns, lines, 32):
            file.write(np.array(row, np.int32).tobytes())
            rows += 1
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
