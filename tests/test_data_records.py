"""Reading: what is accepted, and what a user is told about a row that is not."""

import json

import pytest

from data_preprocessing.reading import ReadReport, read_rows
from data_preprocessing.records import Document, conversation, record
from data_preprocessing.row_error import RowError
from data_preprocessing.rows import parse_row
from data_preprocessing.turns import Message
from toolkits.foundation.errors import DataError, UsageError

ALPACA = {"instruction": "问", "output": "答"}


def read(path, **options):
    report = ReadReport()
    rows = [(row.line, parse_row(row, **options)) for row in read_rows(path, report, **options)]
    return rows, report


def said_of(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


def turns(value, **options):
    return [(message.role, message.content) for message in conversation(value, **options).messages]


def test_a_text_is_a_document_unless_the_row_is_a_conversation_too():
    assert record({"text": "t\n", "url": "u"}) == Document("t\n")
    assert record({**ALPACA, "text": "Below is an instruction ..."}) == conversation(ALPACA)
    for text, reason in (("", "empty_text"), (" \n", "empty_text"), (None, "type"), ("a\0", "character")):
        with pytest.raises(RowError) as caught:
            record({"text": text})
        assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt"])
def test_lists_and_lines_are_told_apart_by_content(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert read(path)[0] == [(1, {"a": 1}), (2, {"a": 2})]
    assert read(path)[1].kind == "JSONL"
    path.write_text('\n[\n  {"a":\n   1},\n\n  {"a": 2}, 3\n]\n')
    assert read(path)[0] == [(3, {"a": 1}), (6, {"a": 2}), (6, 3)]
    assert read(path)[1].kind == "JSON list"


def test_an_empty_list_and_an_empty_file_have_no_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(" [ ] ")
    assert read(path)[0] == []
    path.write_text("")
    assert read(path)[0] == []


def test_marks_crlf_and_blank_lines_are_accepted_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    rows, report = read(path)
    assert rows == [(1, {"a": 1}), (4, {"a": 2})]
    assert report.notes == {"byte order mark": 1, "CRLF lines": 2, "blank lines": 2}
    path.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert read(path)[0] == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"instruction": "abc", "output": "defghi" "x": 1}\n', "expected ',' or '}' at column 43"),
        ('{"history": [[1, 2] [3]]}\n', r"expected ',' or '\]' at column 21"),
        ("{'a': 1}\n", "expected property name"),
        ('{"a": "unend', "last line has no newline: file may be incomplete"),
        ("[" * 5 + "{" * 100_000, "at column|nested too deeply"),
    ],
)
def test_a_malformed_line_is_explained_and_clipped(tmp_path, line, said):
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": 1}\n' + line)
    row = list(read_rows(path, ReadReport()))[1]
    with pytest.raises(RowError, match=said) as caught:
        parse_row(row)
    assert (row.line, caught.value.reason) == (2, "syntax")
    assert len(str(caught.value)) < 300


def test_a_malformed_list_is_located_by_line(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('[\n{"a": 1},\n{"a": 2\n "b": 3}\n]')
    assert f"{path}:4: expected ',' or '}}' at column 2" in said_of(path)
    path.write_text('[\n{"a": 1}\n{"a": 2}\n]')
    assert f"{path}:3: expected ',' or ']' behind an element" in said_of(path)
    for cut in ('[\n{"a": 1},\n{"a": "2', '[\n{"a": 1}', '[\n{"a": 1},\n'):
        path.write_text(cut)
        assert "file may be incomplete" in said_of(path), cut
    path.write_text('[{"a": 1}]\n{"b": 2}')
    assert "something follows behind the closing" in said_of(path)


def test_bytes_of_another_encoding_are_located_and_read_on_request(tmp_path):
    path = tmp_path / "gbk.jsonl"
    path.write_bytes(b'{"a": 1}\n' + json.dumps(ALPACA, ensure_ascii=False).encode("gbk") + b"\n")
    said = said_of(path)
    assert "byte offset 26 is not utf-8" in said
    assert "try --encoding gb18030" in said
    assert read(path, encoding="gb18030")[0][1] == (2, ALPACA)
    path.write_bytes(b'[{"a": 1},\n' + json.dumps(ALPACA, ensure_ascii=False).encode("gbk") + b"]")
    assert f"{path}:2: byte" in said_of(path)
    assert read(path, encoding="gbk")[0][1] == (2, ALPACA)
    path.write_bytes(b'{"a": "\xff\xff"}\n')
    assert "give the file's encoding" in said_of(path)


def test_utf16_and_unknown_encodings_are_refused_by_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}', encoding="utf-16")
    assert "UTF-16; convert it first: iconv" in said_of(path)
    with pytest.raises(UsageError, match="--encoding klingon: no such encoding"):
        read(path, encoding="klingon")


