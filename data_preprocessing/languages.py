"""Which language a text is in: a guess from its script, and for Latin script from its most frequent little words.

No model and no dictionary: it tells apart what training data is usually sorted by, and says `other` for the rest.
"""

import re
from collections import Counter

LOOKED_AT = 4000  # characters of a text

# Letters of a script, and how many of them weigh as much as a word of another. Those that quote Latin names and terms
# weigh more: a Chinese text may be full of English names, an English one is not full of Chinese ones.
_SCRIPTS = {
    "latin": ("A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff", 5.0),
    "han": ("\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af", 1.0),
    "kana": ("\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9d", 1.5),
    "hangul": ("\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3", 1.5),
    "cyrillic": ("\u0400-\u052f", 5.0),
    "arabic": ("\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc", 4.5),
    "greek": ("\u0370-\u03ff\u1f00-\u1fff", 5.0),
    "hebrew": ("\u05d0-\u05ea", 4.5),
    "devanagari": ("\u0900-\u097f", 4.0),
    "thai": ("\u0e01-\u0e3a\u0e40-\u0e4e", 5.0),
}
_PATTERNS = {name: (re.compile(f"[{letters}]+"), size) for name, (letters, size) in _SCRIPTS.items()}
_OF_SCRIPT = {"hangul": "ko", "greek": "el", "hebrew": "he", "devanagari": "hi", "thai": "th"}
_WORD = re.compile(f"[{_SCRIPTS['latin'][0]}]+")
KANA_IN_JAPANESE = 0.1  # of its Han and kana characters; Chinese has none, but may quote some
# Letters that neighbours of Russian and of Arabic write and they do not.
_NOT_RUSSIAN, _NOT_ARABIC = re.compile("[іїєґўјљњћђџѓќ]"), re.compile("[پچژگکیٹڈڑے]")

_LITTLE_WORDS = {  # of two letters and more
    "en": "the of and to in is that for it as with was on are be this by you an or at from have not which they their "
    "what how can do does has were your we he she his her will would one some there if when",
    "de": "der die und das ist nicht ein eine zu den mit sich von auf für dem im des auch als wie ich sie es",
    "fr": "la le les et des est une un du dans que qui pour pas sur au avec ce il vous je nous sont par",
    "es": "el la los las de que en un una es por con para se del no como su al lo más pero está",
    "pt": "os as de que em um uma por com para se da do não como mais na no ao você são foi",
    "it": "il la di che un una per con del della non sono gli le si nel alla più come anche ha dei",
    "nl": "de het een en van is dat op te voor met niet zijn aan er ook als maar om je bij uit naar wordt",
}
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in _LITTLE_WORDS.items():
    for _said in _words.split():
        _LANGUAGES_OF.setdefault(_said, []).append(_language)
LITTLE_WORDS = frozenset(_LANGUAGES_OF)  # of any language: they say nothing about what a text is about
FEW_WORDS = 12  # a text shorter than that need not have a little word in it
LITTLE_SHARE = 0.05  # of the words of a longer text that must be little words

LANGUAGES = (*_LITTLE_WORDS, "zh", "ja", "ko", "ru", "ar", *sorted({*_OF_SCRIPT.values()} - {"ko"}), "code", "other")

# How a line of code begins, or all of it; white space around it is gone.
_CODE_LINE = re.compile(
    r"""(?:def|class|for|while|if|elif|with)\b.*:$     # Python
    |(?:import|from|return|try|else|except|finally|const|let|var|public|private|static)\b(?:[^.!?]|\.(?=\w))*$
    |(?:\#include|\#define|</?[a-zA-Z][^>]*>|//|\$\s|>>>\s)
    |[\w.\[\]'"]+\s*(?:=|\+=|-=|:=)\s*\S              # an assignment
    |[\w.]+\(.*\)$                                   # a call
    |(?:SELECT|INSERT|UPDATE|DELETE|CREATE|FROM|WHERE|JOIN)\b""",
    re.VERBOSE,
)
_CODE_ENDINGS = (";", "{", "}")
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
PROSE_SHARE = 0.2  # of the lines of a text that must be prose, or it is code


def language_of(text: str) -> str:
    """Return one of `LANGUAGES` for a text, from its first LOOKED_AT characters: `en`, `zh`, `code`, `other` ...

    Code within a text is passed over; `code` is a text of nothing else.
    """
    prose = _without_code(text[:LOOKED_AT])
    if prose is None:
        return "code"
    scripts = ["latin"] if prose.isascii() else _PATTERNS
    letters = {name: sum(map(len, _PATTERNS[name][0].findall(prose))) for name in scripts}
    if not any(letters.values()):
        return "other"
    script = max(letters, key=lambda name: letters[name] / _PATTERNS[name][1])
    if script in ("han", "kana"):
        return "ja" if letters["kana"] > KANA_IN_JAPANESE * (letters["han"] + letters["kana"]) else "zh"
    if script == "cyrillic":
        return "other" if _NOT_RUSSIAN.search(prose.lower()) else "ru"
    if script == "arabic":
        return "other" if _NOT_ARABIC.search(prose) else "ar"
    return _OF_SCRIPT.get(script) or _of_latin(prose)


def _without_code(text: str) -> str | None:
    """Return the lines of a text that are no code; None when nearly all of them are."""
    lines = [line.strip() for line in _FENCED.sub("\n", text).splitlines() if line.strip()]
    prose = [line for line in lines if not (line.endswith(_CODE_ENDINGS) or _CODE_LINE.match(line))]
    if len(prose) < PROSE_SHARE * len(lines) or (not lines and "```" in text):
        return None
    return "\n".join(prose)


def _of_latin(text: str) -> str:
    words = _WORD.findall(text.lower())
    counts, found = Counter(words), Counter[str]()
    for word in LITTLE_WORDS & counts.keys():
        for language in _LANGUAGES_OF[word]:
            found[language] += counts[word]
    count = max(found.values(), default=0)
    if count and count >= LITTLE_SHARE * len(words):
        return next(language for language in _LITTLE_WORDS if found[language] == count)
    return "en" if len(words) < FEW_WORDS and not count and "".join(words).isascii() else "other"
