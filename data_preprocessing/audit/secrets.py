"""Secrets and personal numbers in rows: counted and located, never shown."""

import datetime
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from .block import Block, Setting
from .findings import FIRST, Check, Finding, counted

KEYS = {  # what a text must hold for the pattern to be tried, and the pattern
    "-----BEGIN ": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "AKIA": r"\bAKIA[0-9A-Z]{16}\b",
    "ASIA": r"\bASIA[0-9A-Z]{16}\b",
    "LTAI": r"\bLTAI[0-9A-Za-z]{12,24}\b",
    "AKID": r"\bAKID[0-9A-Za-z]{32}\b",
    "AIza": r"\bAIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])",
    **{f"gh{kind}_": rf"\bgh{kind}_[0-9A-Za-z]{{36}}\b" for kind in "pousr"},
    "github_pat_": r"\bgithub_pat_[0-9A-Za-z_]{22,}",
    "glpat-": r"\bglpat-[0-9A-Za-z_-]{20}",
    "hf_": r"\bhf_[0-9A-Za-z]{34}\b",
    "sk-": r"\bsk-(?=[A-Za-z_-]*[0-9])(?:[a-z]+-)*[0-9A-Za-z_-]{20,}",
    "k_live_": r"\b[rs]k_live_[0-9A-Za-z]{16,}",
    "xox": r"\bxox[abeoprs]-[0-9A-Za-z-]{10,}",
    "eyJ": r"\beyJ[0-9A-Za-z_-]{8,}\.eyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}",
}
_KEYS = {mark: re.compile(pattern) for mark, pattern in KEYS.items()}
_MAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]*@((?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,})\b", re.ASCII)
_MADE_UP = re.compile(r"(?:^|\.)(?:example|test|invalid|localhost|yourdomain|domain)(?:\.|$)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.$=*/^-])(?:\+|\()?\d[\d ().-]{7,24}[\dXx](?![\w.]\d)(?!\w)")
_CHINESE_ID = re.compile(r"[1-9]\d{5}(?:18|19|20)\d{9}[\dXx]")
_CARD = re.compile(r"4\d{12}(?:\d{3})?|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|6(?:011|5\d\d)\d{12}|62\d{14,17}")
_CHINESE_MOBILE = re.compile(r"(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}")
_INTERNATIONAL = re.compile(r"\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}")
_AMERICAN = re.compile(r"\(?([2-9]\d\d)\)?[ .-]([2-9]\d\d)[ .-](\d{4})")
_SEPARATED_CARD = re.compile(r"\d{4}(?:([ -])\d{4}(?:\1\d{4}){2}(?:\1\d{1,3})?)|\d{4}([ -])\d{6}\2\d{5}|\d{13,19}")
NOBODYS_EXCHANGE = "555"  # of American telephone numbers: those of films and books


def personal_numbers(text: str) -> Iterator[str]:
    """Yield what each number in `text` is that looks like a person's: `card`, `chinese_id` or `phone`."""
    for match in _NUMBER.finditer(text):
        kind = kind_of_number(match[0])
        if kind is not None:
            yield kind


def kind_of_number(said: str) -> str | None:
    """Return `card`, `chinese_id` or `phone` for a number of that form whose checksum is right, else None."""
    digits = re.sub(r"[ ().-]", "", said)
    if _CHINESE_ID.fullmatch(digits) and is_chinese_id(digits):
        return "chinese_id"
    if _CARD.fullmatch(digits) and _SEPARATED_CARD.fullmatch(said) and passes_luhn(digits):
        return "card"
    if _CHINESE_MOBILE.fullmatch(said):
        return "phone"
    american = _AMERICAN.fullmatch(said)
    if american:
        return None if NOBODYS_EXCHANGE in american.groups()[:2] else "phone"
    if _INTERNATIONAL.fullmatch(said) and 9 <= len(digits) - 1 <= 15 and NOBODYS_EXCHANGE not in said:
        return "phone"
    return None


def passes_luhn(digits: str) -> bool:
    """Whether the last digit of a card number is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def is_chinese_id(digits: str) -> bool:
    """Whether a resident identity number has a date of birth and the right check character (GB 11643-1999)."""
    try:
        datetime.date(int(digits[6:10]), int(digits[10:12]), int(digits[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * (1 << (17 - place)) for place, digit in enumerate(digits[:17]))
    return "10X98765432"[total % 11] == digits[17].upper()


def keys(text: str) -> Iterator[str]:
    """Yield `private_key` or `api_key` for each one in `text`."""
    for mark, pattern in _KEYS.items():
        if mark in text:
            for _ in pattern.finditer(text):
                yield "private_key" if mark == "-----BEGIN " else "api_key"


def mails(text: str) -> Iterator[str]:
    """Yield `email` for each address in `text` that is not of a domain for examples."""
    if "@" in text:
        for match in _MAIL.finditer(text):
            if not _MADE_UP.search(match[1]):
                yield "email"


FINDERS: tuple[tuple[str, Callable[[str], Iterator[str]]], ...] = (
    ("secrets", keys),
    ("personal", mails),
    ("personal", personal_numbers),
)
WORDS = {
    "private_key": "private keys",
    "api_key": "API keys",
    "email": "e-mail addresses",
    "phone": "telephone numbers",
    "chinese_id": "Chinese identity numbers",
    "card": "card numbers",
}


class Secrets(Check):
    """Keys, addresses and numbers that nobody meant to teach."""

    def __init__(self, setting: Setting) -> None:
        self._places = setting.places
        self._found: dict[str, Counter[str]] = {"secrets": Counter(), "personal": Counter()}
        self._rows: Counter[str] = Counter()
        self._first: dict[tuple[str, str], list[int]] = {}

    def add(self, block: Block) -> None:
        for entry, text in zip(block.entries, block.texts, strict=True):
            for code in self._seen(entry.number, f"{entry.system}\n{text}" if entry.system else text):
                self._rows[code] += 1

    def _seen(self, number: int, text: str) -> set[str]:
        codes = set()
        for code, finder in FINDERS:
            for kind in finder(text):
                codes.add(code)
                self._found[code][kind] += 1
                first = self._first.setdefault((code, kind), [])
                if len(first) < FIRST and number not in first:
                    first.append(number)
        return codes

    def finish(self) -> list[Finding]:
        return [self._finding(code, counts) for code, counts in self._found.items() if counts]

    def _finding(self, code: str, counts: Counter[str]) -> Finding:
        ordered = counts.most_common()
        kinds = ", ".join(f"{WORDS[kind]} {count:,}" for kind, count in ordered)
        what = "what look like secrets" if code == "secrets" else "what may be personal data"
        places = tuple(f"{WORDS[kind]}: {', '.join(self._places.of(self._first[code, kind]))}" for kind, _ in ordered)
        more: dict[str, Any] = {"kinds": dict(ordered)}
        return Finding(code, f"{counted(self._rows[code])} with {what}: {kinds}", self._rows[code], places, more)
