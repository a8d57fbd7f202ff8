"""A Megatron-core directory seen as HuggingFace tensors; nothing is written and at most one step a thread held."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError, raise_all

from .accounting import grouped
from .filling import row_runs
from .hf_checkpoint import read_config
from .layout import DTYPES, dtype_named, name_of, same_bits, split, tops_of
from .mcore_checkpoint import McoreCheckpoint, Region, hf_folder
from .mcore_directory import is_weight, require_model
from .plan import MERGED_LAYERS, Plan, Repeat, Step, layer_key, plan_of_checkpoint

# How a plain local layer spec says what Transformer Engine's fused layers, and so we, say otherwise.
LOCAL_NAMES = {
    MERGED_LAYERS + "self_attention.linear_qkv.layer_norm_weight": MERGED_LAYERS + "input_layernorm.weight",
    MERGED_LAYERS + "self_attention.linear_q_up_proj.layer_norm_weight": MERGED_LAYERS
    + "self_attention.q_layernorm.weight",
    MERGED_LAYERS + "self_attention.linear_kv_up_proj.layer_norm_weight": MERGED_LAYERS
    + "self_attention.kv_layernorm.weight",
    MERGED_LAYERS + "mlp.linear_fc1.layer_norm_weight": MERGED_LAYERS + "pre_mlp_layernorm.weight",
    MERGED_LAYERS + "pre_mlp_layernorm.weight": MERGED_LAYERS + "mlp.linear_fc1.layer_norm_weight",
}


class McoreAsHf:
    """The tensors of the HuggingFace directory that an export of `directory` gives, read one by one.

    `dtype(name)`, `shape(name)` and `read(name)` as in `HfCheckpoint`; `dtype` casts every tensor on reading.
    Vocabulary rows that another tool padded are trimmed, layers may be merged or have a key each. Opening it
    accounts for every tensor and raises one CheckpointError that lists everything that is wrong.
    """

    def __init__(self, directory: Path, *, dtype: str | None = None) -> None:
        self.checkpoint = McoreCheckpoint(directory)
        require_model(self.checkpoint.step)
        self.hf_folder = hf_folder(directory)
        self.config = read_config(self.hf_folder)
        self.plan: Plan = plan_of_checkpoint(self.config, mcore=self.checkpoint.tensors)
        self._cast = dtype_named(dtype)
        self._keys = {id(step): _locate(self.checkpoint, step) for step in self.plan.steps}
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

    @property
    def casts(self) -> bool:
        """Whether tensors are read in a type that was asked for."""
        return self._cast is not None

    @property
    def left_out(self) -> list[str]:
        """Stored tensors that are no weights of the model, or repeat one."""
        used = {place[0] for place in self._keys.values() if place is not None}
        return sorted(self.checkpoint.tensors.keys() - used)

    def region(self, step: Step) -> Region:
        """Return a step as it is stored, to be read row by row."""
        key, index = self._place(step)
        return self.checkpoint.region(key, index, step.shape)

    def slices(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor, a run of rows at a time."""
        step, number = self.plan.hf_tensors[name]
        dtype, region = self.dtype(name), self.region(step)
        for top, block in sorted(tops_of(step.blocks), key=lambda placed: placed[1].start):
            if block.part == number:
                for start, stop in row_runs((block.rows, *step.shape[1:]), dtype.itemsize):
                    yield region.rows(top + start, top + stop).to(dtype)

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
        for repeat in self.plan.repeats:
            if repeat.step.key in extra:
                extra.remove(repeat.step.key)
                problems += self._repeat_problems(repeat)
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
            expected = step.lead[len(step.lead) - len(index) :] + step.shape
            if stored.shape == expected:
                continue
            if step.is_vocabulary and stored.shape[1:] == step.shape[1:]:
                yield from _vocabulary_problem(key, stored.shape[0], step.shape[0])
            else:
                yield f"{key}: checkpoint {list(stored.shape)}, config says {list(expected)}"

    def _repeat_problems(self, repeat: Repeat) -> Iterator[str]:
        """Yield what is wrong with a tensor that is stored although it is another; padded rows do not count."""
        rows, columns = repeat.original.shape
        keys = [repeat.step.key, repeat.original.key]
        stored = [self.checkpoint.tensors.get(key) for key in keys]
        comparable = all(each is not None and each.shape[0] >= rows and each.shape[1:] == (columns,) for each in stored)
        if not comparable or not same_bits(*(self.checkpoint.read(key, (0, 0), (rows, columns)) for key in keys)):
            yield f"config.json says tie_word_embeddings, but {keys[0]} differs from {keys[1]}"


def _locate(checkpoint: McoreCheckpoint, step: Step) -> tuple[str, tuple[int, ...]] | None:
    """Return the stored key of a step and its index on the layer axis; None when it is not there.

    Layers are merged or have a key each, and a plain local spec has norms of other names.
    """
    for name in (step.name, LOCAL_NAMES.get(step.name, step.name)):
        if name in checkpoint.tensors:
            return name, step.index
        if step.layer is not None and (key := layer_key(name, step.layer)) in checkpoint.tensors:
            merged = step.key == step.name
            return key, step.index[1:] if merged else step.index
    return None


def _vocabulary_problem(key: str, rows: int, vocab_size: int) -> Iterator[str]:
    """Yield what is wrong with another number of vocabulary rows; more than needed are only told of."""
    if rows < vocab_size:
        yield f"{key}: {rows} vocabulary rows, config.json says vocab_size {vocab_size}"
    else:
        print(f"{key}: {rows} rows trimmed to the {vocab_size} of config.json vocab_size", file=sys.stderr, flush=True)
