"""One output folder, one run: who may write into it, whether it is the same run, and where it goes on.

checkpoint/NAME/fingerprint.json   what makes two starts the same run
                hf/                config and tokenizer, for an export
                iter_NNNNNNN/      the steps
                metrics.jsonl      the figures of every step      loss.png
                run.json           what it does now               lineage.json    what it was made of
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conversion.digest import weights_digest
from conversion.generation_config import stop_at
from conversion.hf_checkpoint import CONFIG_FILE, copy_sidecar_files
from conversion.mcore_directory import step_folders
from data_preprocessing.blend import parse_blend, whole_weights
from data_preprocessing.dataset import dataset_fingerprint, open_dataset
from data_preprocessing.tokenizer import tokenizer_fingerprint

from ..foundation.errors import UsageError
from ..foundation.lock import locked
from ..foundation.publish import publish_directory, remove_unfinished, write_text
from .config import TrainConfig
from .ending import end_token
from .settings import LoraSettings
from .sources import ModelSource

FINGERPRINT = "fingerprint.json"
OF_SOME = ("adapter", "beta", "preference", "kto", "reward")  # what not every run has
OF_DATA = ("data", "validation data", "rows", "seq_len", "packing", "too_long")  # what --data-restart lets change


def fingerprint(config: TrainConfig, source: ModelSource) -> dict[str, Any]:
    """Return what a run is: `same` has to be equal for a start to go on with it, `schedule` may change."""
    data = config.data
    valid = data.valid_data or data.data
    return {
        "same": {
            "model": _digest((source.hf_files / "config.json").read_bytes()),
            "base checkpoint": _weights_fingerprint(source, data.seed),
            "tokenizer": tokenizer_fingerprint(source.hf_files)[:16],
            "data": _blend_fingerprint(data.data),
            "validation data": _blend_fingerprint(valid),
            "rows": data.rows,
            "seq_len": data.seq_len,
            "packing": data.packing,
            "too_long": data.too_long,
            "seed": data.seed,
            **({"adapter": adapter_fingerprint(config.lora)} if config.lora.is_used else {}),
            **_of_objective(config, source),
        },
        "schedule": {
            **asdict(config.optimizer),
            "train_iters": config.batch.train_iters,
            "epochs": config.batch.epochs,
            "global_batch_size": config.batch.global_batch_size,
        },
    }


def _of_objective(config: TrainConfig, source: ModelSource) -> dict[str, Any]:
    """Return what is learned of answers; when to stop may change."""
    if source.reward_config is not None:
        return {"reward": asdict(config.reward)}
    if config.data.rows not in ("pairs", "answers"):
        return {}
    learned = {name: value for name, value in asdict(config.preference).items() if name != "stop_separated"}
    return {"beta": config.reference.beta, "preference": learned, "kto": asdict(config.kto)}


def adapter_fingerprint(lora: LoraSettings) -> dict[str, Any]:
    """Return what makes two runs train the same adapters."""
    said = {name: value for name, value in asdict(lora).items() if name not in ("adapter", "lora_plus")}
    if lora.adapter is not None:
        said["from"] = weights_digest(lora.adapter)
    return said


def reference_fingerprint(config: TrainConfig, source: ModelSource) -> str:
    """Return what makes the model that training starts from give the same log-probabilities."""
    lora = config.lora
    return digest_of(
        {
            "model": _digest((source.hf_files / "config.json").read_bytes()),
            "base checkpoint": _weights_fingerprint(source, config.data.seed),
            **({} if source.hf_weights or source.mcore_weights else {"layout": asdict(config.layout)}),  # random
            "precision": config.compute.precision,
            "quantize": lora.quantize,
            "adapter": lora.adapter and adapter_fingerprint(lora),
        }
    )


def data_digest(folder: Path) -> str:
    """Return a digest of what the rows of the run in `folder` are made of; the folder is claimed."""
    same = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))["same"]
    return digest_of([same[name] for name in OF_DATA])


@contextlib.contextmanager
def claimed(folder: Path, config: TrainConfig, source: ModelSource) -> Iterator[list[str]]:
    """Hold `folder` for this run while the block runs; yield what is worth saying about going on in it.

    Only rank 0 calls it. Raises UsageError when another process holds the folder, when it belongs to
    another run, or when it is used and the run must not be resumed.
    """
    with locked(folder.with_name(f".lock-{folder.name}"), what=str(folder)):
        now = fingerprint(config, source)
        remarks = _compare(folder, now, config)
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        if not step_folders(folder):
            with publish_directory(folder / "hf", overwrite=True) as temporary:
                copy_sidecar_files(source.hf_files, temporary)
                if source.reward_config is None:
                    remarks += _stop_where_trained(temporary, config.data.data)
                else:
                    config_text = json.dumps(source.reward_config, indent=2, ensure_ascii=False)
                    write_text(temporary / CONFIG_FILE, config_text + "\n")
        write_text(folder / FINGERPRINT, json.dumps(now, indent=1))
        yield remarks


def _stop_where_trained(hf_files: Path, data: str) -> list[str]:
    """Let the tuned model stop at the tokens that its training ends answers with; return what that changes."""
    ends = [end_token(open_dataset(part.path)) for part in parse_blend(data)]
    before = {end: stop_at(hf_files, end) for end in dict.fromkeys(ends) if end is not None}
    return [
        f"answers in the data end with token {end}: generation_config.json gets it "
        + (f"beside {known}" if known else "as its only one")
        for end, known in before.items()
        if known is not None
    ]


def _compare(folder: Path, now: Mapping[str, Any], config: TrainConfig) -> list[str]:
    if not step_folders(folder):
        return []
    if not config.output.resume:
        raise UsageError(f"{folder} holds a run already and --no-resume was said (RESUME=never); choose another folder")
    try:
        then = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{folder} holds steps but no {FINGERPRINT}: it was not made by this line") from None
    different = _differences(then["same"], now["same"], leave_out=OF_DATA if config.output.data_restart else ())
    if different:
        table = "\n".join(f"  {name}: {old} -> {new}" for name, old, new in different)
        raise UsageError(
            f"{folder} belongs to another run:\n{table}\nchoose another OUTPUT_BASEPATH, or go on with what the run had"
            " (--data-restart lets data, seq_len and packing change and reads the data from its beginning)"
        )
    return [f"{name} changes from {old} to {new}" for name, old, new in _differences(then["schedule"], now["schedule"])]


def _differences(
    then: Mapping[str, Any], now: Mapping[str, Any], *, leave_out: tuple[str, ...] = ()
) -> list[tuple[str, Any, Any]]:
    names = [name for name in {**now, **then} if name not in leave_out and (name in now or name in OF_SOME)]
    return [(name, then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)]


def _weights_fingerprint(source: ModelSource, seed: int) -> str:
    folder = source.hf_weights or source.mcore_weights
    return f"random, seed {seed}" if folder is None else weights_digest(folder)


def _blend_fingerprint(said: str) -> str:
    """Return the digest of a dataset, or the weights and digests of a blend."""
    parts = parse_blend(said)
    digests = [dataset_fingerprint(part.path) for part in parts]
    if len(parts) == 1:
        return digests[0]
    weights = whole_weights(parts)
    return ", ".join(f"{weight} x {digest}" for weight, digest in zip(weights, digests, strict=True))


def digest_of(value: Any) -> str:
    """Return a short digest of a JSON value."""
    return _digest(json.dumps(value).encode())


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