def test_alpaca_joins_instruction_and_input_by_a_newline():
    assert turns(ALPACA) == [("user", "问"), ("assistant", "答")]
    assert turns({**ALPACA, "input": "据"})[0] == ("user", "问\n据")
    assert turns({**ALPACA, "input": ""})[0] == ("user", "问")
    assert turns({**ALPACA, "input": None, "history": None, "system": None})[0] == ("user", "问")
    assert turns({**ALPACA, "instruction": "", "input": "据"})[0] == ("user", "据")
    history = {**ALPACA, "system": "S", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert turns(history) == [
        ("system", "S"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"),
        ("user", "问"), ("assistant", "答"),
    ]  # fmt: skip


def test_messages_and_sharegpt_read_alike():
    messages = {
        "messages": [{"role": r, "content": c} for r, c in [("system", "S"), ("user", "q"), ("assistant", "a")]]
    }
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "S"}
    assert turns(messages) == turns(sharegpt) == [("system", "S"), ("user", "q"), ("assistant", "a")]
    plain = {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "tools": ""}
    assert turns(plain) == [("user", "q"), ("assistant", "a")]
    assert [conversation(row).layout for row in (messages, sharegpt, ALPACA)] == ["messages", "sharegpt", "alpaca"]


def chat(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("value", "reason", "said"),
    [
        ([1], "layout", "must be a JSON object, this one is a list"),
        (
            {"prompt": "p"},
            "layout",
            "expected one of the keys messages, conversations, instruction, prompt and completion, text; found prompt",
        ),
        ({"instruction": "q"}, "type", "output is missing"),
        ({**ALPACA, "output": None}, "type", "output must be a string, it is null"),
        ({**ALPACA, "history": [["q"]]}, "type", r"history\[0\] must be \[question, answer\]"),
        ({**ALPACA, "history": [["q", 1]]}, "type", r"history\[0\]\[1\] must be a string, it is number"),
        ({"messages": "hi"}, "type", "messages must be a list, it is a string"),
        ({"messages": ["hi"]}, "type", r"messages\[0\] must be an object"),
        (chat(("user", "q"), ("assistant", 3)), "type", r"messages\[1\].content must be a string, it is number"),
        (chat(("user", [{"type": "text"}])), "type", r"messages\[0\].content must be a string, it is list"),
        (chat(("user", "q"), ("assistant", None)), "type", r"messages\[1\].content must be a string, it is null"),
        ({"messages": [{"role": "user"}]}, "type", r"messages\[0\].content must be a string, it is null"),
        (chat(("user", "a\0b"), ("assistant", "x")), "character", r"messages\[0\].content has a NUL character at .* 1"),
        (
            {**ALPACA, "output": "x\ud83d"},
            "character",
            r"output has half of a surrogate pair \(U\+D83D\) at character 1",
        ),
        (chat(("user", "q"), ("assistant", " \n")), "empty_answer", "turn 2 is an empty assistant turn: no trainable"),
        (chat(("critic", "q")), "role", r"messages\[0\].role is 'critic'; known roles: system, user, human"),
        ({"messages": [{"content": "q"}]}, "role", r"messages\[0\].role is missing; known roles"),
        ({"conversations": [{"from": 3, "value": "q"}]}, "role", r"conversations\[0\].from is 3; known roles"),
        (chat(), "turns", "has no turns"),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "turns", "turns 1 and 2 are both user; --merge-con"),
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "turns", "turns 2 and 3 are both assistant"),
        (chat(("user", "a"), ("system", "s"), ("assistant", "b")), "turns", "turn 2 is system; only the first may be"),
        (chat(("assistant", "a")), "turns", "turn 1 is assistant; the first turn .* must be user"),
        (chat(("system", "s"), ("assistant", "a")), "turns", "turn 2 is assistant; the first turn .* must be user"),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c")), "turns", "turn 3, the last, is user: no answer"),
        (chat(("system", "s")), "turns", "turn 1, the last, is system: no answer"),
    ],
)
def test_a_bad_row_is_named(value, reason, said):
    with pytest.raises(RowError, match=said) as caught:
        conversation(value)
    assert caught.value.reason == reason


def test_neighbours_of_one_role_are_joined_on_request():
    row = chat(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"))
    assert turns(row, merge_consecutive=True) == [("user", "a\nb"), ("assistant", "c\nd")]


def test_an_escaped_lone_surrogate_reaches_the_check(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "q", "output": "\\ud800"}\n{"instruction": "q", "output": "\\ud83d\\ude42"}\n')
    rows = [value for _, value in read(path)[0]]
    with pytest.raises(RowError, match="half of a surrogate pair"):
        conversation(rows[0])
    assert conversation(rows[1]).messages[1] == Message("assistant", "🙂")
