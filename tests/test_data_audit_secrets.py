"""Checksums of personal numbers, patterns of keys, and that no secret is ever shown."""

import json
import random

import pytest
from data_world import talk, write_rows, write_tokenizer

from data_preprocessing.audit.run import audit
from data_preprocessing.audit.secrets import is_chinese_id, keys, kind_of_number, mails, passes_luhn, personal_numbers

# Put together here, so that no scanner takes this file for one that holds keys.
KEYS = [
    "AK" + "IAIOSFODNN7EXAMPLE",
    "gh" + "p_" + "a1B2" * 9,
    "hf" + "_" + "aBcDeFgHiJ" * 3 + "kLmN",
    "sk" + "-proj-" + "a1b2C3d4" * 5,
    "AI" + "za" + "Sy0123456789abcdefghijklmnopqrstuvw",
    "xo" + "xb-123456789012-abcdefghijkl",
    "LT" + "AI5tAbCdEfGhIjKlMn",
    "ey" + "JhbGciOiJIUzI1NiJ9." + "ey" + "JzdWIiOiIxMjM0NTYifQ." + "c2lnbmF0dXJlMTIz",
]
NO_KEYS = ["sk-learn", "task-oriented-dialogue-systems-are-hard", "sk-this-is-only-a-long-name", "AKIA", "hf_model"]
CARDS = ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005", "6011111111111117", "6222021234567890128"]


def test_luhn_accepts_one_check_digit_of_ten():
    draw = random.Random(0)
    for _ in range(200):
        body = "".join(draw.choices("0123456789", k=15))
        right = [digit for digit in "0123456789" if passes_luhn(body + digit)]
        assert len(right) == 1
        # By hand: every second digit from the right, the check digit not counted, is doubled.
        doubled = [int(digit) * (2 if place % 2 == 0 else 1) for place, digit in enumerate(reversed(body))]
        total = sum(value if value < 10 else value - 9 for value in doubled)
        assert right == [str(-total % 10)]


def test_luhn_finds_a_wrong_digit_and_most_exchanged_neighbours():
    card = "4111111111111111"
    assert passes_luhn(card)
    for place in range(len(card)):
        other = card[:place] + str((int(card[place]) + 1) % 10) + card[place + 1 :]
        assert not passes_luhn(other)


def test_identity_numbers_have_a_date_and_a_check_character():
    assert is_chinese_id("11010519491231002X") and is_chinese_id("11010519491231002x")  # the standard's own example
    assert not is_chinese_id("110105194912310021")
    assert not is_chinese_id("11010519491331002X")  # month 13
    body = "44052418800101001"
    right = [last for last in "0123456789X" if is_chinese_id(body + last)]
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]  # as the standard lists them
    total = sum(int(digit) * weight for digit, weight in zip(body, weights, strict=True))
    assert right == ["10X98765432"[total % 11]]


@pytest.mark.parametrize("card", CARDS)
def test_cards(card):
    wrong = card[:-1] + str((int(card[-1]) + 1) % 10)
    assert kind_of_number(card) == "card" and kind_of_number(wrong) is None
    assert list(personal_numbers(f"pay with {card}, please")) == ["card"]


@pytest.mark.parametrize("number", ["13812345678", "+86 138 1234 5678", "(212) 736-5000", "+44 20 7946 0958"])
def test_telephone_numbers(number):
    assert list(personal_numbers(f"call {number} now")) == ["phone"]


@pytest.mark.parametrize(
    "number",
    ["1997-2005", "2012-09-30", "123 456 789", "555-0100", "(212) 555-1234", "12812345678", "3.14159265358979"],
)
def test_numbers_that_are_nobodys(number):
    assert list(personal_numbers(f"it is {number} now")) == []


def test_arithmetic_is_not_personal():
    draw = random.Random(0)
    lines = [f"{draw.randint(2, 999)} x {draw.randint(2, 99)} = {draw.randint(2, 99999)}" for _ in range(2000)]
    assert list(personal_numbers("\n".join(lines))) == []
    assert list(personal_numbers("84834150134 - 6778576 = -16666579378")) == []


@pytest.mark.parametrize("key", KEYS)
def test_keys(key):
    assert list(keys(f"export KEY={key}\n")) == ["api_key"]
    assert list(keys(key[:8])) == []


def test_private_keys_and_what_is_no_key():
    assert list(keys("-----BEGIN " + "RSA PRIVATE KEY-----\nMIIE")) == ["private_key"]
    assert [found for text in NO_KEYS for found in keys(text)] == []


def test_mail_addresses_but_those_of_examples():
    assert list(mails("write to jane.doe+x@mail.uni-bonn.de or a@b.cn.")) == ["email", "email"]
    assert list(mails("user@example.com, a@test.example.org, @handle, x @ y")) == []


@pytest.mark.parametrize("built", [False, True])
def test_secrets_are_counted_and_located_and_never_shown(tmp_path, built):
    from data_preprocessing.build import build

    folder = write_tokenizer(tmp_path / "tokenizer")
    rows = [talk(f"question number {number}", f"answer {number} of its own") for number in range(9)]
    rows[2] = talk("my key?", f"It is {KEYS[0]} and {KEYS[1]}.")
    rows[5] = talk("call 13812345678 or mail jane@uni-bonn.de", "I will, and use 11010519491231002X")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    if built:
        build(path, tmp_path / "set", tokenizer=folder)
        path = tmp_path / "set"
    report = audit([str(path)], tokenizer=folder)
    secrets, personal = report.findings
    assert (secrets.code, secrets.count, secrets.more) == ("secrets", 1, {"kinds": {"api_key": 2}})
    assert (personal.code, personal.count) == ("personal", 1)
    assert personal.more == {"kinds": {"email": 1, "phone": 1, "chinese_id": 1}}
    place = "row 2" if built else "rows.jsonl:3"
    assert secrets.places[0].startswith("API keys: ") and secrets.places[0].endswith(place)
    said = json.dumps(report.as_json())
    for secret in (*KEYS[:2], "13812345678", "jane@", "11010519491231002X"):
        assert secret not in said
    assert not report.harmful


def test_nothing_is_said_of_rows_without_any(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    path = write_rows(
        tmp_path / "rows.jsonl", [talk(f"{number} x 7?", f"{number * 7} @ {number}") for number in range(9)]
    )
    assert audit([str(path)], tokenizer=folder).findings == ()
