"""What is asked, what temper generate writes, and conversations."""

import io
import json
import signal
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from generate_world import CONTEXT, MOST, ROWS

from data_preprocessing.records import Conversation, record
from data_preprocessing.turns import Message
from toolkits.cli import temper
from toolkits.foundation.errors import (
    DataError,
    exit_code_of,
)
from toolkits.generation import terminal
from toolkits.generation.prompts import question_of, read_questions, with_system
from toolkits.generation.session import Session


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_asked_up_to_their_last_answer(tmp_path, name):
    row, turns, expected = ROWS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = read_questions(tmp_path / "rows.jsonl")
    assert " ".join(turn.role[0] + turn.content for turn in question.messages) == turns
    assert question.expected == expected and question.where == f"{tmp_path}/rows.jsonl:1"
    with_one = with_system([question], "S")[0].messages
    assert with_one[0] == Message("system", "s" if turns.startswith("s") else "S")


def test_lines_of_text_are_questions(tmp_path):
    (tmp_path / "lines.txt").write_text("one {\r\n\n two 你\n")
    found = read_questions(tmp_path / "lines.txt")
    assert [one.text for one in found] == ["one {", " two 你"] and found[1].where.endswith("lines.txt:3")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "three"}\n')
    assert [one.text for one in read_questions(tmp_path / "*s.*")] == ["one {", " two 你", "three"]
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"blank.txt: nothing is asked"):
        read_questions(tmp_path / "blank.txt")


def test_rows_that_ask_nothing_are_listed(tmp_path):
    rows = ['{"prompt": "q"}', '{"nothing": 1}', "{", '{"messages": [{"role": "assistant", "content": "a"}]}']
    rows.append('{"prompt": "q", "chosen": "a", "answer": "b", "rejected": "a"}')
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError) as caught:
        read_questions(tmp_path / "rows.jsonl")
    for line, said in ((2, "no known layout"), (3, "expected"), (4, "turn 1 is assistant"), (5, "same answer")):
        assert any(f"rows.jsonl:{line}: " in one and said in one for one in str(caught.value).splitlines()), line


def run(*words, stdin=None):
    return CliRunner().invoke(temper, [str(word) for word in words], input=stdin)


def test_generate_writes_rows_that_are_read_again(base, generator, tmp_path):
    rows = [ROWS["two turns"][0], {"prompt": "x", "completion": "y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("generate", base, "--prompt", "hi", "--input", tmp_path / "rows.jsonl", "--max-new-tokens", MOST)
    result = run(*words, "--output", tmp_path / "out.jsonl", "--system", "be kind")
    assert result.exit_code == 0, result.output
    assert f"written {tmp_path / 'out.jsonl'}: 3 answers of " in result.stderr and result.stdout == ""
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"][0] for row in found] == [{"role": "system", "content": "be kind"}] * 3
    assert [row.get("expected") for row in found] == [None, "g", "y"]
    asked = with_system([question_of("hi"), *read_questions(tmp_path / "rows.jsonl")], "be kind")
    for row, answer in zip(found, generator.answer_all(asked, batch_size=1), strict=True):
        talk = record(row)
        assert isinstance(talk, Conversation) and talk.messages[-1].content == row["completion"] == answer.text
        assert (row["tokens"], row["finish_reason"]) == (answer.num_tokens, answer.reason)
    refused = run(*words, "--output", tmp_path / "out.jsonl", "--adapter", tmp_path / "not looked at")
    assert exit_code_of(refused.exception) == 2 and "output exists already" in str(refused.exception)


def test_generate_reads_stdin_and_prints(base, generator):
    (answer,) = generator.answer_all([question_of("hi")], batch_size=1)
    result = run("generate", base, "--prompt", "hi", "--max-new-tokens", MOST)
    assert result.exit_code == 0 and result.stdout == answer.text + "\n"
    both = run("generate", base, "--prompt", "hi", "--prompt", "hi", "--max-new-tokens", MOST)
    assert (
        both.stdout == f"> hi\n{answer.text}\n\n> hi\n{answer.text}\n"
        and f"2 answers of {2 * MOST} tokens" in both.stderr
    )
    raw = run("generate", base, "--prompt", "hi", "--no-template", "--output", "-", "--max-new-tokens", 3)
    row = json.loads(raw.stdout)
    assert row["prompt"] == "hi" and row["tokens"] == 3 and row["completion"] != answer.text[:3]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "say what to answer"),
        (("--prompt", "a", "--no-template", "--system", "b"), 2, "leave one of them out"),
        (("--prompt", "a", "--top-k", "3"), 2, "above 0"),
        (("--input", "nowhere.jsonl"), 3, "nowhere.jsonl: no such file"),
        (("--prompt", ""), 0, ""),
        (("--prompt", "", "--no-template"), 3, "the text is empty"),
    ],
)
def test_generate_says_what_is_wrong(base, words, code, message):
    error = run("generate", base, *words, "--max-new-tokens", "1").exception
    assert (0 if error is None else exit_code_of(error)) == code and message in str(error)


