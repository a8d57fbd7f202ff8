"""One rank that loads a model, `FORMAT` or `none`, and prints how many bytes of its own memory that took at the most.

Run as a script: `python qlora_memory.py HF_DIR FORMAT`. Pages of the checkpoint's files are not its own.
"""

import json
import math
import os
import re
import struct
import sys
import threading
from pathlib import Path

ROUND = 0.002  # seconds between two looks


class Peak:
    """The most anonymous memory that the process had inside the block, above what it began with."""

    def __enter__(self):
        self._first = self._most = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _look(self):
        while not self._done.wait(ROUND):
            self._most = max(self._most, anonymous())

    @property
    def grown(self):
        return self._most - self._first


def anonymous():
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def main(folder, kind):
    import torch

    from toolkits.cards.lesson import lesson
    from toolkits.training.layout import layout_of
    from toolkits.training.lora import Lora
    from toolkits.training.parallel.world import process_groups
    from toolkits.training.run import RunPlan, _model
    from toolkits.training.sources import find_model

    torch.set_num_threads(1)
    config = lesson(folder, folder / "data", folder / "out", lora_rank=4, precision="bf16", quantize=kind)
    source = find_model(config.model)
    layout = layout_of(config, source.settings, 1)
    with process_groups(layout, seed=1):
        if kind == "nf4":
            import bitsandbytes  # noqa: F401 - what it takes is no part of the model
        with Peak() as peak:
            chunks = _model(RunPlan(config, source, None, layout, Lora.of(config, source)), as_it_starts=True)
        held = sum(each.nbytes for each in (*chunks[0].parameters(), *chunks[0].buffers()))
    print(json.dumps({"grown": peak.grown, "held": held}))


def write_zeros(folder, sizes):
    """Write a bf16 checkpoint that takes no space on disk, and return the bytes of its weights."""
    from training_world import write_tokenizer

    from conversion.plan import plan_for

    config = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **sizes}
    config["architectures"] = ["Qwen2ForCausalLM"]
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, (step, number) in plan_for(config).hf_tensors.items():
        shape, start = step.parts[number].shape, end
        end += 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
