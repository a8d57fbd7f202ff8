"""A model's own chat template: Jinja rendered as transformers renders it, with what an assistant wrote marked.

A template is somebody else's program, so it runs in Jinja's sandbox and sees nothing but plain strings.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from toolkits.foundation.errors import DataError

from .flow import copies_contents
from .masks import Span
from .row_error import RowError
from .tokenizer import read_json
from .turns import Message

# Halves of surrogate pairs cannot occur in a checked message, so they are free to stand for something else.
_OPEN, _CLOSE = "\ud800", "\ud801"

# What a template raises on purpose, and what its expressions raise on values they were not written for.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML_SOURCE = "ChatML, because the tokenizer has no chat template"


@dataclass(frozen=True)
class TemplateSource:
    """The text of a chat template and where it came from."""

    text: str
    origin: str

    @property
    def sha256(self) -> str:
        """Return the hash that the manifest keeps."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def find_template(folder: Path, config: Mapping[str, Any]) -> TemplateSource:
    """Return the chat template of a tokenizer folder, ChatML when it has none.

    `config` is the content of tokenizer_config.json. The order is transformers': a file of its own wins.
    """
    if (folder / "chat_template.jinja").exists():
        return TemplateSource((folder / "chat_template.jinja").read_text(encoding="utf-8"), "chat_template.jinja")
    beside = read_json(folder / "chat_template.json")
    for origin, content in (("chat_template.json", beside), ("tokenizer_config.json", config)):
        template = content.get("chat_template")
        if isinstance(template, list):  # several by name; the one for chatting is called default
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        if template:
            return TemplateSource(template, origin)
    return TemplateSource(CHATML, CHATML_SOURCE)


class ChatTemplate:
    """A compiled template; `variables` are what it sees beside the messages (bos_token, ...).

    `copies_contents`: it does nothing with what messages say but to copy it.
    """

    def __init__(self, source: TemplateSource, variables: Mapping[str, str]) -> None:
        self.source = source
        self._variables = dict(variables)
        environment = _environment()
        try:
            self._compiled = environment.from_string(source.text)
            self.copies_contents = copies_contents(environment.parse(source.text))
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template ({source.origin}) cannot be compiled: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """Return the rendered text and the spans of it that the template marks as generated.

        Raises RowError `template` when the template refuses the messages.
        """
        try:
            marked = self._compiled.render(
                messages=[message.for_template() for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except REFUSALS as error:
            raise RowError("template", f"the chat template refuses this conversation: {error}") from None
        return _unmarked(marked)


def _unmarked(marked: str) -> tuple[str, list[Span]]:
    """Take the marks out of a rendered text; spans are returned in characters of what is left."""
    if _OPEN not in marked:
        return marked, []
    pieces, spans, length = [], [], 0
    for index, piece in enumerate(marked.split(_OPEN)):
        inside, closed, behind = piece.partition(_CLOSE) if index else ("", "", piece)
        if closed:
            spans.append((length, length + len(inside)))
        pieces += [inside, behind]
        length += len(inside) + len(behind)
    return "".join(pieces), spans


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what stands between was written by the assistant."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own protocol

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class _PlainNamespace(Namespace):
    """Jinja's `namespace()` without underscore names, which would reach into Python itself."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        for name in dict(*args, **values):
            _refuse_private(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_PlainNamespace, dict=_dict
    )
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


def _tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)
