"""Change checkpoints at random and convert them: each is refused with exit code 4, or converts to the same bytes.

    python benchmarks/fuzz_checkpoints.py --count 20000 --seed 1

Headers, indexes, configs, archives and metadata of tiny checkpoints of every kind are changed: bytes, JSON values,
fields of the pickled metadata. A case fails when it ends in any other error, when an output holds a tensor whose
bytes are none of the source's, when `inspect` raises, when it takes more than TIMEOUT seconds, or when it takes more
than MEMORY bytes. A failed case is printed with its number; `--only NUMBER` runs it alone, with its traceback.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this folder has a conversion.py of its own

from conversion import hf_to_mcore, inspect, mcore_to_hf
from conversion.hf_checkpoint import HfCheckpoint
from conversion.mcore_checkpoint import McoreCheckpoint
from conversion.report import sha256_of
from conversion.safe_pickle import scan_directory
from toolkits.foundation.errors import CheckpointError

TIMEOUT = 60.0  # seconds; far more than a case takes on a busy machine
MEMORY = 512 << 20
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
NUMBERS = [0, 1, -1, 2, 7, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64, -(2**63), 10**30, 1e308, -0.5, 3.0]
VALUES = [
    *NUMBERS,
    None,
    True,
    "",
    "..",
    "../x",
    "/etc/passwd",
    "\0",
    "x" * 5000,
    [],
    {},
    [[]],
    {"a": {}},
    float("nan"),
]
BYTES = [b"\x00", b"\xff", b"\x80", b"(", b".", b"]" * 40, b"}" * 40, b"2\x86" * 40, b"[" * 3000, b"\xff" * 8, b"c"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="one case, here, with its traceback")
    parser.add_argument("--from", dest="first", type=int, help=argparse.SUPPRESS)  # how it calls itself
    choices = parser.parse_args()
    if choices.only is not None:
        with tempfile.TemporaryDirectory() as work:
            print(_Case(choices.seed, choices.only, Path(work), _make_sources(Path(work) / "sources")).run())
    elif choices.first is not None:
        _work(choices.seed, choices.first, choices.count)
    else:
        sys.exit(_supervise(choices.seed, choices.count))


def _supervise(seed: int, count: int) -> int:
    """Run the cases in a process that can hang or die; return 1 when one failed."""
    outcomes: Counter[str] = Counter()
    done = 0
    while done < count:
        arguments = [sys.executable, "-W", "ignore", __file__, "--seed", str(seed), "--count", str(count)]
        worker = subprocess.Popen([*arguments, "--from", str(done)], stdout=subprocess.PIPE)
        assert worker.stdout is not None
        for line in _lines(worker):
            number, outcome = line.split(" ", 1)
            done = int(number) + 1
            outcomes[outcome.split(":")[0]] += 1
            if outcome.startswith("FAILED"):
                print(f"case {number}: {outcome}", flush=True)
            elif done % 1000 == 0:
                print(f"{done:,} of {count:,}: {dict(outcomes)}", flush=True)
        if done < count:
            print(f"case {done}: FAILED: it hangs, or ended its process (exit code {worker.returncode})", flush=True)
            outcomes["FAILED"] += 1
            done += 1
    print(f"{count:,} cases, seed {seed}: {dict(outcomes)}")
    return int(outcomes["FAILED"] > 0)


def _lines(worker: subprocess.Popen) -> Iterator[str]:
    """Yield the lines of a worker until it ends or says nothing for a while; it is gone then."""
    assert worker.stdout is not None
    descriptor, pending = worker.stdout.fileno(), b""
    try:
        while select.select([descriptor], [], [], TIMEOUT)[0] and (fresh := os.read(descriptor, 1 << 16)):
            *whole, pending = (pending + fresh).split(b"\n")
            yield from (line.decode() for line in whole)
    finally:
        worker.kill()
        worker.wait()


def _work(seed: int, first: int, count: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work, open(os.devnull, "w") as nowhere:
        sources = _make_sources(Path(work) / "sources")
        report = os.fdopen(os.dup(1), "w", buffering=1)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            for number in range(first, count):
                print(number, _Case(seed, number, Path(work), sources).outcome(), file=report)


def _make_sources(folder: Path) -> dict[str, Path]:
    """Write a checkpoint of each kind; return its folder by the kind's name."""
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in range(2):
        rows = {"q": 8, "k": 4, "v": 4}
        for name, count in rows.items():
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (count, 8)
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (count,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (8,)
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (8, 8)
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": (6, 8) for name in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (8, 6)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    kinds = {name: folder / name for name in ("single", "sharded", "bin", "mcore")}
    for name in ("single", "sharded", "bin"):
        kinds[name].mkdir(parents=True)
        (kinds[name] / "config.json").write_text(json.dumps(CONFIG))
        (kinds[name] / "tokenizer_config.json").write_text("{}")
    save_file(tensors, kinds["single"] / "model.safetensors")
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for number, half in enumerate(halves, start=1):
        save_file(half, kinds["sharded"] / f"model-0000{number}-of-00002.safetensors")
    weight_map = {name: f"model-0000{number + 1}-of-00002.safetensors" for number in (0, 1) for name in halves[number]}
    (kinds["sharded"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save(tensors, kinds["bin"] / "pytorch_model.bin")
    with contextlib.redirect_stderr(io.StringIO()):
        hf_to_mcore.convert(kinds["single"], kinds["mcore"])
    for report in folder.rglob("conversion_report.json"):
        report.unlink()  # it would refuse what this looks for
    return kinds


class _Case:
    """One change of one checkpoint: the same for the same seed and number."""

    def __init__(self, seed: int, number: int, work: Path, sources: dict[str, Path]) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.work, self.sources = work, sources
        self.kind = self.random.choice(list(sources))
        self.metadata: Metadata | None = None  # of the source, with the changes that were made to it so far

    def outcome(self) -> str:
        """Return `refused`, `equal`, or `FAILED` and why."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            outcome = self.run()
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"FAILED: {type(error).__name__} {error} ({frame.filename}:{frame.lineno})".replace("\n", " ")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        return f"FAILED: it took {grown:,} bytes of memory ({outcome})" if grown > MEMORY else outcome

    def run(self) -> str:
        """Return `refused` or `equal`; raise anything else."""
        source, target = self.work / "source", self.work / "target"
        for folder in (source, target, self.work / "back"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.sources[self.kind], source)
        for _ in range(self.random.choice((1, 1, 1, 2, 5))):
            self._change(source)
        inspect.describe(inspect.inspect(source))
        try:
            if self.kind == "mcore":
                scan_directory(source / "release")
                mcore_to_hf.convert(source, target)
            else:
                hf_to_mcore.convert(source, self.work / "back")
                mcore_to_hf.convert(self.work / "back", target)
        except CheckpointError:
            return "refused"
        strange = _hashes(target).keys() - _hashes(self.sources["single"]).keys()
        # A config that shares rows otherwise over query, key and value says so of the fused tensors.
        if self.kind == "mcore" and (source / "hf/config.json").read_text() != json.dumps(CONFIG):
            strange = set()
        assert not strange, f"{len(strange)} tensors whose bytes are none of the source's"
        return "equal"

    def _change(self, folder: Path) -> None:
        file = self.random.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
        raw = file.read_bytes()
        if file.suffix == ".json" and self.random.random() < 0.8:
            changed = self._json(raw)
        elif file.suffix == ".safetensors":
            changed = self._safetensors(raw)
        elif file.name == ".metadata" and self.random.random() < 0.6:
            changed = self._metadata(raw)
        elif file.suffix in (".bin", ".distcp"):
            changed = self._archive(raw)
        else:
            changed = self._bytes(raw)
        file.write_bytes(changed)

    def _safetensors(self, raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header, data = raw[8 : 8 + length], raw[8 + length :]
        if self.random.random() < 0.2:
            return self._bytes(raw[: 8 + length]) + data
        header = self._json(header) if self.random.random() < 0.6 else self._bytes(header)
        return len(header).to_bytes(8, "little") + header + data

    def _archive(self, raw: bytes) -> bytes:
        """Change what is around the data of tensors: nothing tells a changed weight from another weight."""
        bounds = [0]
        for start, length in sorted((raw.find(each), len(each)) for each in _data_of(self.sources) if each in raw):
            if start >= bounds[-1]:  # a part lies inside what it is fused into
                bounds += [start, start + length]
        bounds.append(len(raw))
        pieces = [raw[start:stop] for start, stop in itertools.pairwise(bounds)]
        chosen = self.random.choice(range(0, len(pieces), 2))
        return b"".join([*pieces[:chosen], self._bytes(pieces[chosen]), *pieces[chosen + 1 :]])

    def _json(self, raw: bytes) -> bytes:
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError):  # changed before
            return self._bytes(raw)
        places = list(_places(content))
        if not places:
            return self._bytes(raw)
        holder, key = self.random.choice(places)
        other_holder, other_key = self.random.choice(places)
        action = self.random.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[self.random.choice(["x", "", "__metadata__", str(key) + "x"])] = holder.pop(key)
        elif action == 2:
            holder[key] = copy.deepcopy(other_holder[other_key])
        elif action == 3 and type(holder[key]) is int:
            holder[key] += self.random.choice([-8, -1, 1, 2, 8])
        else:
            holder[key] = copy.deepcopy(self.random.choice(VALUES))
        return json.dumps(content).encode()

    def _metadata(self, raw: bytes) -> bytes:
        # Changes add up on the object that was written: what a change made of its bytes is never unpickled here.
        metadata = self.metadata
        if metadata is None:
            metadata = self.metadata = FileSystemReader(self.sources["mcore"] / "release").read_metadata()
        try:
            entries = list(metadata.storage_data.items())
            index, info = self.random.choice(entries)
            _, other = self.random.choice(entries)
            described = metadata.state_dict_metadata[index.fqn]
        except Exception:  # changed before
            return self._bytes(raw)
        value, key = self.random.choice(VALUES), self.random.choice(list(metadata.state_dict_metadata))

        def chunk(field: str) -> Callable[[], None]:
            return lambda: object.__setattr__(described.chunks[0], field, _sized(self.random, value))

        actions: list[Callable[[], Any]] = [
            lambda: setattr(info, "offset", value),
            lambda: setattr(info, "length", value),
            lambda: setattr(info, "relative_path", value),
            lambda: setattr(info, "offset", other.offset),
            lambda: setattr(info, "relative_path", other.relative_path),
            lambda: setattr(info, "transform_descriptors", value),
            lambda: object.__setattr__(index, "offset", _sized(self.random, value)),
            lambda: object.__setattr__(index, "fqn", self.random.choice([key, value])),
            lambda: setattr(described, "size", _sized(self.random, value)),
            lambda: setattr(described.properties, "dtype", self.random.choice([torch.float32, value])),
            lambda: described.chunks.append(described.chunks[0]),
            lambda: described.chunks.clear(),
            lambda: metadata.state_dict_metadata.pop(key),
            lambda: metadata.state_dict_metadata.update({key: described}),
            lambda: metadata.storage_data.pop(index),
            lambda: setattr(metadata, self.random.choice(["storage_data", "state_dict_metadata"]), value),
            chunk("offsets"),
            chunk("sizes"),
        ]
        with contextlib.suppress(AttributeError, TypeError):  # a byte object has no chunks
            self.random.choice(actions)()
        with contextlib.suppress(Exception):
            return pickle.dumps(metadata)
        return self._bytes(raw)

    def _bytes(self, raw: bytes) -> bytes:
        changed = bytearray(raw)
        for _ in range(self.random.choice((1, 1, 2, 4, 16))):
            at = self.random.randrange(len(changed) + 1)
            action = self.random.randrange(6)
            if action == 0 and at < len(changed):
                changed[at] = self.random.randrange(256)
            elif action == 1 and at < len(changed):
                changed[at] ^= 1 << self.random.randrange(8)
            elif action == 2:
                changed[at:at] = self.random.choice(BYTES)
            elif action == 3:
                del changed[at : at + self.random.choice((1, 2, 8, 100, 1 << 20))]
            elif action == 4:
                width = self.random.choice((1, 2, 4, 8))
                number = self.random.choice([number for number in NUMBERS if isinstance(number, int)])
                changed[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
            else:
                start = self.random.randrange(len(changed) + 1)
                changed[at : at + 16] = changed[start : start + 16]
        return bytes(changed)


@functools.cache
def _data_of_folders(single: Path, mcore: Path) -> list[bytes]:
    hf, megatron = HfCheckpoint(single), McoreCheckpoint(mcore)
    tensors = [hf.read(name) for name in hf.tensors]
    for key, stored in megatron.tensors.items():
        tensors += [megatron.read(key, chunk.offsets, chunk.sizes) for chunk in stored.chunks]
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def _data_of(sources: dict[str, Path]) -> list[bytes]:
    """Return the data of every tensor of the sources, as it lies in their files."""
    return _data_of_folders(sources["single"], sources["mcore"])


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (holder, key) of every value inside a JSON value."""
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield content, key
        yield from _places(content[key])


def _sized(rng: random.Random, value: Any) -> Any:
    """Return something where a torch.Size is expected, or what is no such thing."""
    try:
        return rng.choice([value, torch.Size([value, 8]), torch.Size([value]), torch.Size([0, value, 4])])
    except (TypeError, RuntimeError, OverflowError):
        return value


def _hashes(folder: Path) -> dict[str, str]:
    """Return the names of a HuggingFace directory's tensors by the hash of their bytes."""
    checkpoint = HfCheckpoint(folder)
    return {sha256_of(checkpoint.read(name)): name for name in checkpoint.tensors if math.prod(checkpoint.shape(name))}


if __name__ == "__main__":
    main()
