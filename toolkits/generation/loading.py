"""A HuggingFace directory, with or without an adapter, as a model of transformers that is ready to answer."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conversion.adapters import CONFIG as ADAPTER_CONFIG
from conversion.hf_checkpoint import CONFIG_FILE, read_config, read_headers
from conversion.layout import DTYPES, dtype_named
from conversion.mcore_directory import is_mcore_directory, step_folders
from conversion.merge import Merged
from conversion.options import Options
from conversion.quantized import Format
from conversion.reward_model import is_classifier, is_of_reward_model, require_words
from conversion.safe_files import read_json
from conversion.settings import label_count

from ..foundation.errors import CheckpointError, MachineError, TemperError, UsageError, raise_all
from ..foundation.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMED = 6  # tensors that a note names
_NO_MEMORY = ("not enough memory", "out of memory", "DefaultCPUAllocator")


@dataclass(frozen=True)
class Source:
    """What to load: a HuggingFace directory, an adapter for it in PEFT's format, a type and a device.

    `dtype` None is the type that the checkpoint has; `device` is `auto` (the GPU when there is one) or torch's name.
    With `quantized_base` the adapter is added to the base quantised and back. Raises UsageError without an adapter.
    """

    folder: Path
    adapter: Path | None = None
    dtype: str | None = None
    device: str = "auto"
    quantized_base: Format | None = None

    def __post_init__(self) -> None:
        if self.quantized_base is not None and self.adapter is None:
            raise UsageError("--quantized-base says what an adapter is added to: give --adapter too")


def load_model(source: Source, *, scores: bool = False) -> "PreTrainedModel":
    """Return the model on its device, in evaluation mode; nothing is fetched and no code of the folder is run.

    With `scores` it is a reward model.

    An adapter is added as `temper convert merge` adds it: in fp32, from the checkpoint's own weights, rounded once.
    Raises CheckpointError for a folder that does not load, UsageError and MachineError for a type or a device.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would warn of is an error or a note here
    device, dtype = _device_named(source.device), dtype_named(source.dtype)
    require_huggingface(source.folder)
    with explain_memory(f"loading {source.folder}", "--dtype bfloat16, or --device cpu"):
        if source.adapter is None:
            model, found = _loaded(source.folder, dtype, scores=scores)
        else:
            model, found = _loaded_with(source, source.adapter)
        _check_complete(source.folder, found)
        # A quantised one stands where its kernels are, and cannot be moved.
        return (model if getattr(model, "is_quantized", False) else model.to(device)).eval()  # type: ignore[arg-type]


def context_of(model: "PreTrainedModel") -> int | None:
    """Return how many tokens a model reads at most; None when its config does not say."""
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None


@contextlib.contextmanager
def explain_memory(doing: str, options: str) -> Iterator[None]:
    """Turn whatever says that memory ran out into MachineError; `options` says what to try, in order."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        said = (str(error).splitlines() or ["no more is to be had"])[0]
        raise MachineError(f"out of memory {doing}: {said}\nOptions, in order: {options}") from error


def _device_named(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; choose --device cpu")
    return device


def require_huggingface(folder: Path) -> None:
    """Raise CheckpointError for what transformers cannot read, with the command that makes it readable."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a HuggingFace directory")
    if is_mcore_directory(folder):
        raise CheckpointError(_of_megatron(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} is an adapter: give its base, {_base_of(folder)}, and --adapter {folder}")
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder / CONFIG_FILE} is missing: {folder} is not a HuggingFace checkpoint")
    read_headers(folder)  # whole files, and no pickle that would execute


