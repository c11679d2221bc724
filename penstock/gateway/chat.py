"""`/v1/chat/completions`: messages in, an assistant's message out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.core.errors import BadRequest
from penstock.gateway.answer import Entry
from penstock.gateway.ask import Ask
from penstock.gateway.bodies import Message
from penstock.gateway.errors import Unsupported
from penstock.gateway.shapes import (
    Choice,
    Piece,
    PromptLogprobs,
    Usage,
    closing,
    encode,
    finite,
    head,
    opening,
    reason,
)
from penstock.gateway.text import TextModel

KIND = "chat.completion"
CHUNK = "chat.completion.chunk"
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates want them: `content` is text, `developer` is what `system` was called before."""
    if not messages:
        raise BadRequest("messages: at least one message is needed", param="messages")
    return [_plain(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            raise Unsupported(f"{where}.{name} is not supported", param=f"{where}.{name}")
    if message.role not in ROLES:
        known = ", ".join(ROLES)
        raise BadRequest(
            f"{where}.role: {message.role!r} is not one of {known}", param=f"{where}.role"
        )
    plain = {"role": ROLES[message.role], "content": _content(message, where)}
    return plain if message.name is None else {**plain, "name": message.name}


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
                f"{name}: parts of type {part.type!r} are not supported, only text", param=name
            )
        texts.append(part.text)
    return "\n".join(texts)


class ChatShape:
    """Bodies of one call. A stream tells the role first."""

    def __init__(self, ask: Ask, created: int) -> None:
        self._ask = ask
        self._created = created
        self._opening = opening(ask, CHUNK, created)
        self._closing = closing(ask)
        self._heads = [
            self._opening + b'{"index":' + str(choice).encode() + b',"delta":{"content":'
            for choice in range(len(ask.prompts) * ask.n)
        ]
        self._tail = b'},"logprobs":null,"finish_reason":null}' + self._closing

    def open(self, choice: int, prompt_logprobs: PromptLogprobs) -> bytes:
        table = {
            "index": choice,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._opening + encode(table) + self._closing

    def chunk(self, piece: Piece) -> bytes:
        if piece.finish is None and not piece.entries:
            return self._heads[piece.choice] + encode(piece.text) + self._tail
        table = {
            "index": piece.choice,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.entries),
            "finish_reason": reason(piece.finish),
            "stop_reason": piece.stop_reason,
        }
        return self._opening + encode(table) + self._closing

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._opening + b'],"usage":' + encode(usage.table()) + b"}\n\n"

    def whole(
        self, choices: Sequence[Choice], prompt_logprobs: Sequence[PromptLogprobs], usage: Usage
    ) -> dict[str, Any]:
        body = head(self._ask, KIND, self._created)
        body["choices"] = [
            {
                "index": number,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.entries),
                "finish_reason": reason(choice.finish),
                "stop_reason": choice.stop_reason,
            }
            for number, choice in enumerate(choices)
        ]
        body["usage"] = usage.table()
        return body

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        num_top = self._ask.sampling.logprobs
        if num_top is None:
            return None
        text = self._ask.text
        content = [
            {
                **_token(text, entry.logprob.id, entry.logprob.logprob),
                "top_logprobs": [
                    _token(text, id, value) for id, value in entry.logprob.top[:num_top]
                ],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}


def _token(text: TextModel, id: int, logprob: float) -> dict[str, Any]:
    piece = text.token_bytes(id)
    return {
        "token": piece.decode("utf-8", "replace"),
        "logprob": finite(logprob),
        "bytes": list(piece),
    }
