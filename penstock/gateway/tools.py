"""Tools that a chat may call: what the caller offers, and what an answer that must call looks like.

With `tool_choice` "auto" the model writes what it likes, and calls are found in it (gateway.parts). With "required",
or a function by name, a grammar leaves it no other way than to call, with arguments that keep the function's schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from penstock.core.errors import BadRequest
from penstock.core.types import Grammar
from penstock.engine.grammar import SPACE
from penstock.gateway.errors import Unsupported
from penstock.gateway.marks import THINK, THOUGHT, CallForm, Thinking
from penstock.gateway.text import TextModel

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: str
    function: Function


class Named(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str


class Chosen(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    function: Named


def offered(
    tools: Sequence[Tool] | None, choice: str | Chosen | None, form: CallForm | None
) -> Sequence[Tool]:
    """The tools that the model is shown; none where it shall not call. Raises BadRequest."""
    for place, tool in enumerate(tools or ()):
        if tool.type != "function":
            name = f"tools[{place}].type"
            raise Unsupported(f"{name}: only functions are supported", param=name)
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise BadRequest(
            f"tool_choice: {choice!r} is not one of none, auto, required", param="tool_choice"
        )
    if not tools:
        if choice == "required" or isinstance(choice, Chosen):
            raise BadRequest("tool_choice needs tools", param="tool_choice")
        return ()
    if isinstance(choice, Chosen) and choice.function.name not in _names(tools):
        known = ", ".join(_names(tools))
        raise BadRequest(
            f"tool_choice: {choice.function.name!r} is not among the tools: {known}",
            param="tool_choice",
        )
    if choice == "none":
        return ()
    if form is None:
        raise Unsupported(
            "this model's chat template does not know tools, or in a form not known here",
            hint="set gateway.tools to hermes, mistral or llama if the model was trained on one",
            param="tools",
        )
    return tools


def _names(tools: Sequence[Tool]) -> list[str]:
    return [tool.function.name for tool in tools]


def as_template_wants(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    return [msgspec.to_builtins(tool) for tool in tools] or None


def call_grammar(
    tools: Sequence[Tool],
    choice: str | Chosen | None,
    form: CallForm,
    text: TextModel,
    *,
    is_parallel: bool,
) -> Grammar | None:
    """What an answer looks like that must call; None where it may do as it likes."""
    if choice != "required" and not isinstance(choice, Chosen):
        return None
    wanted = None if choice == "required" else choice.function.name  # type: ignore[union-attr]
    some = [tool.function for tool in tools if wanted in (None, tool.function.name)]
    rules = [f"call: {' | '.join(f'f{place}' for place in range(len(some)))}"]
    rules += [f"f{place}: %json {_call(function, form)}" for place, function in enumerate(some)]
    opening = _literal(form.opening, text)
    if form.closing is not None:
        one = f'{opening} "\\n" call "\\n" {_literal(form.closing, text)}'
        body = f'{one} ("\\n" {one})*' if is_parallel else one
    elif form.is_list:
        body = f'{opening} "[" call (", " call)* "]"' if is_parallel else f'{opening} "[" call "]"'
    else:
        body = "call"
    return Grammar(kind="lark", text="\n".join([f"start: {body}", *rules]))


def _call(function: Function, form: CallForm) -> str:
    schema = {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            form.key: function.parameters or {"type": "object"},
        },
        "required": ["name", form.key],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    return msgspec.json.encode(schema).decode()


def _literal(mark: str, text: TextModel) -> str:
    """A mark inside a grammar: its token where it is a special one, else its letters."""
    id = text.special_id(mark)
    return msgspec.json.encode(mark).decode() if id is None else f"<[{id}]>"


def behind_thought(grammar: Grammar, thinking: Thinking, text: TextModel) -> Grammar:
    """The grammar of an answer that may think first; one whose first line is no start rule has no room for that."""
    if thinking == "never":
        return grammar
    match grammar.kind:
        case "json_schema":
            schema = msgspec.json.decode(grammar.text)
            spaced = {**schema, "x-guidance": SPACE} if isinstance(schema, dict) else schema
            rules = [f"%json {msgspec.json.encode(spaced).decode()}"]
        case "regex":
            rules = [f"/{grammar.text.replace('/', chr(92) + '/')}/"]
        case "lark":
            first, *rest = grammar.text.split("\n")
            if not first.startswith("start: "):
                return grammar
            rules = [first.removeprefix("start: "), *rest]
    thought = _literal(THOUGHT, text)
    if text.special_id(THOUGHT) is None:
        think = [f"thought[suffix={thought}]: /(.|\\n)*/"]
    else:
        think = [f"thought: /(.|\\n)*/ {thought}"]
    begin = "thought" if thinking == "at once" else f"({_literal(THINK, text)} thought)?"
    start = f"start: {begin} /\\n*/ answer"
    answer, *others = rules
    return Grammar(kind="lark", text="\n".join([start, *think, f"answer: {answer}", *others]))
