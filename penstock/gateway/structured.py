"""What an answer must look like: `response_format` as OpenAI has it, `structured_outputs` as vLLM has it.

    response_format      {"type": "json_schema", "json_schema": {"name": .., "schema": {..}}}; json_object; text
    structured_outputs   exactly one of json (a schema, or its text), json_object, regex, choice, grammar

A grammar may be written in Lark as llguidance reads it, or in GBNF as llama.cpp does. What is wrong with any of them
is the caller's error, told before anything is queued.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from llguidance import gbnf_to_lark
from msgspec import UNSET, Meta, UnsetType

from penstock.core.errors import BadRequest
from penstock.core.types import Grammar
from penstock.engine.grammar import choice_of
from penstock.gateway.text import TextModel

ANY_OBJECT = Grammar(kind="json_schema", text='{"type":"object"}')


class SchemaBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema: dict[str, Any] | None = None
    strict: bool | None = None  # a schema is always followed
    description: str | None = None


class FormatBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`response_format`."""

    type: str
    json_schema: SchemaBody | UnsetType = UNSET


class StructuredBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`structured_outputs`."""

    json: dict[str, Any] | bool | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None


def grammar_of(
    response_format: FormatBody | None, structured: StructuredBody | None
) -> Grammar | None:
    """What either of them asks for; None = any text. Raises BadRequest."""
    asked = None if response_format is None else _of_format(response_format)
    if structured is None:
        return asked
    if asked is not None:
        raise BadRequest(
            "response_format and structured_outputs cannot both be given", param="response_format"
        )
    return _of_structured(structured)


def _of_format(body: FormatBody) -> Grammar | None:
    match body.type:
        case "text":
            return None
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            if isinstance(body.json_schema, UnsetType):
                raise BadRequest(
                    "the required field 'response_format.json_schema' is missing",
                    param="response_format.json_schema",
                )
            return schema_grammar(body.json_schema.schema or {})
    raise BadRequest(
        f"response_format.type: {body.type!r} is not one of text, json_object, json_schema",
        param="response_format.type",
    )


def _of_structured(body: StructuredBody) -> Grammar:
    given = [name for name in body.__struct_fields__ if getattr(body, name) not in (None, False)]
    if len(given) != 1:
        told = " and ".join(given) or "none"
        raise BadRequest(
            f"structured_outputs needs exactly one of {', '.join(body.__struct_fields__)}; got {told}",
            param="structured_outputs",
        )
    if body.regex is not None:
        return Grammar(kind="regex", text=body.regex)
    if body.choice is not None:
        return choice_of(body.choice)
    if body.grammar is not None:
        return Grammar(kind="lark", text=_as_lark(body.grammar))
    if body.json_object:
        return ANY_OBJECT
    schema = body.json
    assert schema is not None
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any] | bool)
        except msgspec.DecodeError as error:
            raise BadRequest(
                f"structured_outputs.json is not a JSON schema: {error}",
                param="structured_outputs.json",
            ) from None
    return schema_grammar({} if schema is True else schema)


def check_grammar(grammar: Grammar, text: TextModel, *, min_tokens: int, ignore_eos: bool) -> None:
    """Raise BadRequest for what cannot be followed. May take a second the first time for a large vocabulary."""
    if min_tokens or ignore_eos:
        name = "ignore_eos" if ignore_eos else "min_tokens"
        raise BadRequest(f"{name} cannot be used where a grammar says when to stop", param=name)
    if not text.eos_ids:
        raise BadRequest(
            "this model names no token that ends a text, so its answers cannot follow a grammar",
            param="response_format",
        )
    fault = text.grammars.fault(grammar)
    if fault is not None:
        what = {"json_schema": "the JSON schema", "regex": "the regular expression"}
        raise BadRequest(
            f"{what.get(grammar.kind, 'the grammar')} cannot be followed: {fault}",
            param="response_format" if grammar.kind == "json_schema" else "structured_outputs",
        )


def schema_grammar(schema: dict[str, Any] | bool) -> Grammar:
    return Grammar(kind="json_schema", text=msgspec.json.encode(schema).decode())


def _as_lark(text: str) -> str:
    """GBNF defines with `::=`, Lark with a colon."""
    if "::=" not in text:
        return text
    try:
        return str(gbnf_to_lark.gbnf_to_lark(text))
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself
        raise BadRequest(
            f"structured_outputs.grammar is not GBNF: {error}", param="structured_outputs.grammar"
        ) from None