def ask(session, text, *, stopped=lambda: False):
    pieces = []
    reply = session.ask(text, say=pieces.append, stopped=stopped)
    return reply, pieces


def test_a_conversation_is_remembered_and_streamed(generator, monkeypatch):
    read = []
    monkeypatch.setattr(generator.decoder, "decode", spy(generator.decoder.decode, read))
    session = Session(generator, "be kind")
    reply, pieces = ask(session, "hi")
    assert "".join(pieces) == reply.answer.text and sum(map(bool, pieces)) > 5
    again, _ = ask(session, "and you?")
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", reply.answer.text), ("user", "and you?")]
    messages = tuple(Message(*turn) for turn in turns)
    assert again.answer.question.messages == messages and again.num_forgotten == 0
    assert read[1] == generator.texts.tokens(again.answer.question)
    session.reset()
    assert ask(session, "hi")[0].answer.text == reply.answer.text


def spy(decode, read):
    def spying(questions, numbers, *, watching):
        read.append(list(questions[0]))
        return decode(questions, numbers, watching=watching)

    return spying


def test_the_oldest_turns_leave_whole_when_the_model_can_read_no_more(generator):
    session, forgotten = Session(generator, "S"), []
    for letter in "abcdef":
        before = session.turns
        reply, _ = ask(session, letter * 30)
        forgotten.append(reply.num_forgotten)
        read = reply.answer.question.messages
        assert read == (Message("system", "S"), *before[2 * forgotten[-1] :], Message("user", letter * 30))
        assert len(generator.texts.tokens(reply.answer.question)) + MOST <= CONTEXT
        if forgotten[-1]:  # none that would have fitted
            kept = Conversation((read[0], *before[2 * forgotten[-1] - 2 :], read[-1]), "chat")
            assert len(generator.texts.tokens(replace(reply.answer.question, conversation=kept))) + MOST > CONTEXT
    assert forgotten[0] == 0 and sum(forgotten) >= 2, forgotten
    before = session.turns
    with pytest.raises(DataError, match=r"the question is \d+ tokens long, and the model reads 192"):
        ask(session, "x" * 200)
    assert session.turns == before


def test_a_stopped_answer_is_remembered_as_far_as_it_came(generator):
    session, asked = Session(generator), []
    reply, pieces = ask(session, "hi", stopped=lambda: asked.append(1) or len(asked) == 3)
    assert (reply.answer.reason, reply.answer.num_tokens) == ("interrupted", 3)
    assert session.turns == (Message("user", "hi"), Message("assistant", "".join(pieces)))


def talk(generator, monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    session = Session(generator)
    terminal.talk(session)
    return session


def test_commands_of_a_chat(generator, monkeypatch, capsys):
    session = talk(
        generator, monkeypatch, "hi\n\n/system be kind\nyou\n/nix\n/etc/hosts is?\n" + "x" * 200 + "\n/help\n"
    )
    said = capsys.readouterr()
    assert session.system == "be kind"
    assert [turn.content for turn in session.turns[::2]] == ["you", "/etc/hosts is?"]
    assert "(the system turn is 'be kind'; what was said is forgotten)" in said.err
    assert "(no command /nix; there are /reset" in said.err and "/reset          forget" in said.err
    assert "(error: the question is" in said.err and f"(cut after {MOST} tokens" in said.err
    assert session.turns[1].content in said.out
    left = talk(generator, monkeypatch, "hi\n/reset\n/quit\nnever asked\n")
    assert left.turns == () and "(forgotten)" in capsys.readouterr().err


def test_one_ctrl_c_stops_an_answer_and_two_leave(generator, monkeypatch, capsys):
    step = generator.decoder.decode

    def interrupted(times):
        def decode(*arguments, **options):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            return step(*arguments, **options)

        return decode

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(generator.decoder, "decode", interrupted(1))
    session = talk(generator, monkeypatch, "one\ntwo\n")
    assert [turn.role for turn in session.turns] == ["user", "assistant"] * 2
    assert capsys.readouterr().err.count("(stopped; Ctrl-C again leaves)") == 2
    monkeypatch.setattr(generator.decoder, "decode", interrupted(2))
    assert talk(generator, monkeypatch, "one\ntwo\n").turns == ()
    assert signal.getsignal(signal.SIGINT) is handler


def test_two_ctrl_c_at_the_prompt_leave(generator, monkeypatch, capsys):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    terminal.talk(Session(generator))
    assert capsys.readouterr().err == "(Ctrl-C again leaves)\n"


def test_chat_is_a_command(base):
    result = run("chat", base, "--max-new-tokens", 2, "--system", "be kind", stdin="hi\n/quit\n")
    assert result.exit_code == 0 and "(cut after 2 tokens" in result.stderr


def test_a_chat_that_is_interrupted_anywhere_ends_well(base, monkeypatch):
    def interrupt(session):
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "talk", interrupt)
    assert run("chat", base).exit_code == 0
