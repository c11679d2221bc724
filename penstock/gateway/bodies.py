"""The bodies of requests: OpenAI's fields, the extras vLLM users know, and ours.

Types and ranges are declared here and checked by the decoder. A field that neither API has is an error naming the
nearest one that exists, because a misspelt `temperture` would otherwise be served at the default for months.
Fields of OpenAI's that say nothing about tokens (`user`, `metadata` ...) are accepted and not used; fields that would
change the answer and are not served are refused by name (REFUSED), unless they hold the value that changes nothing.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from penstock.core.errors import BadRequest
from penstock.gateway.errors import Unrecognised, Unsupported
from penstock.gateway.structured import FormatBody, SchemaBody, StructuredBody
from penstock.gateway.tools import Chosen, Function, Tool

B = TypeVar("B", bound=msgspec.Struct)

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seconds = Annotated[float, Meta(gt=0)]
Ids = list[Count]


class SloBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Promises wanted: seconds to the first token, per later token, to the last one; and how much they count."""

    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None
    deadline_s: Seconds | None = None
    weight: Annotated[float, Meta(gt=0)] = 1.0


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # we never pad, whatever it says


class SharedBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both kinds of completion."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Positive | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    # known from vLLM
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Ids | None = None
    priority: int | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredBody | None = None
    # ours
    slo: SloBody | None = None
    program: str | None = None
    adapter: str | None = None
    # OpenAI's, accepted and not used
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class CompletionBody(SharedBody, forbid_unknown_fields=True, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    echo: bool | None = None
    logprobs: Count | None = None
    best_of: Positive | None = None
    suffix: Any = UNSET


class Part(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class Called(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A call that the assistant made earlier."""

    function: Called
    id: str | None = None
    type: str = "function"
    index: int | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None


class ChatBody(SharedBody, forbid_unknown_fields=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | Chosen | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = UNSET
    function_call: Any = UNSET
    response_format: FormatBody | None = None
    modalities: Any = UNSET
    audio: Any = UNSET
    prediction: Any = UNSET
    web_search_options: Any = UNSET
    reasoning_effort: Any = UNSET
    verbosity: Any = UNSET
    moderation: Any = UNSET


class WholeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of calls whose texts are read whole."""

    model: str | None = None
    user: Any = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    priority: int | None = None
    slo: SloBody | None = None


class EmbeddingBody(WholeBody, forbid_unknown_fields=True, kw_only=True):
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    add_special_tokens: bool = True
    prompt_name: str | None = None


class Document(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    text: str


class RerankBody(WholeBody, forbid_unknown_fields=True, kw_only=True):
    query: str
    documents: list[str | Document]
    top_n: Positive | None = None
    return_documents: bool = False


class ScoreBody(WholeBody, forbid_unknown_fields=True, kw_only=True):
    text_1: str | list[str]
    text_2: str | list[str]


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    tokens: Ids


# field -> values that change nothing; any other value is refused
REFUSED: dict[str, tuple[object, ...]] = {
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "moderation": (None,),
}

_PLACE = re.compile(r" - at `\$\.?(?P<path>.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")


def decode(cls: type[B], raw: bytes) -> B:
    """A checked body. Raises BadRequest naming the field at fault, Unsupported for what is not served."""
    try:
        body = msgspec.json.decode(raw, type=cls)
    except msgspec.ValidationError as error:
        raise _explain(cls, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from None
    for name, harmless in REFUSED.items():
        value = getattr(body, name, UNSET)
        if value is not UNSET and not isinstance(value, UnsetType) and value not in harmless:
            raise Unsupported(f"{name!r} is not supported by this server", param=name)
    return body


def _explain(cls: type[msgspec.Struct], told: str) -> BadRequest:
    place = _PLACE.search(told)
    path = place["path"].removesuffix("[...]") if place else ""
    reason = _PLACE.sub("", told)
    unknown = _UNKNOWN.search(told)
    if unknown:
        name = f"{path}.{unknown['name']}" if path else unknown["name"]
        return _unrecognised(cls, name, path, unknown["name"])
    missing = _MISSING.search(told)
    if missing:
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return BadRequest(f"the required field {name!r} is missing", param=name)
    if not path:
        return BadRequest(f"the request body should be a JSON object: {reason}")
    return BadRequest(f"{path}: {reason[0].lower()}{reason[1:]}", param=path)


def _unrecognised(cls: type[msgspec.Struct], name: str, path: str, last: str) -> Unrecognised:
    nested: dict[str, type[msgspec.Struct]] = {
        "slo": SloBody,
        "stream_options": StreamOptions,
        "documents": Document,
        "structured_outputs": StructuredBody,
        "response_format": FormatBody,
        "response_format.json_schema": SchemaBody,
        "tools": Tool,
        "tools.function": Function,
        "tool_choice": Chosen,
    }
    known = nested.get(path.replace("[...]", ""), Message) if path else cls
    near = difflib.get_close_matches(last, known.__struct_fields__, n=1)
    hint = f"did you mean {near[0]!r}?" if near else ""
    return Unrecognised(f"Unrecognized request argument supplied: {name}", hint=hint, param=name)
