"""The loops that others build datasets with, in our own words, as what ours is measured against.

Both start a process that reads the file, feeds a pool of processes with `imap` in chunks of 32, and appends what
comes back as an int32 array; every one of these processes loads the tokenizer with transformers, and all have
imported torch.

    megatron    lines travel to the pool. A row: json.loads, one call of the fast tokenizer, the ids copied into a
                list, an end token behind them; back come the list, its length and the line's. No chat template, no
                mask. Written from tools/preprocess_data.py of Megatron-LM (core_v0.16.1); its rows have a `text`,
                which is made here of a row's messages.
    pai         the whole file is read as one JSON text, which fails for JSONL, and then line by line; rows travel to
                the pool as dicts. A row: the chat template and tokenizer for the question alone, and again for all;
                a Python loop that compares the two; tokens and labels filled up to SEQ_LEN, one list behind the
                other; json.dumps of both, for its length alone. Back come 2 x SEQ_LEN ints. A question of SEQ_LEN is
                left out, a longer row cut. Written from toolkits/sft_data_preprocessing/build_idxmap_sft_dataset.py
                of Pai-Megatron-Patch (a098ca5, without --sequence-packing); its rows have instruction and output,
                which are made here of a row's two messages.

In favour of the real ones: they also import megatron.core, print their progress, and Pai asks transformers for the
slow tokenizer, which releases before 5 still have for Qwen.
"""

import json
import multiprocessing
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN = 2048
STATE: dict[str, Any] = {}

Done = tuple[dict[str, list[int]], dict[str, list[int]], int]  # ids and lengths by key, bytes of input


def _load(folder: str) -> None:
    import torch  # noqa: F401  what the real ones write with imports it
    from transformers import AutoTokenizer

    STATE["tokenizer"] = AutoTokenizer.from_pretrained(folder)


def _plain(line: str) -> Done:
    tokenizer = STATE["tokenizer"]
    text = "\n".join(message["content"] for message in json.loads(line)["messages"])
    ids: list[int] = []
    ids.extend(tokenizer(text).input_ids)
    ids.append(tokenizer.eos_token_id)
    return {"text": ids}, {"text": [len(ids)]}, len(line)


def _turns(row: dict[str, Any]) -> list[Done]:
    tokenizer, messages = STATE["tokenizer"], row["messages"]
    question = tokenizer.apply_chat_template(messages[:-1], return_dict=False)
    if len(question) >= SEQ_LEN:
        return []
    tokens = tokenizer.apply_chat_template(messages, return_dict=False)[:SEQ_LEN]
    for asked, token in zip(question, tokens, strict=False):
        assert asked == token  # else the template is not for this loop
    labels = [-100] * (len(question) - 1) + tokens[len(question) :] + [-100]
    tokens[-1] = -1 - tokens[-1]
    filled = tokens + [tokenizer.pad_token_id] * (SEQ_LEN - len(tokens))
    ids = {"text": filled + labels + [-100] * (SEQ_LEN - len(labels))}
    return [(ids, {"text": [len(ids["text"])]}, len(json.dumps(ids)))]


def megatron(source: Path, pool: Any) -> Iterator[Done]:
    with open(source, encoding="utf-8") as lines:
        yield from pool.imap(_plain, lines, 32)


def pai(source: Path, pool: Any) -> Iterator[Done]:
    with open(source, encoding="utf-8") as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError:
            file.seek(0)
            rows = [json.loads(line) for line in file.readlines()]
    for found in pool.imap(_turns, rows, 32):
        yield from found


LOOPS: dict[str, Callable[[Path, Any], Iterator[Done]]] = {"megatron": megatron, "pai": pai}


def _build(name: str, source: str, folder: str, out: Path, workers: int) -> None:
    _load(folder)
    lengths: list[int] = []
    with multiprocessing.Pool(workers, _load, (folder,)) as pool, open(out.with_suffix(".bin"), "wb") as file:
        for ids, sizes, _ in LOOPS[name](Path(source), pool):
            for key, tokens in ids.items():
                file.write(np.array(tokens, np.int32).tobytes())
                lengths.extend(sizes[key])
    _write_index(out, lengths)


def _write_index(out: Path, lengths: list[int]) -> None:
    pointers = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * 4
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(lengths), len(lengths) + 1)
    bounds = np.arange(len(lengths) + 1, dtype=np.int64)
    out.with_suffix(".idx").write_bytes(
        header + np.array(lengths, np.int32).tobytes() + pointers.tobytes() + bounds.tobytes()
    )


def main(name: str, source: str, folder: str, out: str, workers: str) -> None:
    process = multiprocessing.Process(target=_build, args=(name, source, folder, Path(out), int(workers)))
    process.start()
    process.join()
    sys.exit(process.exitcode)


if __name__ == "__main__":
    main(*sys.argv[1:])
