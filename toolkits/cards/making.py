"""Make the card of a family: tiny models are converted both ways, then refused, or run and trained."""

import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from conversion.families.family import ModelFamily

from ..foundation.errors import CheckpointError, UsageError, raise_all
from .card import CPU_RAN, NO_GPU, NO_GPU_NEEDED, RANKS_RAN, Card, ModelFigures, Training
from .lesson import lesson, plain_losses
from .models import TITLES, Config, models_of, write_model
from .quiet import quiet
from .rank import FIGURES, RANKS, TRAINED_AT, TRUTH
from .sample import VOCABULARY, write_dataset, write_tokenizer

PACKAGES = {"temper": "temper-mcore"} | {name: name for name in ("torch", "megatron-core", "transformers")}
TOKENS = (2, 60)  # rows of the logits and their length, which TP2 divides
DIGITS = 3  # of a figure that are kept


def make_card(family: ModelFamily) -> Card:
    """Check a family as its card says, on CPU ranks of this machine, in a temporary folder.

    Raises CheckpointError that lists everything that is not as it should be; SystemExit with the code of the ranks
    when they failed, whose message is printed then.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="temper-card-") as name:
        work = Path(name)
        with quiet():
            found = [_convert(work / model, config) for model, config in models_of(family.name).items()]
            expected = _expected_losses(work, [model.name for model in found if not model.refused])
        if expected:
            figures = _run_ranks(work)
            found = [model if model.refused else _completed(model, figures, expected) for model in found]
    card = Card(
        family=family.name,
        title=TITLES[family.name],
        architectures=list(family.architectures),
        versions={name: metadata.version(package) for name, package in PACKAGES.items()}
        | {"python": platform.python_version()},
        models=found,
        seconds=round(time.monotonic() - started, 1),
        ran_on=RANKS_RAN if expected else CPU_RAN,
        gpu=NO_GPU if expected else NO_GPU_NEEDED,
    )
    raise_all(CheckpointError, f"family {family.name}", card.problems)
    return card


def _convert(folder: Path, config: Config) -> ModelFigures:
    """Write a model, convert it both ways, and leave the truth of its logits; or see training refuse it."""
    import torch
    from safetensors.torch import load_file

    from conversion import hf_to_mcore, mcore_to_hf
    from conversion.settings import untrainable_reasons

    hf, back = write_model(folder / "hf", config | {"vocab_size": VOCABULARY}), folder / "back"
    write_tokenizer(hf)
    plan = hf_to_mcore.convert(hf, folder / "mcore")
    mcore_to_hf.convert(folder / "mcore", back)
    ours, theirs = (load_file(each / "model.safetensors") for each in (back, hf))
    different = [name for name in sorted(ours.keys() | theirs.keys()) if not _same(ours.get(name), theirs.get(name))]
    reasons = untrainable_reasons(json.loads((hf / "config.json").read_text()))
    if reasons:
        _see_refused(hf, reasons)
    else:
        from ..training.logits import of_transformers

        ids = torch.randint(0, VOCABULARY, TOKENS, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            (logits,) = of_transformers(hf, [ids])
        torch.save({"ids": ids, "logits": logits}, folder / TRUTH)
    return ModelFigures(folder.name, plan.num_parameters, len(theirs), different, refused=reasons)


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors are there and equal bit by bit."""
    import torch

    if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _see_refused(hf: Path, reasons: Sequence[str]) -> None:
    """Start training as a run would, and see it say each of `reasons`."""
    from ..training.settings import ModelSettings
    from ..training.sources import find_model

    try:
        find_model(ModelSettings(checkpoint=str(hf)))
    except UsageError as error:
        unsaid = [reason for reason in reasons if reason not in str(error)]
        raise_all(CheckpointError, "training was refused without saying", unsaid)
    else:
        raise CheckpointError(f"training was not refused, though {'; '.join(reasons)}")


def _expected_losses(work: Path, models: Sequence[str]) -> dict[str, list[float]]:
    """Write what the models are trained on, and return the losses that their runs are to have."""
    if models:
        write_dataset(work / "data", work / models[0] / "hf", rows=40)
    return {model: plain_losses(lesson(work / model / "hf", work / "data", work)) for model in models}


def _run_ranks(work: Path) -> dict[str, Any]:
    from ..launch.elastic import start_ranks

    code = start_ranks([str(work)], ranks=RANKS, module="toolkits.cards.rank")
    if code:
        raise SystemExit(code)
    return json.loads((work / FIGURES).read_text())


def _completed(model: ModelFigures, figures: dict[str, Any], expected: dict[str, list[float]]) -> ModelFigures:
    """Add what the ranks saw of a model."""
    seen, truth = figures[model.name], expected[model.name]
    losses = seen["losses"]
    training = Training(
        layout=TRAINED_AT,
        steps=len(losses),
        first_loss=round(losses[0], DIGITS),
        last_loss=round(losses[-1], DIGITS),
        difference=_rounded(max(abs(ours - theirs) for ours, theirs in zip(losses, truth, strict=True))),
    )
    return dataclasses.replace(
        model,
        logits={layout: _rounded(each["difference"]) for layout, each in seen["logits"].items()},
        largest_logit=_rounded(max(each["largest"] for each in seen["logits"].values())),
        training=training,
    )


def _rounded(figure: float) -> float:
    return float(f"{figure:.{DIGITS - 1}e}")
