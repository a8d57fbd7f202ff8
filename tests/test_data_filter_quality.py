"""Signs of bad answers, and guesses of languages: what they name, and what they leave alone."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from data_world import NO_SHARED, SHARED, talk

from data_preprocessing.curate.facts import facts_of
from data_preprocessing.curate.quality import mojibake, refusal, repetition, truncated
from data_preprocessing.curate.step import Resources
from data_preprocessing.curate.steps import read_steps
from data_preprocessing.languages import LANGUAGES, language_of
from data_preprocessing.rows import Row

PROSE = (
    "The harbour lies behind a long stone wall. Boats go out before sunrise, when the wind comes from the land. "
    "Most of the catch is sold on the quay; the rest goes to the two smokehouses at the end of the pier."
)
CHINESE = "港口在一道长长的石墙后面。渔船在日出之前出海，那时风从陆地吹来。大部分鱼在码头上卖掉，其余的送到熏鱼坊。"


def verdict(row, *said):
    (judge,) = [step.start(Resources()) for step in read_steps(said)[0]]
    facts = facts_of(0, Row(1, row), encoding="utf-8", merge_consecutive=False, columns=())
    return judge.judge([facts])[0]


@pytest.mark.parametrize(
    "text",
    [
        PROSE[:-12],
        PROSE + " A second harbour was planned in the nineties, but the money for it was spent on the",
        PROSE + "\n\n" + PROSE + "\n\nIn winter nobody goes out at all and the men mend their",
        "1. Boats go out before sunrise.\n2. The catch is sold on the quay.\n3. The rest goes to the two smokeho",
        "Here is the code:\n\n```python\nfor boat in harbour:\n    boat.lea",
        CHINESE[:-4],
        CHINESE + "\n\n" + CHINESE + "\n\n到了冬天就没有人出海了，男人们在家里修补他们的",
        "主要的鱼有以下几种：鲱鱼、鳕鱼、",
    ],
)
def test_answers_that_are_cut(text):
    assert truncated(text)


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        CHINESE,
        "Paris",
        "42",
        "The answer is 42",
        "1. Herring\n2. Cod\n3. Mackerel",
        "Boats:\n\n- the long one, which is red\n- the short one, which is blue",
        PROSE + "\n\nBest regards,\nAnna Berg",
        PROSE + " Source: Harbour Office",
        "Group A takes more of vitamin A",
        "```python\nprint(1)\n```",
        "def f(x):\n    return x or",
        "Is it so? Yes, it is 😀",
        "春眠不觉晓\n处处闻啼鸟\n夜来风雨声\n花落知多少",
        "| boat | length |\n|---|---|\n| Anna | ten metres of oak",
        "https://example.org/harbour",
    ],
)
def test_answers_that_are_complete(text):
    assert truncated(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that request.",
        "I’m sorry, but as an AI language model, I don’t have access to that.",
        "Sorry, I cannot do this.",
        "Unfortunately, I am unable to share such things.",
        "I cannot assist with that.",
        "I can't provide instructions for this.",
        "As an AI, I don't have personal opinions.",
        "As a large language model, I am not able to browse.",
        "抱歉，我无法回答这个问题。",
        "很抱歉，这个请求我不能满足。",
        "作为一个AI语言模型，我没有个人感受。",
        "我无法为您提供这些信息。",
        "申し訳ありませんが、その質問にはお答えできません。",
        "죄송하지만 그 요청은 도와드릴 수 없습니다.",
        "К сожалению, я не могу ответить на этот вопрос.",
        "Lo siento, pero no puedo ayudarte con eso.",
        "Je suis désolé, mais je ne peux pas vous aider.",
        "Es tut mir leid, dabei kann ich dir leider nicht helfen.",
    ],
)
def test_answers_that_decline(text):
    assert refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that! Here are three things that may help.",
        "Sorry for the delay. The parcel arrives on Monday.",
        "You cannot divide by zero, as the result is not defined.",
        'The letter should say: "Dear Sir, I cannot attend."',
        "作为人工智能助手，我将为您提供准确、没有偏见的回答。",
        "抱歉让您久等了，订单已经发出。",
        "As an AI researcher, she published forty papers.",
        PROSE + " I'm sorry, but I can't help with that.",
    ],
)
def test_answers_that_do_not_decline(text):
    assert refusal(text) == ""


def test_texts_that_go_round_in_circles():
    assert "% of what stands in it stood there before" in repetition("the boat goes out to sea again and " * 12)
    assert repetition("渔船在日出之前出海，" * 12)
    late = " ".join(f"word{number}" for number in range(600)) + " and so it goes on and on" * 14
    assert "% of what stands in its end" in repetition(late)
    assert repetition("no" + "o" * 40) == "one letter stands 41 times in a row"
    song = "\n".join(f"verse {n} tells of boat {n} and of what it caught\nrow the boat to shore" for n in range(12))
    dashes = "| a | b | c |\n" + "|---|---|---|\n" * 40
    for text in (PROSE, CHINESE, PROSE + PROSE[:100], song, dashes, "=" * 90, "ha ha ha ha ha", ""):
        assert repetition(text) == ""


def test_texts_read_in_a_wrong_encoding():
    words = ["naïve café", "It’s “good”", "Zürich – Genève", "señor"]
    for word in words:
        assert mojibake(word) == ""
        assert "read as Latin-1" in mojibake(word.encode().decode("latin-1"))
        assert "read as Latin-1" in mojibake(word.encode().decode("cp1252", "ignore"))
    misread = CHINESE.encode().decode("gb18030", "replace")
    assert "'港口在一' in UTF-8 read as GBK" in mojibake(misread[:6])
    assert mojibake(misread.replace("\ufffd", "?"))
    for text in ("caf\ufffd", "手持两把锟斤拷", "it\x92s", "the boat鈥檚 name"):
        assert mojibake(text)
    # Good texts, among them what looks odd.
    rng = random.Random(0)
    random_han = ["".join(chr(rng.randrange(0x4E00, 0x9FA6)) for _ in range(300)) for _ in range(300)]
    for text in (
        PROSE,
        CHINESE,
        "Ã",
        "São Paulo, NÃO",
        "Å Â °",
        "£ © ½ × ÷",
        "日本語です",
        "Привет, это тест",
        "汞齐又叫汞鈥",
        *random_han,
    ):
        assert mojibake(text) == ""


def test_only_answers_that_a_model_shall_learn_are_judged():
    bad, good = "I cannot help with that.", "Of course."
    cases = [
        (talk("q", bad), "turn 2"),
        (talk("q", good, "q", bad, system="s"), "turn 5"),
        (talk(bad, good), None),
        ({"prompt": "q", "chosen": bad, "rejected": good}, "turn 2"),
        ({"prompt": "q", "chosen": good, "rejected": bad}, None),
        ({**talk("q", bad), "label": True}, "turn 2"),
        ({**talk("q", bad), "label": False}, None),
        ({"prompt": "q", "answer": bad}, None),
        ({"text": bad}, "it declines"),
    ]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": bad}, {"from": "human", "value": "q"}]
    answers = {"chosen": {"from": "gpt", "value": good}, "rejected": {"from": "gpt", "value": bad}}
    cases.append(({"conversations": turns, **answers}, None))
    unmarked = talk("q", bad, "q", good)
    unmarked["messages"][1]["loss"] = False
    for row, expected in [*cases, (unmarked, None)]:
        found = verdict(row, "quality")
        assert (found is None) == (expected is None)
        assert found is None or (found.reason == "refusal" and found.message.startswith(expected))
    assert verdict(talk("q", bad), "quality:signs=truncated,mojibake") is None


@pytest.mark.skipif(not SHARED.exists(), reason=NO_SHARED)
def test_published_answers_are_left_alone_and_cut_ones_are_found():
    rng = random.Random(0)
    for language, least in (("en", 0.6), ("zh", 0.55)):
        rows = json.loads((SHARED / "samples" / f"alpaca_{language}_demo.json").read_text(encoding="utf-8"))
        answers = [row["output"] for row in rows]
        named = [text for text in answers if truncated(text) or mojibake(text) or repetition(text)]
        assert len(named) <= 7
        assert sum(bool(refusal(text)) for text in answers) <= 25
        long = [text for text in answers if len(text) > 200]
        cut = [text[: rng.randint(100, len(text) - 5)] for text in long]
        assert sum(bool(truncated(text)) for text in cut) > least * len(cut)
        guesses = [language_of(row["instruction"] + "\n" + row["output"]) for row in rows]
        assert guesses.count(language) > 0.97 * len(rows)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (PROSE, "en"),
        (CHINESE, "zh"),
        ("Paris", "en"),
        ("", "other"),
        ("42 + 17", "other"),
        ("Der Hund ist nicht im Haus, und die Katze ist es auch nicht.", "de"),
        ("Le chat est sur la table et le chien dort dans la maison.", "fr"),
        ("El perro no está en la casa, pero el gato está en el jardín.", "es"),
        ("O gato não está em casa, mas o cão está no jardim com uma bola.", "pt"),
        ("Il gatto non è nella casa, ma il cane è con gli altri.", "it"),
        ("De hond is niet in het huis en de kat ook niet.", "nl"),
        ("Привет, как дела у вас сегодня?", "ru"),
        ("Привіт, як справи у вас сьогодні?", "other"),
        ("東京は日本の首都です。", "ja"),
        ("カタカナ", "ja"),
        ("안녕하세요, 오늘 날씨가 좋습니다.", "ko"),
        ("مرحبا بالعالم، كيف حالك اليوم", "ar"),
        ("سلام، امروز چطوری؟ من خوبم، گرمه", "other"),
        ("Ο κόσμος είναι μεγάλος", "el"),
        ("שלום עולם, מה שלומך", "he"),
        ("नमस्ते दुनिया, आप कैसे हैं", "hi"),
        ("สวัสดีชาวโลก", "th"),
        ("Xin chào các bạn, hôm nay trời đẹp quá phải không nào các bạn của tôi ơi", "other"),
        ("请解释 machine learning 的概念", "zh"),
        ("请用 Python 写一个函数：\n```python\ndef f(x):\n    return x\n```", "zh"),
        ("import os\ndef f(x):\n    return os.path.join(x)\nprint(f(1))", "code"),
        ("```python\nprint(1)\n```", "code"),
    ],
)
def test_languages_are_guessed_from_script_and_little_words(text, language):
    assert language_of(text) == language
    assert language in LANGUAGES


def test_a_language_is_kept_or_dropped():
    for said, stays in (("keep=en,zh", True), ("keep=zh", False), ("drop=zh", True), ("drop=en,de", False)):
        found = verdict({"text": PROSE}, f"language:{said}")
        assert (found is None) == stays
        assert stays or (found.reason, found.message) == ("language", "looks like en")
    assert verdict(talk(PROSE, CHINESE), "language:keep=zh,of=answers") is None
    assert verdict(talk(PROSE, CHINESE), "language:keep=zh,of=prompt") is not None
