"""A base and its adapters become one HuggingFace directory, streamed; or the adapters are taken out again."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from toolkits.foundation.errors import UsageError
from toolkits.foundation.publish import temporary_of

from .adapters import Adapter, linear_parts, require_blocks
from .filling import Span, row_runs
from .guards import explain_nonfinite, refuse_overlap
from .hf_as_mcore import HfAsMcore
from .hf_checkpoint import CONFIG_FILE, INDEX_FILE, copy_sidecar_files, safetensors_files
from .layout import dtype_named, is_finite, same_bits
from .mapped_file import MappedFolder
from .mcore_as_hf import McoreAsHf
from .mcore_checkpoint import is_mcore_directory
from .mcore_to_hf import say_dtype, write_index
from .older_spelling import add_older_spelling
from .options import Options
from .output import publish_output, state_of
from .plan import Plan, plan_for
from .quantized import BaseFormat, Format, Reference, quantized
from .report import Story, write_report
from .reward_model import as_reward_model, is_of_reward_model
from .safetensors_file import DTYPES as STORED
from .safetensors_file import StoredTensor
from .verify import describe_difference


def merge(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    dst: Path,
    *,
    unmerge: bool = False,
    quantized_base: Format | None = None,
    **choices: Any,
) -> Plan:
    """Write the HuggingFace directory `dst`: `base` plus each adapter times its weight; return the plan.

    `base` is a HuggingFace or a Megatron-core directory. Sums are made in fp32 and rounded once to the base's type,
    or to `--dtype`; so `unmerge`, which subtracts, gives the base back up to that rounding. With `quantized_base` the
    matrices of the layers are quantised and made numbers again first: what an adapter was trained on that a run with
    `--quantize` made. `choices` are `Options`.
    Raises CheckpointError, UsageError, DiskError or InterruptedRun; `dst` is then as it was.
    """
    base, dst, options = Path(base), Path(dst), Options(**choices)
    for source in (base, *(folder for folder, _ in adapters)):
        refuse_overlap(source, dst)
    if unmerge and quantized_base:
        raise UsageError("--unmerge takes an adapter out of what it was merged into: leave --quantized-base out")
    merged = Merged(base, adapters, options, sign=-1.0 if unmerge else 1.0, quantized_base=quantized_base)
    plan = merged.plan
    tensors = {name: (merged.dtype(name), step.parts[number].shape) for name, (step, number) in plan.hf_tensors.items()}
    files, index = safetensors_files(tensors, partial(_span, merged, MappedFolder(temporary_of(dst)), options))

    def finish(temporary: Path, hashes: dict[str, str]) -> None:
        write_index(temporary / INDEX_FILE, index)
        copy_sidecar_files(merged.hf_folder, temporary)
        if merged.gets_head:
            (temporary / CONFIG_FILE).write_text(json.dumps(merged.config, indent=2, ensure_ascii=False) + "\n")
        say_dtype(temporary / CONFIG_FILE, merged.config, (kind for kind, _ in tensors.values()))
        notes = [*add_older_spelling(temporary), *merged.notes]
        notes += [f"adapter {folder} x {weight:g}" for folder, weight in adapters]
        if options.verify:
            HfAsMcore(temporary)  # accounts for every tensor
        story = Story("unmerge" if unmerge else "merge", base, options.verify, cast=options.dtype, notes=notes)
        write_report(temporary, plan, story, hashes=hashes)

    sources = [*merged.files, *(file for adapter, _ in merged.adapters for file in adapter.files)]
    facts = {
        "source": str(base.resolve()),
        "files of the source": state_of(sources),
        "weights": [w for _, w in adapters],
        "--quantized-base": quantized_base,
    }
    publish_output(dst, files, options, facts=facts, label="merging", finish=finish)
    return plan


@dataclass(frozen=True)
class _Delta:
    """What an adapter adds to rows of a weight: scale * B A."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.scale * (self.b[start:stop].float() @ self.a.float())


