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

from data_preprocessing.blend import Mix
from data_preprocessing.dataset import Dataset, dataset_fingerprint

from ..foundation.errors import DataError, InterruptedRun
from ..foundation.progress import Progress
from ..foundation.publish import write_bytes
from ..launch.rank import stop_requested
from .adapters import adapters_off
from .batches import Batches, MicroBatch
from .config import TrainConfig
from .mismatched import Mismatched
from .parallel.context import share_of
from .parallel.sequences import is_first_share, log_probs
from .parallel.world import context_rank, gather, rank, speaks_for_its_tokens, sum_over_ranks
from .reporter import Reporter
from .rows import Rows, SetRows
from .run_folder import digest_of, reference_fingerprint
from .schedule import Pass
from .sources import DataSource, ModelSource
from .time_limit import is_out_of_time

KEY = "log_probs"
KEPT_EVERY = 64  # global batches after which what is known is written down


def told(losses: torch.Tensor, *, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """In the place of a loss: return no loss, no count, and the numbers and log-probabilities of the answers."""
    assert batch.answers is not None
    sums, _ = log_probs(losses, batch)
    nothing = losses.new_zeros(())
    return nothing, nothing.int(), {"numbers": batch.answers.numbers, KEY: sums.detach()}


def ask_base(work: Pass, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return the micro batches with what the model without its adapters says of their answers."""
    with adapters_off(work.chunks):
        asked = _asked(work, batches)
        others = [batch.others for batch in batches if batch.others is not None]
        if not others:
            return asked
        return [replace(batch, others=each) for batch, each in zip(asked, _asked(work, others), strict=True)]


def with_baseline(work: Pass, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return the micro batches with how much more probable answers to other prompts are than under the reference.

    That is the mean of the logarithm over the global batch, at least 0 (Ethayarajh et al., 2024, section 4.1).
    """
    others = [batch.others for batch in batches if batch.others is not None]
    total = count = 0.0
    for batch, sums in zip(others, _scores(work, others), strict=False):
        if speaks_for_its_tokens() and is_first_share():
            assert batch.answers is not None
            total += float((sums - batch.answers.reference.to(sums.device)).sum())
            count += len(sums)
    total, count = sum_over_ranks([total, count])
    baseline = torch.tensor(max(0.0, total / max(count, 1.0)), dtype=torch.float32)
    return [
        replace(batch, answers=batch.answers and replace(batch.answers, baseline=baseline.to(batch.tokens.device)))
        for batch in batches
    ]


def _asked(work: Pass, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return the micro batches with the model as their reference; a stage without the output needs none."""
    scores = _scores(work, batches)
    if not scores:
        return list(batches)
    return [
        replace(batch, answers=batch.answers and replace(batch.answers, reference=sums))
        for batch, sums in zip(batches, scores, strict=True)
    ]


def _scores(work: Pass, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """Return the log-probabilities of each micro batch's answers, fp32 [n]; nothing on a stage without the output."""
    with work.evaluating():
        return [result[KEY] for result in work.run(told, batches, forward_only=True)]


class Cache:
    """The reference's numbers of one dataset, in a file beside it; only rank 0 has one.

    Its name and its header say which model and which data it is of. NaN stands where nobody has asked yet.
    """

    def __init__(self, dataset: Dataset | Mismatched, model: str, *, elsewhere: Path) -> None:
        path = dataset.path
        self.facts = {"model": model, "data": dataset_fingerprint(path)}
        if isinstance(dataset, Mismatched):
            self.facts["answers"] = dataset.digest
        beside = path.with_name(f"{path.name}.reference-{digest_of(self.facts)}.safetensors")
        is_there = beside.exists() or os.access(path.parent, os.W_OK)
        self.path = beside if is_there else elsewhere / beside.name

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
        """Write the numbers in one step, with those that another run has added meanwhile."""
        from safetensors.numpy import save

        values = np.where(np.isnan(values), self.read(len(values)), values)
        if not os.access(self.path.parent, os.W_OK):
            return  # of a set that is only read, a part was known
        write_bytes(self.path, save({KEY: values}, self.facts))


class Referee:
    """Gives rows the reference's numbers: those that are cached, and the others when the model is there."""

    def __init__(self, data: DataSource, config: TrainConfig, source: ModelSource, reporter: Reporter) -> None:
        self._data, self._config, self._reporter = data, config, reporter
        self._parts = [
            each
            for rows in (data.training, data.validation)
            for part in rows.parts
            for each in (part, part.others)
            if each is not None
        ]
        self._caches: dict[str, Cache] = {}
        if rank() == 0:
            model = reference_fingerprint(config, source)
            for part in self._parts:
                self._caches[_key(part)] = Cache(part.dataset, model, elsewhere=config.output.folder)
        sizes = {_key(part): len(part.dataset) for part in self._parts}
        known = {key: cache.read(sizes[key]) for key, cache in self._caches.items()}
        self._values: dict[str, np.ndarray] = gather(known)[0]

    @property
    def is_complete(self) -> bool:
        """Whether nothing has to be computed."""
        return not any(self._missing(part) for part in self._parts)

    def data(self, work: Pass, replica: int) -> DataSource:
        """Return the data with the reference; `work` runs the model that training starts from, on all ranks."""
        missing = [(part, rows) for part in self._parts if (rows := self._missing(part))]
        for part, rows in missing:
            self._compute(part, rows, work, replica)
        for key in dict.fromkeys(_key(part) for part, _ in missing if self._caches):
            self._reporter.say(f"log-probabilities of the reference: {self._caches[key].path}")
        training, validation = (
            replace(rows, parts=tuple(self._told(part) for part in rows.parts))
            for rows in (self._data.training, self._data.validation)
        )
        return replace(self._data, training=training, validation=validation)

    def _told(self, part: SetRows) -> SetRows:
        return replace(part, reference=self._values[_key(part)], others=part.others and self._told(part.others))

    def _missing(self, part: SetRows) -> list[int]:
        """Return the rows with an answer that the reference was not asked about."""
        unknown = np.isnan(self._values[_key(part)][part.documents])
        if not unknown.any():
            return []
        rows = np.searchsorted(part.borders, part.ends[unknown], side="left") - 1
        return np.unique(rows).tolist()  # type: ignore[no-any-return]

    def _compute(self, part: SetRows, rows: list[int], work: Pass, replica: int) -> None:
        batch, seed = self._config.batch, self._config.data.seed
        alone = Rows((replace(part, others=None),), Mix([1]))
        found: list[tuple[np.ndarray, np.ndarray]] = []
        batches, size = Batches(alone, batch, work.layout, replica=replica, seed=seed), batch.global_batch_size
        with work.evaluating(), self._progress(len(rows)) as progress:
            for start in range(0, len(rows), size):
                numbers = [*rows[start : start + size], *[None] * max(0, start + size - len(rows))]
                mine = (
                    share_of(each, rank=context_rank(), size=work.layout.context)
                    for each in batches.micro_batches(numbers)
                )
                results = work.run(told, mine, forward_only=True)
                if speaks_for_its_tokens() and is_first_share():
                    found += [(each["numbers"].cpu().numpy(), each[KEY].cpu().numpy()) for each in results]
                if progress is not None:
                    progress.advance(min(size, len(rows) - start))
                asked = stop_requested() or is_out_of_time(self._config.output)
                stopped = bool(sum_over_ranks([float(asked)])[0])
                if stopped or start // size % KEPT_EVERY == KEPT_EVERY - 1 or start + size >= len(rows):
                    self._keep(_key(part), found)
                    found = []
                if stopped:
                    raise InterruptedRun("stopped while the reference was computed; the same line goes on with it")

    def _keep(self, key: str, found: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Let all ranks know what each has found, and write it down."""
        for documents, values in (each for of_rank in gather(found) for each in of_rank):
            self._values[key][documents] = values
        if key in self._caches:
            self._caches[key].write(self._values[key])

    def _progress(self, rows: int) -> contextlib.AbstractContextManager[Progress | None]:
        return Progress("reference", rows, unit="rows") if rank() == 0 else contextlib.nullcontext()


def _key(part: SetRows) -> str:
    """Name the documents of a part: two parts of one dataset share what is known of them."""
    dataset = part.dataset
    return f"{dataset.path} {dataset.digest if isinstance(dataset, Mismatched) else ''}"
