"""Helpers of the training tests: a tiny model and dataset, and ranks that run a list of cases.

Run as a script this file is one rank: `RANK=.. WORLD_SIZE=.. python training_world.py CASES.json`.
"""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 261  # odd: TP=2 pads it
# Pairwise distinct sizes, so that no missing transpose goes unseen.
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_model(folder, *, tied=True, seed=11, **changes):
    """Write a random HuggingFace checkpoint whose every weight, norms and biases too, says something."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**(TINY | changes), tie_word_embeddings=tied, dtype="float32"))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.mul_(3.0)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
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


def write_dataset(prefix, tokenizer, *, rows, seed=5):
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


def flags(**values):
    """Turn settings into the flags of a rank."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    return words


def run_cases(folder, ranks, cases, *, script=__file__):
    """Run each case (a list of flags) on `ranks` ranks, one after the other; return the histories by name.

    A history is a list of step figures as dicts. A case that fails fails the whole world. `script` is what a
    rank runs: it calls `rank_main` in the end.
    """
    folder.mkdir(exist_ok=True)
    ports = free_ports(len(cases))
    plan = [
        {"name": name, "port": port, "flags": case} for (name, case), port in zip(cases.items(), ports, strict=True)
    ]
    (folder / "cases.json").write_text(json.dumps(plan))
    processes = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        command = [sys.executable, "-W", "ignore", str(script), str(folder / "cases.json")]
        with open(folder / f"rank-{rank}.log", "wb") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank-{rank}.log").read_text() for rank in range(ranks))
    assert codes == [0] * ranks, logs
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


def wait(processes, seconds=400):
    """Return the exit codes; when one rank fails, the others would wait for it."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    return [process.poll() for process in processes]


def free_ports(count):
    """Ports below those that the kernel hands out: nothing that the ranks open meanwhile can take them."""
    ports = iter(random.sample(range(15000, 32000), 1000))
    return [next(filter(is_free, ports)) for _ in range(count)]


def is_free(port):
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def rank_main(cases):
    from toolkits.training.objectives import OBJECTIVES
    from toolkits.training.options import parse_flags
    from toolkits.training.run import run

    for case in json.loads(cases.read_text()):
        os.environ["MASTER_PORT"] = str(case["port"])
        history = run(parse_flags(case["flags"]), OBJECTIVES[case.get("objective", "sft")])
        if os.environ["RANK"] == "0":
            figures = [dataclasses.asdict(step) for step in history]
            (cases.parent / f"{case['name']}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    rank_main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as a real rank leaves
