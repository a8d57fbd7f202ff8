"""`temper data check`: a set is read once, and every check of a table looks at its rows.

    open_stream -> blocks -> each check's add -> facts and findings -> report

A new check is a class in one of the files beside this one (see findings.Check) and its name in CHECKS.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..chunks import BuildOptions
from ..near_duplicates import THRESHOLD
from .block import Setting
from .content import BadRows, ControlTexts, EqualAnswers, Labels, Languages
from .copies import Copies
from .findings import Check, Finding
from .lengths import Lengths
from .preferences import Pairs, Phrases
from .secrets import Secrets
from .streams import Stream, open_stream
from .tokens import SpecialTokens

CHECKS = (  # in the order of the report
    BadRows,
    Lengths,
    SpecialTokens,
    Labels,
    Pairs,
    Phrases,
    EqualAnswers,
    Copies,
    Secrets,
    ControlTexts,
    Languages,
)
VALID_CHECKS = (BadRows, Lengths, Copies)  # of a validation set


@dataclass(frozen=True)
class AuditOptions:
    """What a set is checked for; `allow` names harmful findings that only warn."""

    seq_lens: tuple[int, ...] = ()
    global_batch_size: int | None = None
    near_threshold: float = THRESHOLD
    allow: tuple[str, ...] = ()
    build: BuildOptions = field(default_factory=BuildOptions)


@dataclass(frozen=True)
class Report:
    """What an audit knows: `facts` of the set, `valid` those of the validation set, and everything found."""

    facts: dict[str, Any]
    valid: dict[str, Any] | None
    findings: tuple[Finding, ...]
    allowed: tuple[str, ...] = ()

    @property
    def harmful(self) -> list[Finding]:
        """The findings that would harm training and were not allowed."""
        return [finding for finding in self.findings if finding.is_harmful and finding.code not in self.allowed]

    def as_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        harmful = self.harmful
        findings = [{**finding.as_json(), "allowed": finding.code in self.allowed} for finding in self.findings]
        return {"harmful": bool(harmful), **self.facts, "valid": self.valid, "findings": findings}


def audit(
    sources: Sequence[str], *, tokenizer: Path, valid: Sequence[str] = (), options: AuditOptions | None = None
) -> Report:
    """Check files of rows, or a dataset, and a validation set against them.

    Raises DataError for what cannot be read at all, and for a dataset of another tokenizer.
    """
    options = options or AuditOptions()
    facts, findings, checks = _checked(open_stream(sources, tokenizer, options.build), CHECKS, options)
    if not valid:
        return Report(facts, None, tuple(findings), options.allow)
    alone = replace(options, seq_lens=options.seq_lens, global_batch_size=None)
    valid_facts, found, valid_checks = _checked(open_stream(valid, tokenizer, options.build), VALID_CHECKS, alone)
    # Copies within a validation set do no harm worth a word.
    findings += [_of_valid(finding) for finding in found if finding.code in ("empty", *OF_VALID)]
    findings += _one(checks).overlap(_one(valid_checks))
    return Report(facts, valid_facts, tuple(findings), options.allow)


OF_VALID = ("bad_rows", "same_answers", "all_masked")  # what is said of a validation set as well


def _checked(
    stream: Stream, table: Sequence[type[Check]], options: AuditOptions
) -> tuple[dict[str, Any], list[Finding], list[Check]]:
    """Let the checks of `table` look at a set; return its facts, what was found, and the checks."""
    setting = Setting(
        kind=stream.kind or "conversations",
        tokenizer=stream.tokenizer,
        places=stream.places,
        name=stream.name,
        seq_lens=options.seq_lens,
        global_batch_size=options.global_batch_size,
        near_threshold=options.near_threshold,
    )
    checks = [kind(setting) for kind in table]  # type: ignore[call-arg]
    for block in stream.blocks():
        for check in checks:
            check.add(block)
    facts: dict[str, Any] = {"name": stream.name, "kind": stream.kind, **stream.facts()}
    findings = []
    for check in checks:
        facts |= check.facts()
        findings += check.finish()
    return facts, findings, checks


def _of_valid(finding: Finding) -> Finding:
    return replace(finding, code=f"valid_{finding.code}", message=f"validation set: {finding.message}")


def _one(checks: Sequence[Check]) -> Copies:
    return next(check for check in checks if isinstance(check, Copies))
