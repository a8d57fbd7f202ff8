"""Answers that no model should learn from, told by simple signs: each has a name, and says what it saw.

They are tuned to leave good answers alone: of 1,999 published answers in English and Chinese, `repetition`, `truncated`
and `mojibake` name nine, of which eight are cut indeed. Of the longer of these answers, each cut at a random place,
`truncated` finds two in three. What declines in words that are not listed here stays unseen.
"""

import re
from collections.abc import Callable

UNITS_OF_A_GRAM = 8
FEWEST_UNITS = 60  # words, or characters of Chinese and its kin, below which nothing is called a repetition
SEEN_BEFORE, SEEN_BEFORE_AT_END = 0.4, 0.75  # shares of the grams
TAIL = 80  # units at the end of an answer that are looked at on their own: a loop often begins late
LONGEST_RUN = 30  # of one letter
OPENING = 240  # characters in which a refusal shows

_RUN = re.compile(rf"([^\W_])\1{{{LONGEST_RUN},}}")
_UNIT = re.compile("[\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3]|\\w+|[^\\w\\s]")


def repetition(text: str) -> str:
    """Return how a text repeats itself, "" when it does not."""
    run = _RUN.search(text)
    if run:
        return f"one letter stands {len(run[0])} times in a row"
    units = _UNIT.findall(text)
    if len(units) < FEWEST_UNITS:
        return ""
    for part, limit, where in ((units, SEEN_BEFORE, "it"), (units[-TAIL:], SEEN_BEFORE_AT_END, "its end")):
        share = _seen_before(part)
        if share > limit:
            return f"{share:.0%} of what stands in {where} stood there before, {UNITS_OF_A_GRAM} words at a time"
    return ""


