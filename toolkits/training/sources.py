"""What a run starts from: the model's config, tokenizer and weights, and the two datasets that fit it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion.hf_checkpoint import is_hf_directory, read_config
from conversion.mcore_checkpoint import find_step, hf_folder, is_mcore_directory
from conversion.mcore_directory import require_model
from conversion.plan import REWARD_HEAD, Plan, plan_for
from conversion.reward_model import as_reward_model, require_words
from conversion.settings import is_reward_model, untrainable_reasons
from data_preprocessing.blend import Mix, Part, parse_blend, whole_weights
from data_preprocessing.dataset import Dataset, IndexedDataset, document_prefix, open_dataset
from data_preprocessing.tokenizer import tokenizer_fingerprint

from ..foundation.errors import CheckpointError, DataError, UsageError, raise_all
from .rows import Rows, Selection, make_rows, select
from .settings import DataSettings, ModelSettings

TRAINS_ON = {"preferences": "dpo", "labelled": "kto"}  # the word of `temper train` for a kind of dataset


@dataclass(frozen=True)
class ModelSource:
    """Where the model comes from.

    `hf_files` holds config.json and the tokenizer. The weights are a HuggingFace directory or a
    Megatron-core step folder; both None: random. `reward_config` is the config.json of a reward model that is trained,
    with or without the head of the weights.
    """

    hf_files: Path
    plan: Plan
    hf_weights: Path | None = None
    mcore_weights: Path | None = None
    reward_config: Mapping[str, Any] | None = None
    has_new_head: bool = False

    @property
    def pad_token(self) -> int | None:
        """The token with which a reward model's rows are padded; None also for other models."""
        return (self.reward_config or {}).get("pad_token_id")

    @property
    def left_alone(self) -> set[str]:
        """Keys that only the model or only the weights have, when the head is new."""
        return {REWARD_HEAD, "output_layer.weight"} if self.has_new_head else set()

    def reward_remarks(self, *, is_new: bool) -> list[str]:
        """Return what is worth saying of a reward model; `is_new`: the run begins."""
        if self.reward_config is None:
            return []
        last = "" if self.pad_token is None else f" that is not pad_token_id {self.pad_token}"
        said = [f"the score of a row is that of its last token{last}, as transformers reads it"]
        if self.pad_token is None:
            said.append("the tokenizer has no token to pad with: transformers will score one row at a time")
        if self.has_new_head and is_new:
            said.append("the weights have no reward head: a new one is drawn, its variance is 1 / (hidden size + 1)")
        return said

    @property
    def settings(self) -> Mapping[str, Any]:
        """Fields of megatron-core's config; see `conversion.settings.mcore_settings`."""
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
            paths = ", ".join(str(part.dataset.path) for part in rows.parts)
            raise DataError(
                f"{paths}: {len(rows)} rows of {rows.parts[0].row_tokens} tokens are fewer than one global batch of "
                f"{global_batch_size}; use a smaller GLOBAL_BATCH_SIZE or SEQ_LEN, or for conversations and pairs "
                "MP_SFT_PACKING=false"
            )


def find_model(model: ModelSettings, *, scores: bool = False) -> ModelSource:
    """Locate config, tokenizer and weights; raise CheckpointError or UsageError when the model cannot be trained.

    With `scores` it is trained as a reward model, which it may be already.
    """
    path, hf_weights, mcore_weights = Path(model.checkpoint), None, None
    if model.checkpoint == "none":
        assert model.hf_config is not None
        hf_files = _config_folder(model.hf_config)
    elif is_mcore_directory(path):
        hf_files, mcore_weights = hf_folder(path), find_step(path)
        require_model(mcore_weights)
    elif is_hf_directory(path):
        hf_files = hf_weights = path
    else:
        raise CheckpointError(
            f"no checkpoint at {path}. Pretrained weights were requested; refusing to train from random weights "
            "(say `none` for that)"
        )
    hf_config = read_config(hf_files)
    raise_all(UsageError, f"{hf_files} converts, but training it would not be exact", untrainable_reasons(hf_config))
    if not scores:
        require_words(hf_config, hf_files, instead="`temper train reward` trains it further")
        return ModelSource(hf_files, plan_for(hf_config), hf_weights, mcore_weights)
    config = as_reward_model(hf_config, hf_files)
    is_new = not (hf_weights or mcore_weights) or not is_reward_model(hf_config)
    return ModelSource(hf_files, plan_for(config), hf_weights, mcore_weights, config, is_new)


def _config_folder(path: Path) -> Path:
    return path.parent if path.name == "config.json" else path


def find_data(data: DataSettings, model: ModelSource) -> DataSource:
    """Open the datasets, hold them against the model, and make rows; raise DataError when they do not fit.

    Of a set that both trains and validates a part is held out.
    """
    training = parse_blend(data.data)
    validation = parse_blend(data.valid_data) if data.valid_data else training
    _require_once(training)
    _require_once(validation)
    chosen, held_out, remarks = [], [], []
    for part in training:
        selection, said = _select(part, data, model)
        remarks += said
        if any(same_set(part, other) for other in validation):
            kept, out = selection.hold_out(seed=data.seed)
            remarks.append(
                f"{selection.dataset.path}: {len(out):,} of {len(selection):,} {data.rows} are held out to validate"
            )
            selection = kept
            held_out.append(out)
        chosen.append(selection)
    for part in validation:
        if not any(same_set(part, other) for other in training):
            selection, said = _select(part, data, model)
            remarks += said
            held_out.append(selection)
    mixed = _rows(chosen, data, model, whole_weights(training))
    return DataSource(mixed, _rows(held_out, data, model, [1] * len(held_out)), remarks)


