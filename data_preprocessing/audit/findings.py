"""What an audit finds, and which of it would harm training."""

from dataclasses import dataclass
from typing import Any

FIRST = 3  # places that a finding names

HARMFUL = {  # `temper data check` ends with exit code 3 when one of these is found and not allowed
    "empty": "there is nothing to train on",
    "bad_rows": "the build refuses them",
    "same_answers": "the build refuses a pair of which nothing is preferred",
    "all_masked": "a row without a trained token within SEQ_LEN teaches nothing",
    "too_long": "training cuts these rows or leaves them out",
    "few_rows": "one global batch takes more rows than there are",
    "one_class": "labels that are all alike say nothing about what is better",
    "wrong_bos": "the model sees something else than when it is used",
    "missing_bos": "the model sees something else than when it is used",
    "missing_end": "the model does not learn to stop",
    "untrained_end": "the model does not learn to stop",
    "double_end": "the model learns to end an answer twice",
    "eos_mismatch": "the model learns an end that generation does not stop at",
    "valid_empty": "there is nothing to validate on",
    "valid_bad_rows": "the build refuses them",
    "valid_same_answers": "the build refuses a pair of which nothing is preferred",
    "valid_all_masked": "a row without a trained token teaches nothing",
}
WARNINGS = (  # the other things that may be found
    "exact_duplicates",
    "near_duplicates",
    "valid_overlap",
    "valid_near_overlap",
    "equal_answers",
    "length_shortcut",
    "phrase_shortcut",
    "secrets",
    "personal",
    "control_text",
    "eos_differs",
)


@dataclass(frozen=True)
class Finding:
    """`count` rows of which `message` says what is wrong; `places` are where the first of them stand.

    `more` holds figures for the JSON report.
    """

    code: str
    message: str
    count: int
    places: tuple[str, ...] = ()
    more: dict[str, Any] | None = None

    @property
    def is_harmful(self) -> bool:
        """Whether training would be harmed."""
        return self.code in HARMFUL

    def as_json(self) -> dict[str, Any]:
        """Return the finding for the JSON report."""
        said = {"code": self.code, "harmful": self.is_harmful, "count": self.count, "message": self.message}
        return {**said, "places": list(self.places), **(self.more or {})}


class Check:
    """Looks at the blocks of a set one after the other, then says what it found.

    A new check is a class like this in the table of `run.py`, and its codes above.
    """

    def add(self, block: Any) -> None:
        """Look at the next rows, a `Block`."""

    def facts(self) -> dict[str, Any]:
        """Return what the report says whether or not something is wrong."""
        return {}

    def finish(self) -> list[Finding]:
        """Return what was found."""
        return []


def share(part: int, whole: int, word: str = "row") -> str:
    """Return `part` with its share of `whole`: `137 rows (2.7%)`."""
    return f"{counted(part, word)} ({part / max(1, whole):.1%})"


def counted(count: int, word: str = "row") -> str:
    """Return a number of things: `1 row`, `1,200 rows`."""
    return f"{count:,} {word}" + "s" * (count != 1)