def _seen_before(units: list[str]) -> float:
    """Return the share of the stretches of UNITS_OF_A_GRAM units that are not the first of their kind, 0 if it is
    small."""
    grams = list(zip(*(units[at:] for at in range(UNITS_OF_A_GRAM)), strict=False))
    if len(set(grams)) > (1 - SEEN_BEFORE) * len(grams):
        return 0.0
    # A row of dashes or an empty table is no text that repeats itself.
    grams = [gram for gram in grams if sum(unit[0].isalnum() for unit in gram) >= UNITS_OF_A_GRAM // 2]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# ------------------------------------------------------------------------------------------- cut answers

_OPEN_ENDS = ",，、（([「『"
_DANGLING = re.compile(
    r"\b(?:the|an?|of|and|or|but|from|because|its|their|our|your|my|than|nor|into|which|whose|is|are|was|were)$"
    r"|(?:和|与|或|以及|因为|但是|而且|例如|比如|并且|如果|由于|通过|对于|关于)$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？]")
_ITEM = re.compile(r"^(?:[-*•+>#|]|\d+[.)、:]|[（(]?[0-9a-zA-Z一二三四五六七八九十]{1,3}[)）.、:])")
_ENDS = ".!?。！？…:：;；\"'”’)）]】」』"
_UNSPACED = re.compile("[\u3041-\u30ff\u3400-\u9fff]")
NARROWEST, FEWEST_LIKE = 30, 1  # columns of a line that may be a sentence; lines like it that tell how lines end here
LONGEST_DANGLING = 12
LONGEST_ENDING = 12  # characters behind the last sentence that may be a name, a signature or a source


def truncated(text: str) -> str:
    """Return how a text shows that it was cut off, "" when it does not."""
    text = text.rstrip()
    if text.count("```") % 2:
        return "a block of code in it is not closed"
    last = text[text.rfind("\n") + 1 :].strip()
    if not last or last.endswith("```"):
        return ""
    if last[-1] in _OPEN_ENDS:
        return f"it ends with {last[-1]!r}"
    dangling = _DANGLING.search(last[-LONGEST_DANGLING:])
    # `vitamin A` and `Group A` end with a name.
    if dangling and not dangling[0].istitle() and (len(last.split()) > 3 or not last.isascii()) and not _is_code(text):
        return f"it ends with {dangling[0]!r}"
    if not last[-1].isalpha() or last[0] == "|":
        return ""
    if _others_end(text, last):
        return f"its last line has no end, as the others have: {last[-60:]!r}"
    if _ITEM.match(last):
        return ""
    ends = [match.end() for match in _SENTENCE_END.finditer(last)]
    ending = last[ends[-1] :].strip() if ends else ""
    if len(ending) > LONGEST_ENDING and not _looks_like_a_name(ending):
        return f"its last sentence has no end: {ending[-60:]!r}"
    return ""


def _others_end(text: str, last: str) -> bool:
    """Whether the last line is a sentence, an item or a paragraph like those in front of it, which have an end."""
    lines = [line.strip() for line in text.splitlines()[:-1]]
    like = [line for line in lines if _width(line) >= NARROWEST and bool(_ITEM.match(line)) == bool(_ITEM.match(last))]
    ended = [line for line in like if line[-1] in _ENDS]
    return _width(last) >= NARROWEST and len(ended) >= FEWEST_LIKE and len(ended) >= 0.8 * len(like)


def _width(line: str) -> int:
    return len(line) + len(_UNSPACED.findall(line))


def _is_code(text: str) -> bool:
    return "```" in text or bool(re.search(r"^\s*(?:def |class |import |SELECT |#include)", text, re.MULTILINE))


def _looks_like_a_name(ending: str) -> bool:
    """Whether what follows the last sentence is a title, a signature, an address: few words that are not lower case."""
    words = [word for word in ending.split() if word[0].isalpha()]
    return bool(words) and ending.isascii() and sum(not word[0].islower() for word in words) > len(words) / 2


# ------------------------------------------------------------------------------------------- refusals

_CANNOT = r"(?:can ?not|can't|could ?n[o']t|un ?able to|not able to|won't|will not|do(?:es)?(?: not|n't)|not capable)"
_REFUSALS = [
    r"^\W*(?:i'm|i am)?\s*(?:\w+ )?(?:sorry|apologi[sz]e|afraid|unfortunately)\b"
    rf"[^.!?\n]{{0,50}}\bi(?:'m| am)? {_CANNOT}",
    rf"^\W*i (?:am )?{_CANNOT} (?:\w+ ){{0,3}}?(?:help|assist|provide|fulfil?l|comply|answer|generate|create|write|"
    r"discuss|engage|participate|do (?:that|this)|perform|offer|access)",
    rf"\bas an? (?:\w+ ){{0,2}}?(?:ai|artificial intelligence|language model|chatbot)\b[^.!?\n]{{0,80}}\b{_CANNOT}",
    r"^\W*(?:很|非常|真的|十分)?(?:抱歉|对不起|不好意思|遗憾)[^。！？\n]{0,40}(?:无法|不能|没有办法|没法|不可以|不便)",
    r"作为(?:一[个名位款种])?(?:AI|人工智能|大?语言模型|智能助[手理]|聊天机器人)"
    r"[^。！？\n]{0,30}(?:无法|不能|不具备|我(?:并)?没有)",
    r"^\W*我(?:无法|不能)(?:为[您你]|帮[您你助]|提供|满足|回答|协助|完成|生成)",
    r"^\W*申し訳(?:あり|ござい)ません[^。\n]{0,60}(?:できません|できかねます)",
    r"^\W*죄송(?:하지만|합니다)[^\n]{0,60}(?:수 없|수가 없)",
    r"^\W*(?:к сожалению|извините|простите)[^.!?\n]{0,40}\bне (?:могу|в состоянии)",
    r"^\W*lo siento[^.!?\n]{0,40}\bno puedo",
    r"^\W*(?:je suis )?désolée?[^.!?\n]{0,40}\bne (?:peux|suis)",
    r"^\W*(?:es tut mir leid|leider|entschuldigung)[^.!?\n]{0,20}\bkann ich [^.!?\n]{0,40}\bnicht",
]
_REFUSAL = re.compile("|".join(f"(?:{pattern})" for pattern in _REFUSALS), re.IGNORECASE)


def refusal(text: str) -> str:
    """Return the words with which a text declines to answer, "" when it does not."""
    found = _REFUSAL.search(text[:OPENING].replace("’", "'"))
    return f"it declines: {' '.join(found[0].split())[:80]!r}" if found else ""


# ------------------------------------------------------------------------------------------- mojibake

# What the 32 characters from U+0080 are in Windows' reading of Latin-1: there a damaged text shows them.
_WINDOWS = bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")
_LATIN_RUN = re.compile(f"[\u00c2-\u00f4][\u0080-\u00bf{_WINDOWS}]+")
_RUN_BEYOND_ASCII = re.compile("[^\0-\x7f]{5,}")
_CHINESE = re.compile("[\u4e00-\u9fa5\u3000-\u303f\uff01-\uff5e\u2018-\u201d\u2026]+")  # GB2312's share of it
_CONTROL = re.compile("[\u0080-\u009f]")
_LEFT_BEHIND = re.compile("\ufffd|锟斤拷|烫烫烫|屯屯屯|ï»¿|[A-Za-z]鈥.")


def mojibake(text: str) -> str:
    """Return what of a text was read in a wrong encoding, "" when nothing was; damage is proved by undoing it."""
    if text.isascii():
        return ""
    left = _LEFT_BEHIND.search(text)
    if left:
        return f"it holds {left[0]!r}, which is left behind where an encoding was misread"
    for run in _LATIN_RUN.findall(text):
        mended = _undone(run, "cp1252") or _undone(run, "latin-1")
        if mended:
            return f"it holds {run!r}, which is {mended!r} in UTF-8 read as Latin-1"
    for run in _RUN_BEYOND_ASCII.findall(text):
        mended = _undone(run, "gb18030")
        if mended:
            return f"it holds {run[:12]!r}, which is {mended[:12]!r} in UTF-8 read as GBK"
    control = _CONTROL.search(text)
    return f"it holds the control character U+{ord(control[0]):04X}" if control else ""


def _undone(run: str, encoding: str) -> str:
    """Return a run of characters in UTF-8 as it was before it was read as `encoding`, "" when it was not."""
    try:
        raw = run.encode(encoding)
        if encoding != "gb18030":
            return raw.decode()
        # A last character that was torn apart does not show. Good Chinese that is UTF-8 by accident is rare signs.
        mended = raw[: len(raw) // 3 * 3].decode()
        return mended if _CHINESE.fullmatch(mended) else ""
    except UnicodeError:
        return ""


SIGNS: dict[str, tuple[str, Callable[[str], str]]] = {
    "mojibake": ("a text that was read in a wrong encoding", mojibake),
    "refusal": ("an answer that declines to answer", refusal),
    "repetition": ("an answer that goes round in circles", repetition),
    "truncated": ("an answer that ends in mid-sentence, or within a block of code", truncated),
}
