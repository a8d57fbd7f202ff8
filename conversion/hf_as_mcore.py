"""A HuggingFace directory seen as Megatron-core tensors; nothing is written and nothing held."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError, raise_all

from .accounting import account
from .filling import row_runs
from .hf_checkpoint import HfCheckpoint
from .layout import DTYPES, dtype_named, fuse, name_of, same_bits
from .plan import Plan, Step, plan_of_checkpoint


@dataclass(frozen=True)
class MergedTensor:
    """A Megatron-core tensor: `shape` with the merged axes, `[L, rows, columns]` or `[L, E, rows, columns]`."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class HfAsMcore:
    """The tensors that a Megatron-core directory made from `directory` would hold, read slice by slice.

    `tensors[key]` has `shape` and `dtype`; `dtype` casts every tensor on reading. Opening it accounts for
    every tensor: all that is missing, unexpected or of another shape comes in one CheckpointError. FP8 weights
    are refused unless `dequantize`.
    """

    def __init__(self, directory: Path, *, dtype: str | None = None, dequantize: bool = False) -> None:
        self.source = HfCheckpoint(directory, dequantize=dequantize)
        self.plan: Plan = plan_of_checkpoint(self.source.config, hf=self.source.tensors)
        shapes = {name: stored.shape for name, stored in self.source.tensors.items()}
        _drop_repeats(self.source, self.plan, shapes)
        account(self.plan, shapes, where=str(directory))
        _check_copies(self.source, self.plan)
        dtypes = _key_dtypes(self.source, self.plan, dtype_named(dtype))
        self.tensors = {key: MergedTensor(info.shape, dtypes[key]) for key, info in self.plan.tensors.items()}
        self._steps = {(step.key, step.index): step for step in self.plan.steps}
        self._num_leading = {step.key: len(step.lead) for step in self.plan.steps}

    def read(self, key: str, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Return the slice of `shape` that begins at `start`, both with the leading axes where the tensor has some.

        Only the rows that it is made of are touched. It may be a view of the file: copy it before changing it.
        """
        whole = self.tensors[key].shape
        assert len(start) == len(shape) == len(whole), (key, start, shape)
        assert all(at >= 0 and at + count <= size for at, count, size in zip(start, shape, whole, strict=True)), key
        lead = self._num_leading[key]
        indices = product(*(range(at, at + count) for at, count in zip(start[:lead], shape[:lead], strict=True)))
        slices = [self._rows(self._steps[key, index], start[lead:], shape[lead:]) for index in indices]
        return (slices[0] if len(slices) == 1 else torch.stack(slices)).reshape(tuple(shape))

    def slices(self, step: Step) -> Iterator[torch.Tensor]:
        """Yield a whole step, without leading axes, a run of rows at a time."""
        dtype = self.tensors[step.key].dtype
        parts = [self.source.read(part.name) for part in step.parts]
        for start, stop in row_runs(step.shape, dtype.itemsize):
            yield fuse(parts, step.blocks, start=start, stop=stop).to(dtype)

    def _rows(self, step: Step, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        columns = tuple(slice(at, at + count) for at, count in zip(start[1:], shape[1:], strict=True))
        parts = [self.source.read(part.name)[(slice(None), *columns)] for part in step.parts]
        return fuse(parts, step.blocks, start=start[0], stop=start[0] + shape[0]).to(self.tensors[step.key].dtype)


def _drop_repeats(source: HfCheckpoint, plan: Plan, shapes: dict[str, tuple[int, ...]]) -> None:
    """Leave out what a tied checkpoint carries although it is another of its tensors."""
    for repeat in plan.repeats:
        name, original = repeat.step.parts[0].name, repeat.original.parts[0].name
        if name not in shapes or original not in shapes:
            continue
        if not same_bits(source.read(name), source.read(original)):
            raise CheckpointError(
                f"{source.directory}: config.json says tie_word_embeddings, but {name} differs from {original}; "
                "set tie_word_embeddings to false, or remove the tensor that is not meant"
            )
        del shapes[name]


def _check_copies(source: HfCheckpoint, plan: Plan) -> None:
    originals = {name: step.parts[0].name for name, step in plan.copies.items()}
    raise_all(
        CheckpointError,
        f"{source.directory}: Megatron-core has one tensor where these have several that differ",
        [
            f"{name} is not {own}"
            for name, own in originals.items()
            if not same_bits(source.read(name), source.read(own))
        ],
    )


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
