"""What the reference thinks of the answers: the log-probability of each answer's trained tokens.

The reference is the model that training starts from. Its numbers are computed once, by the ranks that will train,
and kept beside the dataset; or, when adapters are trained, at every step by the same model without them.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from data_preprocessing.blend import Mix

from ..foundation.errors import DataError, InterruptedRun
from ..foundation.progress import Progress
from ..launch.rank import stop_requested
from .adapters import adapters_off
from .batches import Batches, MicroBatch
from .config import TrainConfig
from .layout import Layout
from .parallel.context import share_of
from .parallel.sequences import is_first_share, log_probs
from .parallel.world import context_rank, gather, rank, speaks_for_its_tokens, sum_over_ranks
from .reporter import Reporter
from .rows import Rows, SetRows
from .run_folder import dataset_fingerprint, digest_of, reference_fingerprint
from .schedule import Pass
from .sources import DataSource, ModelSource

KEY = "log_probs"


class Scores:
    """In the place of a loss: what is told of a micro batch are its answers' numbers and log-probabilities."""

    def __call__(self, losses: torch.Tensor, *, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return no loss, no count, and the answers."""
        assert batch.answers is not None
        sums, _ = log_probs(losses, batch)
        nothing = losses.new_zeros(())
        return nothing, nothing.int(), {"numbers": batch.answers.numbers, KEY: sums.detach()}


def ask_base(work: Pass, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return the micro batches with what the model without its adapters says of their answers."""
    # Dropout is in the adapters alone, so the modules need not be told.
    with adapters_off(work.chunks), torch.no_grad():
        results = work.run(Scores(), batches, forward_only=True)
    if not results:  # a pipeline stage without the output has no loss either
        return list(batches)
    asked = []
    for batch, result in zip(batches, results, strict=True):
        assert batch.answers is not None
        asked.append(replace(batch, answers=replace(batch.answers, reference=result[KEY])))
    return asked


class Cache:
    """The reference's numbers of one dataset, in a file beside it; only rank 0 has one.

    Its name and its header say which model and which data it is of. NaN stands where nobody has asked yet.
    """

    def __init__(self, dataset: Path, model: str, *, elsewhere: Path) -> None:
        self.facts = {"model": model, "data": dataset_fingerprint(dataset)}
        name = f"{dataset.name}.reference-{digest_of(self.facts)}.safetensors"
        writable = os.access(dataset.parent, os.W_OK)
        self.path = (dataset.parent if writable else elsewhere) / name

    def read(self, documents: int) -> np.ndarray:
        """Return the numbers, fp32 [documents]; raise DataError for a file that is not what its name says."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return np.full(documents, np.nan, np.float32)
        try:
            with safe_open(self.path, "numpy") as file:
                said, values = file.metadata(), file.get_tensor(KEY)
        except SafetensorError as error:
            raise DataError(f"{self.path} is damaged ({error}); delete it, and it is computed again") from None
        if said != self.facts or values.shape != (documents,) or values.dtype != np.float32:
            raise DataError(f"{self.path} holds the reference of another model or of other data; delete it")
        return values

    def write(self, values: np.ndarray) -> None:
        """Write the numbers in one step."""
        from safetensors.numpy import save

        temporary = self.path.with_name(f".tmp-{os.getpid()}-{self.path.name}")
        temporary.write_bytes(save({KEY: values}, self.facts))
        os.replace(temporary, self.path)


class Referee:
    """Gives rows the reference's numbers: those that are cached, and the others when the model is there."""

    def __init__(self, data: DataSource, config: TrainConfig, source: ModelSource, reporter: Reporter) -> None:
        self._data, self._config, self._reporter = data, config, reporter
        parts = [*data.training.parts, *data.validation.parts]
        self._caches: dict[Path, Cache] = {}
        if rank() == 0:
            model = reference_fingerprint(config, source)
            folder = config.output.folder
            self._caches = {part.dataset.path: Cache(part.dataset.path, model, elsewhere=folder) for part in parts}
        sizes = {part.dataset.path: len(part.dataset) for part in parts}
        known = {path: cache.read(sizes[path]) for path, cache in self._caches.items()}
        self._values: dict[Path, np.ndarray] = gather(known)[0]

    @property
    def is_complete(self) -> bool:
        """Whether nothing has to be computed."""
        return not any(self._missing(part) for part in self._parts)

    @property
    def _parts(self) -> tuple[SetRows, ...]:
        return (*self._data.training.parts, *self._data.validation.parts)

    def data(self, chunks: Sequence[DistributedDataParallel], layout: Layout, replica: int) -> DataSource:
        """Return the data with the reference; `chunks` are the model that training starts from, on all ranks."""
        missing = {number: rows for number, part in enumerate(self._parts) if (rows := self._missing(part))}
        for number, rows in missing.items():
            self._compute(self._parts[number], rows, Pass(chunks, layout, 0), replica)
        if missing:
            for path, cache in self._caches.items():
                self._reporter.say(f"the reference of {path}: {cache.path}")
        told = [
            replace(rows, parts=tuple(replace(part, reference=self._values[part.dataset.path]) for part in rows.parts))
            for rows in (self._data.training, self._data.validation)
        ]
        return replace(self._data, training=told[0], validation=told[1])

    def _missing(self, part: SetRows) -> list[int]:
        """Return the rows with an answer that the reference was not asked about."""
        unknown = np.isnan(self._values[part.dataset.path][part.documents])
        if not unknown.any():
            return []
        rows = np.searchsorted(part.borders, part.ends[unknown], side="left") - 1
        return np.unique(rows).tolist()  # type: ignore[no-any-return]

    def _compute(self, part: SetRows, rows: list[int], work: Pass, replica: int) -> None:
        path, size = part.dataset.path, self._config.batch.global_batch_size
        batches = Batches(
            Rows((part,), Mix([1])), self._config.batch, work.layout, replica=replica, seed=self._config.data.seed
        )
        work = replace(work, tokens=self._config.batch.micro_batch_size * batches.row_length)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        stopped = False
        with work.evaluating(), self._progress(len(rows)) as progress:
            for start in range(0, len(rows), size):
                numbers = [*rows[start : start + size], *[None] * max(0, start + size - len(rows))]
                mine = (
                    share_of(batch, rank=context_rank(), size=work.layout.context)
                    for batch in batches.micro_batches(numbers)
                )
                results = work.run(Scores(), mine, forward_only=True)
                if speaks_for_its_tokens() and is_first_share():
                    found += [(each["numbers"].cpu().numpy(), each[KEY].cpu().numpy()) for each in results]
                if progress is not None:
                    progress.advance(min(size, len(rows) - start))
                if stopped := bool(sum_over_ranks([float(stop_requested())])[0]):
                    break
        for documents, values in (each for told in gather(found) for each in told):
            self._values[path][documents] = values
        if path in self._caches:
            self._caches[path].write(self._values[path])
        if stopped:
            raise InterruptedRun("stopped while the reference was computed; the same line goes on with it")

    def _progress(self, rows: int) -> contextlib.AbstractContextManager[Progress | None]:
        return Progress("reference", rows, unit="rows") if rank() == 0 else contextlib.nullcontext()