class Merged:
    """The tensors of a base with adapters added, by HuggingFace name, a run of rows at a time.

    Opening it raises CheckpointError for an adapter that does not fit the base or was made for another.
    """

    def __init__(
        self,
        base: Path,
        adapters: Sequence[tuple[Path, float]],
        options: Options,
        *,
        sign: float = 1.0,
        quantized_base: Format | None = None,
    ) -> None:
        self._source: McoreAsHf | HfAsMcore
        if is_mcore_directory(base):
            self._source = McoreAsHf(base)
            self.config, self.hf_folder, self.files = (
                self._source.config,
                self._source.hf_folder,
                self._source.checkpoint.files,
            )
        else:
            self._source = HfAsMcore(base, dequantize=options.dequantize)
            self.config, self.hf_folder, self.files = self._source.source.config, base, self._source.source.files
        self.plan = self._source.plan
        if not self.plan.is_reward_model and any(is_of_reward_model(folder) for folder, _ in adapters):
            self.config = as_reward_model(self.config, self.hf_folder)
            self.plan = plan_for(self.config)
        self._cast, self._sign = dtype_named(options.dtype), sign
        self.adapters = [(Adapter(folder, self.plan), weight) for folder, weight in adapters]
        if sign < 0 and any(adapter.whole for adapter, _ in self.adapters):
            raise UsageError(
                "an adapter with modules that were trained whole cannot be taken out: what they were is gone"
            )
        for adapter, _ in self.adapters:
            adapter.require_base(base)
        self._quantized = _quantized_as(quantized_base, [adapter for adapter, _ in self.adapters], self.plan)
        self._linear = linear_parts(self.plan)

    @property
    def gets_head(self) -> bool:
        """Whether the base writes words, and an adapter makes a reward model of it."""
        return self.plan.is_reward_model and not self._source.plan.is_reward_model

    @property
    def notes(self) -> list[str]:
        """What is worth knowing of the base, for the report."""
        if self._quantized is not None:
            of = self._quantized
            return [f"the base's matrices were quantised to {of.format} from {of.dtype or 'their type'} and back"]
        return [
            f"{adapter.directory} was trained on the base quantised to {said.format}; its original is what this adds to"
            for adapter, _ in self.adapters
            if (said := adapter.base_format) is not None
        ]

    def dtype(self, name: str) -> torch.dtype:
        return self._cast or self._stored_dtype(name)

    def slices(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor from its first row to its last, summed in fp32 and rounded once."""
        module, dtype, start = name.removesuffix(".weight"), self.dtype(name), 0
        deltas = [
            _Delta(*adapter.matrices(module), scale=self._sign * weight * adapter.config.scale_of(module))
            for adapter, weight in self.adapters
            if module in adapter.modules
        ]
        wholes = [
            (adapter.whole_weight(module), weight) for adapter, weight in self.adapters if module in adapter.whole
        ]
        for rows in self._quantized_rows(name) if self._quantized and module in self._linear else self._base_rows(name):
            stop, own = start + len(rows), rows
            if deltas or wholes:
                own = rows.float()
                own = own + sum((weight * (whole[start:stop].float() - own) for whole, weight in wholes), 0.0)
                own = own + sum((delta.rows(start, stop) for delta in deltas), 0.0)
            yield own.to(dtype)
            start = stop

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own."""
        step, number = self.plan.hf_tensors[name]
        tensor, start = torch.empty(step.parts[number].shape, dtype=self.dtype(name)), 0
        for rows in self.slices(name):
            tensor[start : start + len(rows)] = rows
            start += len(rows)
        return tensor

    def _stored_dtype(self, name: str) -> torch.dtype:
        if name not in self._source.plan.hf_tensors:
            name = next(iter(self.plan.hf_tensors))  # an adapter's head gets the type of the embedding
        return self._source.dtype(name) if isinstance(self._source, McoreAsHf) else self._source.source.dtype(name)

    def _quantized_rows(self, name: str) -> Iterator[torch.Tensor]:
        """Yield what a run that quantises multiplies, a run of rows at a time; the codes are held whole."""
        said = self._quantized
        assert said is not None
        dtype = dtype_named(said.dtype or None) or self._stored_dtype(name)
        kernels = Reference(grid=said.device == "cpu")
        matrix = quantized(self._base_rows(name), said.format, kernels, dtype=dtype)  # type: ignore[arg-type]
        for start, stop in row_runs(self._linear[name.removesuffix(".weight")].shape, dtype.itemsize):
            yield matrix.rows(start, stop, dtype)

    def _base_rows(self, name: str) -> Iterator[torch.Tensor]:
        if name not in self._source.plan.hf_tensors:
            step, number = self.plan.hf_tensors[name]
            yield torch.zeros(step.parts[number].shape, dtype=self._stored_dtype(name))
            return
        if isinstance(self._source, McoreAsHf):
            yield from self._source.slices(name)
            return
        tensor = self._source.source.read(name)
        for start, stop in row_runs(tuple(tensor.shape), tensor.dtype.itemsize):
            yield tensor[start:stop]


def _quantized_as(said: Format | None, adapters: Sequence[Adapter], plan: Plan) -> BaseFormat | None:
    """Return what the base is quantised to: the format that was asked for, as the adapters' runs made it.

    Of an adapter that does not say it, from the type that the base is stored in, and with the kernels of a GPU.
    """
    if said is None:
        return None
    known = {found for adapter in adapters if (found := adapter.base_format) is not None}
    if any(found.format != said for found in known) or len(known) > 1:
        made = "; ".join(f"{each.directory}: {each.base_format}" for each in adapters if each.base_format)
        raise UsageError(f"--quantized-base {said} is not what every adapter was trained on ({made})")
    if said == "nf4":
        require_blocks(plan)
    return known.pop() if known else BaseFormat(said, "", "")


def _span(merged: Merged, files: MappedFolder, options: Options, name: str, place: StoredTensor) -> Span:
    slices = merged.slices if options.allow_nonfinite else partial(_finite, merged)
    num_bytes = torch.Size(place.shape).numel() * STORED[place.dtype].itemsize
    check = partial(_check, merged, files, name, place) if options.verify else None
    return Span(name, place.start, num_bytes, partial(slices, name), check)


def _finite(merged: Merged, name: str) -> Iterator[torch.Tensor]:
    for rows in merged.slices(name):
        if not is_finite(rows):
            explain_nonfinite(name, rows, rows.dtype)
        yield rows


def _check(merged: Merged, files: MappedFolder, name: str, place: StoredTensor) -> list[str]:
    """Return what of a tensor, read where it was written, is not what its sources make again."""
    written = files.file(place.file).tensor(STORED[place.dtype], place.shape, place.start)
    start = 0
    for rows in merged.slices(name):
        if not same_bits(rows, written[start : start + len(rows)]):
            return [f"{name}: {describe_difference(rows, written[start : start + len(rows)])}"]
        start += len(rows)
    return []
