"""What a card says of a family: figures, their verdict, and the card as JSON and Markdown."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..foundation.publish import publish_files
from .lesson import LEARNT, LOSS_TOLERANCE

FORMAT = 1
SUFFIXES = (".md", ".json")  # the JSON commits the pair
LOGIT_TOLERANCE = 1e-4  # absolute; the logits of tiny models are of the order of 1
RANKS_RAN, CPU_RAN = "2 CPU ranks under gloo", "a CPU"
NO_GPU, NO_GPU_NEEDED = "not run on a GPU yet", "converting needs no GPU, and training is refused"


@dataclass(frozen=True)
class Training:
    """A run's losses held against those of plain transformers and AdamW, step by step."""

    layout: str
    steps: int
    first_loss: float
    last_loss: float
    difference: float  # the largest of a step


@dataclass(frozen=True)
class ModelFigures:
    """What was seen of one tiny model. Of a model that training refuses there are no logits, only `refused`."""

    name: str
    parameters: int
    tensors: int
    different: list[str]  # tensors whose bits did not come back
    logits: dict[str, float] = field(default_factory=dict)  # layout -> largest absolute difference
    largest_logit: float = 0.0
    training: Training | None = None
    refused: list[str] = field(default_factory=list)  # why training is not exact, as it says when it refuses

    def problems(self) -> Iterator[str]:
        """Yield what is not as it should be."""
        for tensor in self.different:
            yield f"{self.name}: {tensor} came back with other bits"
        for layout, difference in self.logits.items():
            if not difference <= LOGIT_TOLERANCE:
                yield f"{self.name}: logits at {layout} differ from transformers' by {difference:.1e}"
        if self.training is None:
            return
        if not self.training.difference <= LOSS_TOLERANCE:
            yield f"{self.name}: losses differ from plain transformers' by {self.training.difference:.1e}"
        if not self.training.last_loss < self.training.first_loss - LEARNT:
            fell = f"{self.training.first_loss:.3f} to {self.training.last_loss:.3f}"
            yield f"{self.name}: the loss went from {fell}: nothing was learned"


@dataclass(frozen=True)
class Card:
    """One family, checked on tiny models."""

    family: str
    title: str
    architectures: list[str]
    versions: dict[str, str]
    models: list[ModelFigures]
    seconds: float
    ran_on: str
    gpu: str
    format: int = FORMAT

    @property
    def problems(self) -> list[str]:
        """Everything that is not as it should be."""
        return [problem for model in self.models for problem in model.problems()]

    @property
    def trained(self) -> list[ModelFigures]:
        """The models that training does not refuse."""
        return [model for model in self.models if model.training]

    @property
    def layouts(self) -> list[str]:
        """The layouts under which logits were compared, in order."""
        return list(dict.fromkeys(layout for model in self.models for layout in model.logits))

    @property
    def logit_difference(self) -> float:
        """The largest difference of a logit, over all models and layouts."""
        return max((each for model in self.models for each in model.logits.values()), default=0.0)

    @property
    def loss_difference(self) -> float:
        """The largest difference of a loss, over all models and steps."""
        return max((model.training.difference for model in self.trained if model.training), default=0.0)


def read_card(path: Path) -> Card:
    """Read a card's JSON."""
    content = json.loads(path.read_text(encoding="utf-8"))
    models = []
    for said in content.pop("models"):
        training = said.pop("training")
        models.append(ModelFigures(**said, training=training and Training(**training)))
    return Card(**content, models=models)


def write_card(card: Card, folder: Path, *, overwrite: bool = False) -> None:
    """Write folder/FAMILY.json and .md, both or neither; refuse existing ones unless `overwrite`."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(dataclasses.asdict(card), indent=1) + "\n", ".md": markdown(card)}
    with publish_files(folder / card.family, SUFFIXES, overwrite=overwrite) as temporary:
        for suffix, text in texts.items():
            (temporary / f"{card.family}{suffix}").write_text(text, encoding="utf-8")


def markdown(card: Card) -> str:
    """Return the card as a page."""
    layouts = card.layouts
    names = ", ".join(f"`{name}`" for name in card.architectures)
    explained = ["Weights are random. Bits: HuggingFace to Megatron-core and back, every tensor compared."]
    if layouts:
        explained.append(
            f"{', '.join(layouts)}: the largest absolute difference between a logit of transformers and of GPTModel, "
            "both in fp32."
        )
    if card.trained:
        explained.append(
            "Training: every weight, in fp32, against a plain loop of transformers and AdamW over the same rows."
        )
    lines = [
        f"# {card.title}",
        "",
        f"{names}, checked by `temper verify card {card.family}` on {card.ran_on} in {card.seconds:.0f} s; {card.gpu}.",
        "",
        *table(["tiny model", "parameters", "bits", *layouts, "training"], [_row(m, layouts) for m in card.models]),
        "",
        *explained,
        "",
        *_refusals(card),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in card.versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    first, *rest = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [first, "|" + "---|" * len(head), *rest]


def _row(model: ModelFigures, layouts: Sequence[str]) -> list[str]:
    bits = f"{model.tensors} tensors equal"
    logits = [f"{model.logits[layout]:.1e}" if layout in model.logits else "-" for layout in layouts]
    training = "refused"
    if model.training:
        run = model.training
        training = (
            f"{run.steps} steps at {run.layout}: loss {run.first_loss:.3f} to {run.last_loss:.3f}, "
            f"at most {run.difference:.1e} off"
        )
    return [model.name, f"{model.parameters:,}", bits, *logits, training]


def _refusals(card: Card) -> list[str]:
    refused = [model for model in card.models if model.refused]
    if not refused:
        return []
    lines = ["What is refused by name when training starts (exit 2), and why:", ""]
    prefix = f"family {card.family}: "
    lines += [f"- {model.name}: {reason.removeprefix(prefix)}" for model in refused for reason in model.refused]
    return [*lines, ""]
