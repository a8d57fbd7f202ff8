"""The conversation on a terminal, or through a pipe: lines in, answers out while they come."""

import contextlib
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from ..foundation.errors import DataError, TemperError
from .session import Reply, Session
from .texts import for_terminal

HELP = """\
/reset          forget every question and answer
/system TEXT    speak as TEXT says from now on, and forget; without TEXT: no system turn
/quit           leave, as Ctrl-D does
Ctrl-C stops an answer; twice leaves. The answer to a line that begins with a blank is never a command's."""
_COMMAND = re.compile(r"/(\w*)(?:\s+(.*))?", re.DOTALL)


class Leave(Exception):
    """The user has had enough."""


class Interrupts:
    """Counts Ctrl-C: the first stops an answer, the second leaves."""

    def __init__(self) -> None:
        self.count = 0

    def stopped(self) -> bool:
        """Whether the answer that comes is to be broken off."""
        return self.count > 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count in the block instead of raising; the second leaves at once."""

        def hear(number: int, frame: FrameType | None) -> None:
            self.count += 1
            if self.count > 1:
                raise Leave

        before = signal.signal(signal.SIGINT, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def talk(session: Session) -> None:
    """Ask what stands on stdin, a line at a time, until it ends, /quit or two Ctrl-C."""
    interrupts = Interrupts()
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its arrows
        _note("a line is a question; /help says more")
    with contextlib.suppress(Leave):
        while True:
            line = _next_line(interrupts)
            try:
                _serve(session, line, interrupts)
            except DataError as error:  # the template refuses it, or it is too long: ask something else
                _note(f"error: {error}")


def _next_line(interrupts: Interrupts) -> str:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            raise Leave from None
        except KeyboardInterrupt:
            interrupts.count += 1
            print()
            if interrupts.count > 1:
                raise Leave from None
            _note("Ctrl-C again leaves")
            continue
        interrupts.count = 0
        if line.strip():
            return line


def _serve(session: Session, line: str, interrupts: Interrupts) -> None:
    """Do what a line says; one that begins with a slash and a word is a command."""
    command = _COMMAND.fullmatch(line)
    if command is None:
        _answer(session, line, interrupts)
        return
    word, text = command[1], (command[2] or "").strip()
    if word == "quit":
        raise Leave
    if word == "reset":
        session.reset()
        _note("forgotten")
    elif word == "system":
        session.system = text
        session.reset()
        _note(f"the system turn is {text!r}; what was said is forgotten" if text else "no system turn; forgotten")
    else:
        _note(HELP if word == "help" else f"no command /{word}; there are /reset, /system, /quit and /help")


def _answer(session: Session, line: str, interrupts: Interrupts) -> None:
    def say(text: str) -> None:
        sys.stdout.write(for_terminal(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    try:
        with interrupts.counted():
            reply = session.ask(line.strip(), say=say, stopped=interrupts.stopped)
    except (Leave, TemperError):
        print()
        raise
    print(flush=True)
    for note in _notes(reply, session):
        _note(note)


def _notes(reply: Reply, session: Session) -> Iterator[str]:
    if reply.num_forgotten:
        turns = f"{reply.num_forgotten} oldest questions with their answers" * (reply.num_forgotten > 1)
        yield f"the {turns or 'oldest question with its answer'} did not fit any more and was left out"
    if reply.answer.reason == "interrupted":
        yield "stopped; Ctrl-C again leaves"
    elif reply.answer.reason == "length":
        yield f"cut after {reply.answer.num_tokens:,} tokens (--max-new-tokens, or what the model can read)"
    if not reply.answer.text.strip():
        yield "the answer is empty; the question is forgotten"


def _note(text: str) -> None:
    print(f"({text})" if "\n" not in text else text, file=sys.stderr, flush=True)