def require_kind(source: Source, *, scores: bool) -> None:
    """Raise UsageError for a reward model where words are wanted, and the other way round; both by what files say."""
    config, file = read_config(source.folder), source.folder / CONFIG_FILE
    if not scores:
        require_words(config, source.folder, instead="`temper score` asks it")
        if source.adapter is not None and is_of_reward_model(source.adapter):
            raise UsageError(f"{source.adapter} makes a reward model of its base: `temper score` asks it")
    elif not is_classifier(config) and (source.adapter is None or not is_of_reward_model(source.adapter)):
        named = config.get("architectures")
        raise UsageError(f"{file} says {named}, which has no score; `temper train reward` gives it one")
    elif is_classifier(config) and (count := label_count(config)) != 1:
        raise UsageError(f"{file} describes {count} labels (id2label); a reward model has one score")


def _of_megatron(folder: Path) -> str:
    """Say how a Megatron-core directory, or one of its steps, becomes something to generate with."""
    adapted = [step for step in (folder, *step_folders(folder)) if (step / ADAPTER_CONFIG).is_file()]
    if adapted:
        step, base = adapted[-1], _base_of(adapted[-1])
        return (
            f"{folder} holds an adapter as training keeps it: give its base and --adapter {step} (base: {base}), "
            f"or merge them first: temper convert merge {base} {step} OUT"
        )
    return (
        f"{folder} is a Megatron-core directory, which transformers does not read; export it first: "
        f"temper convert mcore2hf {folder} OUT"
    )


def _base_of(adapter: Path) -> str:
    return str(read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE")


def _loaded(folder: Path, dtype: torch.dtype | None, *, scores: bool) -> tuple["PreTrainedModel", Mapping[str, Any]]:
    import transformers

    kind: Any = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    with _blame(folder):
        return kind.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False, output_loading_info=True
        )


def _loaded_with(source: Source, adapter: Path) -> tuple["PreTrainedModel", Mapping[str, Any]]:
    """Load merged weights; they pass through CPU memory whole."""
    import transformers

    folder, config = source.folder, read_config(source.folder)
    said = str(config.get("dtype") or config.get("torch_dtype") or "")
    options = Options(dtype=source.dtype or (said if said in DTYPES else None))
    merged = Merged(folder, [(adapter, 1.0)], options, quantized_base=source.quantized_base)
    for note in merged.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    names = list(merged.plan.hf_tensors)
    weights = {}
    with Progress("adding the adapter", len(names), unit="tensors") as progress:
        for name in names:
            weights[name] = merged.whole(name)
            progress.advance()
    # A family that adapters fit is one of the registry's, so its class is known by name.
    kind = getattr(transformers, merged.config["architectures"][0], None)
    if kind is None:
        raise MachineError(f"transformers {transformers.__version__} has no {merged.config['architectures'][0]}")
    with _blame(folder):
        theirs = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if merged.gets_head:
            theirs.num_labels, theirs.pad_token_id = 1, merged.config.get("pad_token_id")
        stored = next(iter(weights.values())).dtype
        return kind.from_pretrained(None, config=theirs, state_dict=weights, dtype=stored, output_loading_info=True)


@contextlib.contextmanager
def _blame(folder: Path) -> Iterator[None]:
    """Whatever transformers raises on loading, it is the folder's fault, unless memory ran out."""
    try:
        yield
    except (TemperError, MemoryError):
        raise
    except ImportError as error:
        raise MachineError(f"{folder} takes a package that is missing: {error}") from None
    except Exception as error:
        if any(words in str(error) for words in _NO_MEMORY):
            raise
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from None


def _check_complete(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers would have made something up; say what it leaves unused."""
    missing = [f"{name} is missing" for name in sorted(found.get("missing_keys") or ())]
    mismatched = [f"{name} is of another shape" for name in sorted(map(str, found.get("mismatched_keys") or ()))]
    failed = [str(said) for said in found.get("error_msgs") or ()]
    raise_all(CheckpointError, f"{folder} does not fill the model", missing + mismatched + failed)
    unused = sorted(found.get("unexpected_keys") or ())
    if unused:
        more = f" and {len(unused) - NAMED} more" * (len(unused) > NAMED)
        print(f"note: transformers does not use {', '.join(unused[:NAMED])}{more}", file=sys.stderr, flush=True)
