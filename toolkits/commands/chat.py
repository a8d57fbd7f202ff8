"""`temper chat`: a conversation with a HuggingFace checkpoint."""

import contextlib
from typing import Any

import click

from .generate import model_options, settings_of


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@model_options
def chat(system: str | None, **choices: Any) -> None:
    """Talk with the HuggingFace checkpoint HF_DIR, with or without a LoRA adapter; a line is a question.

    Earlier questions and answers are remembered as long as the model can read them. /reset forgets them, /system TEXT
    says how to speak, /quit leaves; Ctrl-C stops an answer, twice leaves.
    """
    from ..generation.answering import Generator
    from ..generation.session import Session
    from ..generation.terminal import talk

    # Whenever it comes, Ctrl-C is how people leave; nothing is lost that could be gone on with.
    with contextlib.suppress(KeyboardInterrupt):
        talk(Session(Generator(*settings_of(**choices)), system or ""))
