"""The READMEs' tables of what is supported, made of the cards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conversion.families import FAMILIES

from ..foundation.errors import UsageError
from ..foundation.publish import write_text
from .card import Card, read_card, table

CARDS = "docs/cards"  # beside the READMEs
MARKS = ("<!-- cards -->", "<!-- /cards -->")


@dataclass(frozen=True)
class Words:
    """What a table says in one language."""

    head: tuple[str, ...]
    trained: str
    refused: str  # the models of a family that are
    not_trained: str
    bits: str
    logits: str
    on_ranks: str
    converted: str  # where a family is only converted


LANGUAGES = {
    "README.md": Words(
        head=("family", "architectures", "trained", "bits both ways", "largest logit difference", "what ran where"),
        trained="yes, losses within {}",
        refused="; {} refused",
        not_trained="no",
        bits="equal",
        logits="{} at {}",
        on_ranks="CPU ranks; not run on a GPU yet",
        converted="CPU; converting needs no GPU",
    ),
    "README.zh.md": Words(
        head=("家族", "架构", "训练", "双向转换", "logits 最大差", "运行环境"),
        trained="可以，损失相差不到 {}",
        refused="；{} 除外",
        not_trained="不可以",
        bits="逐位相等",
        logits="{}（{}）",
        on_ranks="CPU rank；尚未在 GPU 上运行",
        converted="CPU；转换不需要 GPU",
    ),
}


def read_cards(folder: Path) -> list[Card]:
    """Return the cards of a folder in the order of the registry; raise UsageError when one is missing."""
    paths = [folder / f"{family.name}.json" for family in FAMILIES]
    missing = [path.stem for path in paths if not path.exists()]
    if missing:
        raise UsageError(f"{folder} has no card of {', '.join(missing)}: make them with `temper verify card`")
    return [read_card(path) for path in paths]


def support_table(cards: Sequence[Card], words: Words) -> str:
    """Return the table as it stands in a README between MARKS."""
    return "\n".join(table(words.head, [_row(card, words) for card in cards]))


def with_table(readme: str, cards: Sequence[Card], words: Words) -> str:
    """Return a README's text with its table made anew; raise UsageError where it has no place for one."""
    opening, closing = MARKS
    before, mark, rest = readme.partition(opening)
    _, end, after = rest.partition(closing)
    if not mark or not end:
        raise UsageError(f"the README has no {opening} and {closing} to put the table between")
    return f"{before}{opening}\n{support_table(cards, words)}\n{closing}{after}"


def write_tables(root: Path) -> None:
    """Bring the tables of both READMEs in `root` up to the cards."""
    cards = read_cards(root / CARDS)
    for name, words in LANGUAGES.items():
        write_text(root / name, with_table((root / name).read_text(encoding="utf-8"), cards, words))


def _row(card: Card, words: Words) -> list[str]:
    trained = words.trained.format(f"{card.loss_difference:.1e}") if card.trained else words.not_trained
    refused = [model.name for model in card.models if model.refused]
    if card.trained and refused:
        trained += words.refused.format(", ".join(refused))
    return [
        f"[{card.title}]({CARDS}/{card.family}.md)",
        ", ".join(f"`{name}`" for name in card.architectures),
        trained,
        words.bits,  # a card with a difference is not written
        words.logits.format(f"{card.logit_difference:.1e}", ", ".join(card.layouts)) if card.layouts else "-",
        words.on_ranks if card.trained else words.converted,
    ]
