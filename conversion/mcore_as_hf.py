"""A Megatron-core directory seen as HuggingFace tensors; nothing is written and at most one step a thread held."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError, raise_all

from .accounting import grouped
from .hf_checkpoint import read_config
from .layout import DTYPES, dtype_named, name_of, same_bits, split
from .mcore_checkpoint import McoreCheckpoint, hf_folder
from .mcore_directory import is_weight
from .plan import MERGED_LAYERS, Plan, Step, plan_for

_HEAD, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


class McoreAsHf:
    """The tensors of the HuggingFace directory that an export of `directory` gives, read one by one.

    `dtype(name)`, `shape(name)` and `read(name)` as in `HfCheckpoint`; `dtype` casts every tensor on reading.
    Vocabulary rows that another tool padded are trimmed, layers may be merged or have a key each. Opening it
    accounts for every tensor and raises one CheckpointError that lists everything that is wrong.
    """

    def __init__(self, directory: Path, *, dtype: str | None = None) -> None:
        self.checkpoint = McoreCheckpoint(directory)
        self.hf_folder = hf_folder(directory)
        self.config = read_config(self.hf_folder)
        self.plan: Plan = plan_for(self.config)
        self._cast = dtype_named(dtype)
        self._keys = {id(step): _locate(self.checkpoint, self.plan, step) for step in self.plan.steps}
        self._account()
        self._last = threading.local()  # the step that a thread read last: its parts are asked for in a row

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        step, number = self.plan.hf_tensors[name]
        return step.parts[number].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that `read` gives."""
        step, _ = self.plan.hf_tensors[name]
        return self._cast or self.checkpoint.tensors[self._place(step)[0]].dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, possibly as a view of its file: copy it before changing it."""
        return self.stored(name).to(self.dtype(name))

    def stored(self, name: str) -> torch.Tensor:
        """Return a tensor in the type that it is stored in."""
        step, number = self.plan.hf_tensors[name]
        if getattr(self._last, "step", None) is not step:
            self._last.step, self._last.fused = step, self._fused(step)
        return split(self._last.fused, step.blocks, number)

    def _fused(self, step: Step) -> torch.Tensor:
        key, index = self._place(step)
        start, shape = index + (0,) * len(step.shape), (1,) * len(index) + step.shape
        return self.checkpoint.read(key, start, shape).reshape(step.shape)

    def _place(self, step: Step) -> tuple[str, tuple[int, ...]]:
        place = self._keys[id(step)]
        assert place is not None, step
        return place

    def _account(self) -> None:
        used = {place[0] for place in self._keys.values() if place is not None}
        missing = sorted({step.key for step in self.plan.steps if self._keys[id(step)] is None})
        problems = [f"missing: {line}" for line in grouped(missing)]
        extra = sorted(key for key in self.checkpoint.tensors if key not in used and is_weight(key))
        if self.plan.tied and _HEAD in extra:
            extra.remove(_HEAD)
            self._check_tied_head(problems)
        problems += [f"unexpected: {line}" for line in grouped(extra)]
        problems += dict.fromkeys(self._shape_problems())
        raise_all(CheckpointError, f"{self.checkpoint.step} is not the model of {self.hf_folder}/config.json", problems)

    def _shape_problems(self) -> Iterator[str]:
        for step in self.plan.steps:
            place = self._keys[id(step)]
            if place is None:
                continue
            key, index = place
            stored = self.checkpoint.tensors[key]
            if stored.dtype not in DTYPES.values():
                yield f"{key} is {name_of(stored.dtype)}; only {', '.join(DTYPES)} are converted"
            expected = (self.plan.settings["num_layers"],) * len(index) + step.shape
            if stored.shape == expected:
                continue
            if step.is_vocabulary and stored.shape[1:] == step.shape[1:]:
                yield from _vocabulary_problem(key, stored.shape[0], step.shape[0])
            else:
                yield f"{key}: checkpoint {list(stored.shape)}, config says {list(expected)}"

    def _check_tied_head(self, problems: list[str]) -> None:
        rows, columns = self.plan.tensors[_EMBEDDING].shape
        stored = [self.checkpoint.tensors.get(key) for key in (_HEAD, _EMBEDDING)]
        comparable = all(each is not None and each.shape[0] >= rows and each.shape[1:] == (columns,) for each in stored)
        if comparable and same_bits(
            *(self.checkpoint.read(key, (0, 0), (rows, columns)) for key in (_HEAD, _EMBEDDING))
        ):
            return
        problems.append(f"config.json says tie_word_embeddings, but {_HEAD} differs from {_EMBEDDING}")


def _locate(checkpoint: McoreCheckpoint, plan: Plan, step: Step) -> tuple[str, tuple[int, ...]] | None:
    """Return the stored key of a step and its index on the layer axis; None when it is not there.

    Layers are merged or have a key each, and a plain local spec has norms of other names.
    """
    for key in (step.key, plan.family.aliases.get(step.key)):
        if key is None:
            continue
        if key in checkpoint.tensors:
            return key, step.index
        layer_key = key.replace(MERGED_LAYERS, f"{MERGED_LAYERS}{step.layer}.", 1)
        if step.layer is not None and layer_key in checkpoint.tensors:
            return layer_key, ()
    return None


def _vocabulary_problem(key: str, rows: int, vocab_size: int) -> Iterator[str]:
    """Yield what is wrong with another number of vocabulary rows; more than needed are only told of."""
    if rows < vocab_size:
        yield f"{key}: {rows} vocabulary rows, config.json says vocab_size {vocab_size}"
    else:
        print(f"{key}: {rows} rows trimmed to the {vocab_size} of config.json vocab_size", file=sys.stderr, flush=True)
