"""One of two CPU ranks that check tiny models: `python -m toolkits.cards.rank WORK`, started by `making.py`.

WORK/NAME holds hf/, mcore/ and truth.pt (ids [b, s] and transformers' logits) of each model, WORK/data what to train
on. Leaves WORK/figures.json.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..foundation.errors import InterruptedRun
from ..launch.rank import run_rank, stop_requested
from .quiet import quiet

RANKS = 2
FIGURES = "figures.json"
TRUTH = "truth.pt"
# What RANKS ranks are in each: TP, PP, EP.
LAYOUTS = {"TP1": (1, 1, 1), "TP2": (2, 1, 1), "PP2": (1, 2, 1), "EP2": (1, 1, 2)}
TRAINED_AT = "DP2"


def main() -> None:
    """Compare logits under every layout, train each model, and leave the figures."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same figures wherever a card is made
    work = Path(sys.argv[1])
    names = sorted(truth.parent.name for truth in work.glob(f"*/{TRUTH}"))
    try:
        with quiet():
            figures = _figures(work, names)
        if stop_requested():
            raise InterruptedRun
    except InterruptedRun:  # whatever a run says of going on, here nothing is kept
        raise InterruptedRun("interrupted; no card was written") from None
    if os.environ["RANK"] == "0":
        (work / FIGURES).write_text(json.dumps(figures))


def _figures(work: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {name: {"logits": {}, "losses": []} for name in names}
    for layout in LAYOUTS:
        for name, found in _logits(work, names, layout):
            figures[name]["logits"][layout] = found
    for name in names:
        figures[name]["losses"] = _losses(work, name)
    return figures


def _logits(work: Path, names: list[str], layout: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield how far each model's logits are from transformers'; of those without experts nothing at EP2."""
    from conversion.hf_checkpoint import read_config
    from conversion.settings import mcore_settings

    from ..training.layout import Layout
    from ..training.parallel.world import process_groups

    tensor, pipeline, expert = LAYOUTS[layout]
    ranks = Layout(RANKS, tensor, pipeline, sequence=tensor > 1, micro_batches=1, expert=expert)
    with process_groups(ranks, seed=0):
        for name in names:
            settings = mcore_settings(read_config(work / name / "hf"))
            if expert == 1 or "num_moe_experts" in settings:
                yield name, _compare(work / name, settings, ranks)


def _compare(folder: Path, settings: dict[str, Any], ranks: Any) -> dict[str, float]:
    import torch

    from conversion.mcore_directory import find_step

    from ..training.logits import compared, of_megatron
    from ..training.parallel.world import gather

    truth = torch.load(folder / TRUTH)
    ours = of_megatron(find_step(folder / "mcore"), settings, ranks, [truth["ids"]])
    # Each rank has its own part of the model: the worst of those that got logits counts.
    found = [each for each in gather(ours and compared([truth["logits"]], ours)) if each]
    return {"difference": max(each.difference for each in found), "largest": found[0].largest}


def _losses(work: Path, name: str) -> list[float]:
    from ..training.objectives import OBJECTIVES
    from ..training.run import run
    from .lesson import lesson

    config = lesson(work / name / "hf", work / "data", work / name / "run")
    return [step.loss for step in run(config, OBJECTIVES["sft"])]


if __name__ == "__main__":
    run_rank(main)
