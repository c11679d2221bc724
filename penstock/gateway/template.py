"""Chat templates: Jinja in a sandbox, with what Hugging Face templates are written against.

They expect trimmed blocks, `break` and `continue`, a `generation` block (a mark for trainers, plain text here),
`tojson` that leaves HTML characters alone, `raise_exception`, `strftime_now` and the special tokens by name.
A template is part of the model folder, so it is as trusted as the model; the sandbox keeps mistakes from reaching
Python. What it raises is the caller's error: most templates complain about the order of roles.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.core.errors import BadModel, BadRequest


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template and the names it may use."""

    def __init__(self, source: str, names: Mapping[str, str], where: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise BadModel(f"the chat template in {where} does not parse: {error}") from None
        self.source = source
        self._names = dict(names)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model was trained to see it. Raises BadRequest when the template refuses."""
        told = {
            **self._names,
            **(extras or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(told)
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise BadRequest(
                f"the model's chat template refuses this conversation: {error}", param="messages"
            ) from None
