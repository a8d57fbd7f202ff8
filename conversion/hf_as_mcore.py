"""A HuggingFace directory seen as Megatron-core tensors; nothing is written and nothing held."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError, raise_all

from .accounting import account
from .hf_checkpoint import HfCheckpoint
from .layout import DTYPES, dtype_named, fuse, name_of, same_bits
from .plan import Plan, Step, plan_for


@dataclass(frozen=True)
class MergedTensor:
    """A Megatron-core tensor: `shape` with the merged layer axis, `[L, rows, columns]`."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class HfAsMcore:
    """The tensors that a Megatron-core directory made from `directory` would hold, read slice by slice.

    `tensors[key]` has `shape` and `dtype`; `dtype` casts every tensor on reading. Opening it accounts for
    every tensor: all that is missing, unexpected or of another shape comes in one CheckpointError.
    """

    def __init__(self, directory: Path, *, dtype: str | None = None) -> None:
        self.source = HfCheckpoint(directory)
        self.plan: Plan = plan_for(self.source.config)
        shapes = {name: stored.shape for name, stored in self.source.tensors.items()}
        if self.plan.tied:
            _drop_tied_head(self.source, shapes)
        account(self.plan, shapes, where=str(directory))
        dtypes = _key_dtypes(self.source, self.plan, dtype_named(dtype))
        self.tensors = {key: MergedTensor(info.shape, dtypes[key]) for key, info in self.plan.tensors.items()}
        self._steps = {(step.key, step.layer): step for step in self.plan.steps}

    def read(self, key: str, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Return the slice of `shape` that begins at `start`, both with the layer axis where the tensor has one.

        Only the rows that it is made of are touched. It may be a view of the file: copy it before changing it.
        """
        whole = self.tensors[key].shape
        assert len(start) == len(shape) == len(whole), (key, start, shape)
        assert all(at >= 0 and at + count <= size for at, count, size in zip(start, shape, whole, strict=True)), key
        if (key, None) in self._steps:
            return self._rows(self._steps[key, None], start, shape)
        layers = range(start[0], start[0] + shape[0])
        slices = [self._rows(self._steps[key, layer], start[1:], shape[1:]) for layer in layers]
        return slices[0].unsqueeze(0) if len(slices) == 1 else torch.stack(slices)

    def step(self, step: Step) -> torch.Tensor:
        """Return a whole step, without a layer axis."""
        return self._rows(step, (0,) * len(step.shape), step.shape)

    def _rows(self, step: Step, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        columns = tuple(slice(at, at + count) for at, count in zip(start[1:], shape[1:], strict=True))
        parts = [self.source.read(part.name)[(slice(None), *columns)] for part in step.parts]
        return fuse(parts, step.blocks, start=start[0], stop=start[0] + shape[0]).to(self.tensors[step.key].dtype)


def _drop_tied_head(source: HfCheckpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """Leave out an output layer that a tied checkpoint carries although it is the embedding."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head not in shapes or embedding not in shapes:
        return
    if not same_bits(source.read(head), source.read(embedding)):
        raise CheckpointError(
            f"{source.directory}: config.json says tie_word_embeddings, but {head} differs from {embedding}; "
            "set tie_word_embeddings to false, or remove the tensor that is not meant"
        )
    del shapes[head]


def _key_dtypes(source: HfCheckpoint, plan: Plan, cast: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the type of each Megatron-core tensor; its layers and parts have to agree unless all are cast."""
    found: dict[str, dict[torch.dtype, str]] = {}
    problems = []
    for name, (step, _) in plan.hf_tensors.items():
        try:
            found.setdefault(step.key, {}).setdefault(source.dtype(name), name)
        except CheckpointError as error:
            problems.append(str(error))
    for key, kinds in found.items():
        if cast is None and len(kinds) > 1:
            said = ", ".join(f"{name} is {name_of(kind)}" for kind, name in kinds.items())
            problems.append(f"{key} would mix types ({said}); choose one with --dtype {'|'.join(DTYPES)}")
    raise_all(CheckpointError, f"{source.directory}: types that cannot be converted", problems)
    return {key: cast or next(iter(kinds)) for key, kinds in found.items()}
