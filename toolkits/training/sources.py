"""What a run starts from: the model's config, tokenizer and weights, and the two datasets that fit it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.hf_checkpoint import is_hf_directory, read_config
from conversion.mcore_checkpoint import find_step, hf_folder, is_mcore_directory
from conversion.plan import Plan, plan_for, untrainable_reasons
from data_preprocessing.chat import tokenizer_fingerprint
from data_preprocessing.dataset import Dataset, document_prefix, open_dataset

from ..foundation.errors import CheckpointError, DataError, UsageError, raise_all
from .batches import Rows, Sample, fitting_samples, hold_out, make_rows
from .config import DataSettings, ModelSettings


@dataclass(frozen=True)
class ModelSource:
    """Where the model comes from.

    `hf_files` holds config.json and the tokenizer. The weights are a HuggingFace directory or a
    Megatron-core step folder; both None: random.
    """

    hf_files: Path
    plan: Plan
    hf_weights: Path | None = None
    mcore_weights: Path | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Fields of megatron-core's config; see `conversion.plan.mcore_settings`."""
        return self.plan.settings


@dataclass(frozen=True)
class DataSource:
    """Rows to train on, rows to validate on, and what is worth saying about them."""

    training: Rows
    validation: Rows
    remarks: list[str]

    def require_one_step(self, global_batch_size: int) -> None:
        """Raise DataError when the training rows do not fill one global batch."""
        rows = self.training
        if len(rows) < global_batch_size:
            raise DataError(
                f"{rows.dataset.path}: {len(rows)} rows of {rows.seq_len} tokens are fewer than one global batch of "
                f"{global_batch_size}; use a smaller GLOBAL_BATCH_SIZE or SEQ_LEN, or MP_SFT_PACKING=false"
            )


def find_model(model: ModelSettings) -> ModelSource:
    """Locate config, tokenizer and weights; raise CheckpointError or UsageError when the model cannot be trained."""
    path = Path(model.checkpoint)
    if model.checkpoint == "none":
        assert model.hf_config is not None
        hf_files, weights = _config_folder(model.hf_config), {}
    elif is_mcore_directory(path):
        hf_files, weights = hf_folder(path), {"mcore_weights": find_step(path)}
    elif is_hf_directory(path):
        hf_files, weights = path, {"hf_weights": path}
    else:
        raise CheckpointError(
            f"no checkpoint at {path}. Pretrained weights were requested; refusing to train from random weights "
            "(say `none` for that)"
        )
    hf_config = read_config(hf_files)
    raise_all(UsageError, f"{hf_files} converts, but training it would not be exact", untrainable_reasons(hf_config))
    return ModelSource(hf_files, plan_for(hf_config), **weights)


def _config_folder(path: Path) -> Path:
    return path.parent if path.name == "config.json" else path


def find_data(data: DataSettings, model: ModelSource) -> DataSource:
    """Open the datasets, hold them against the model, and make rows; raise DataError when they do not fit."""
    dataset = _open(data.data, model)
    samples, remarks = fitting_samples(dataset, data)
    remarks = _seq_len_remark(dataset, data) + remarks + _position_remark(dataset, samples, model)
    if validates_on_training_data(data):
        count = len(samples)
        samples, held_out = hold_out(samples, seed=data.seed)
        remarks.append(f"{dataset.path}: {len(held_out):,} of {count:,} conversations are held out to validate")
        validation = make_rows(dataset, held_out, data)
    else:
        valid_set = _open(data.valid_data or data.data, model)
        valid_samples, said = fitting_samples(valid_set, data)
        remarks += said
        validation = make_rows(valid_set, valid_samples, data)
    return DataSource(make_rows(dataset, samples, data), validation, remarks)


def validates_on_training_data(data: DataSettings) -> bool:
    """Whether both prefixes are the same dataset, however they are spelled: a part is held out then."""
    if data.valid_data is None:
        return True
    files = [Path(f"{document_prefix(path)}.bin") for path in (data.data, data.valid_data)]
    return files[0] == files[1] or (all(file.exists() for file in files) and files[0].samefile(files[1]))


def _position_remark(dataset: Dataset, samples: list[Sample], model: ModelSource) -> list[str]:
    limit, longest = model.settings["max_position_embeddings"], max(sample.length for sample in samples)
    if longest <= limit:
        return []
    return [f"{dataset.path}: the longest conversation has {longest:,} tokens, the model was made for {limit:,}"]


def _open(path: Path, model: ModelSource) -> Dataset:
    dataset = open_dataset(path)
    rows = model.settings["vocab_size"]
    if dataset.max_token_id is not None and dataset.max_token_id >= rows:
        raise DataError(f"{dataset.path}: it has token id {dataset.max_token_id:,}, the embedding has {rows:,} rows")
    if dataset.tokenizer_fingerprint is not None:
        expected = tokenizer_fingerprint(model.hf_files)
        if dataset.tokenizer_fingerprint != expected:
            raise DataError(
                f"{dataset.path} was built with another tokenizer ({dataset.tokenizer_fingerprint[:12]}) than "
                f"{model.hf_files} has ({expected[:12]}); build it again with --tokenizer {model.hf_files}"
            )
    return dataset


def _seq_len_remark(dataset: Dataset, data: DataSettings) -> list[str]:
    built = dataset.built_seq_len
    if built is None or built == data.seq_len:
        return []
    return [
        f"{dataset.path}: it was packed to {built} tokens a row; its conversations are packed anew to {data.seq_len}"
    ]