def same_set(one: Part, other: Part) -> bool:
    """Whether two parts are the same dataset, however their paths are spelled."""
    files = [Path(f"{document_prefix(part.path)}.bin") for part in (one, other)]
    return files[0] == files[1] or (all(file.exists() for file in files) and files[0].samefile(files[1]))


def _require_once(parts: Sequence[Part]) -> None:
    twice = [str(part.path) for at, part in enumerate(parts) if any(same_set(part, other) for other in parts[:at])]
    raise_all(UsageError, "a blend names each dataset once", [f"{path} stands there again" for path in twice])


def _select(part: Part, data: DataSettings, model: ModelSource) -> tuple[Selection, list[str]]:
    dataset = open_dataset(part.path)
    _require_kind(dataset, data)
    _require_tokenizer(dataset, model)
    _require_tokens(dataset, model)
    selection, remarks = select(dataset, data)
    return selection, _taken_remarks(dataset, data) + remarks + _position_remark(selection, data, model)


def _rows(chosen: Sequence[Selection], data: DataSettings, model: ModelSource, weights: Sequence[int]) -> Rows:
    parts = (replace(make_rows(selection, data), pad_token=model.pad_token) for selection in chosen)
    return Rows(tuple(parts), Mix(weights))


def _require_kind(dataset: Dataset, data: DataSettings) -> None:
    wanted = {"pairs": "preferences", "answers": "labelled"}.get(data.rows)
    if wanted is not None and dataset.kind != wanted:
        needed = {"pairs": "chosen and rejected answers", "answers": "an answer and its label"}[data.rows]
        raise DataError(
            f"{dataset.path} holds {dataset.kind}{_taken(dataset)}, and this objective reads {wanted}: build it from "
            f"rows with {needed}, or train on it with `temper train {TRAINS_ON.get(dataset.kind, 'sft')}`"
        )
    if wanted is not None:
        return
    if dataset.kind not in ("conversations", "text"):
        raise DataError(
            f"{dataset.path} holds {dataset.kind}, and this objective reads conversations or plain text; build it "
            "again from rows with an answer, and without chosen, rejected and label"
            + (f", or train on it with `temper train {TRAINS_ON[dataset.kind]}`" if dataset.kind in TRAINS_ON else "")
        )
    if dataset.kind == "text" and data.rows == "conversations":
        raise DataError(
            f"{dataset.path} holds plain text{_taken(dataset)}, and fine-tuning reads conversations; train on it with "
            "SFT=false (`temper train pretrain`)"
        )


def _require_tokenizer(dataset: Dataset, model: ModelSource) -> None:
    if dataset.tokenizer_fingerprint is None:
        return
    expected = tokenizer_fingerprint(model.hf_files)
    if dataset.tokenizer_fingerprint != expected:
        raise DataError(
            f"{dataset.path} was built with another tokenizer ({dataset.tokenizer_fingerprint[:12]}) than "
            f"{model.hf_files} has ({expected[:12]}); build it again with --tokenizer {model.hf_files}"
        )


def _require_tokens(dataset: Dataset, model: ModelSource) -> None:
    """Raise DataError for a token without an embedding row; rank 0 looks: it may have to read the whole file."""
    rows = model.settings["vocab_size"]
    if os.environ.get("RANK", "0") != "0" or not len(dataset) or np.iinfo(dataset.tokens(0).dtype).max < rows:
        return
    if dataset.max_token_id >= rows:
        row = next(row for row in range(len(dataset)) if dataset.tokens(row).max(initial=0) >= rows)
        raise DataError(
            f"{dataset.path}: row {row} has token id {dataset.tokens(row).max():,}, the embedding has {rows:,} rows; "
            "it was built with another model's tokenizer"
        )


def _taken(dataset: Dataset) -> str:
    return f" (no manifest; it was taken for {dataset.taken_for})" if dataset.taken_for else ""


def _taken_remarks(dataset: Dataset, data: DataSettings) -> list[str]:
    """Say what was taken for what: nobody should have to guess how a dataset was read."""
    remarks = [f"no manifest; taken for {dataset.taken_for}"] if dataset.taken_for else []
    if dataset.built_seq_len not in (None, data.seq_len):
        remarks.append(f"it was packed to {dataset.built_seq_len} tokens a row; rows of {data.seq_len} are made anew")
    if isinstance(dataset, IndexedDataset) and data.rows == "answers":
        remarks.append(_balance(dataset.labels()))
    if dataset.kind == "conversations" and data.rows == "documents":
        remarks.append("it holds conversations: every token of them is trained, the prompts too")
    return [f"{dataset.path}: {remark}" for remark in remarks]


def _balance(good: np.ndarray) -> str:
    """Say how many answers are good, and which weight gives good to other answers KTO's ratio of 1 to 4 / 3."""
    count, others = int(good.sum()), int((~good).sum())
    said = f"{count:,} answers are good, {others:,} are not"
    if not count or not others:
        return f"{said}: nothing tells the two apart but the reference"
    low, high = 3 * count / (4 * others), count / others
    if low <= 1 <= high:
        return said
    return f"{said}: with --undesirable-weight {low:.2g} to {high:.2g} both count as much"


def _position_remark(selection: Selection, data: DataSettings, model: ModelSource) -> list[str]:
    limit, longest = model.settings["max_position_embeddings"], min(data.seq_len, int(selection.lengths.max()))
    if longest <= limit:
        return []
    what = data.rows.removesuffix("s")
    return [f"{selection.dataset.path}: the longest {what} has {longest:,} tokens, the model was made for {limit:,}"]
