"""Messages as chat templates want them: `content` is text, `developer` is what `system` was called before, and the
arguments of earlier calls are objects, not the text in which OpenAI's API carries them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.core.errors import BadRequest
from penstock.gateway.bodies import Message, ToolCall
from penstock.gateway.errors import Unsupported

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Raises BadRequest that names the message at fault."""
    if not messages:
        raise BadRequest("messages: at least one message is needed", param="messages")
    return [_plain(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    for name in ("function_call", "audio"):
        if getattr(message, name):
            raise Unsupported(f"{where}.{name} is not supported", param=f"{where}.{name}")
    if message.role not in ROLES:
        known = ", ".join(ROLES)
        raise BadRequest(
            f"{where}.role: {message.role!r} is not one of {known}", param=f"{where}.role"
        )
    plain: dict[str, Any] = {"role": ROLES[message.role], "content": _content(message, where)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    if message.tool_calls:
        if message.role != "assistant":
            raise BadRequest(
                f"{where}.tool_calls: only the assistant calls tools", param=f"{where}.tool_calls"
            )
        plain["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{place}]")
            for place, call in enumerate(message.tool_calls)
        ]
    return plain


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    told = call.function
    try:
        arguments = msgspec.json.decode(told.arguments or "{}", type=dict[str, Any])
    except msgspec.DecodeError:
        name = f"{where}.function.arguments"
        raise BadRequest(f"{name} is not a JSON object", param=name) from None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": told.name, "arguments": arguments},
    }


def _content(message: Message, where: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return message.refusal or ""
        raise BadRequest(f"{where}.content is missing", param=f"{where}.content")
    texts = []
    for place, part in enumerate(content):
        if part.type != "text" or part.text is None:
            name = f"{where}.content[{place}]"
            raise Unsupported(
                f"{name}: parts of type {part.type!r} are not supported, only text",
                hint="send the text alone, or images described in words",
                param=name,
            )
        texts.append(part.text)
    return "\n".join(texts)
