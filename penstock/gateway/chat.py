"""`/v1/chat/completions`: messages in, an assistant's message out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from penstock.core.types import FinishReason
from penstock.gateway.answer import Entry
from penstock.gateway.ask import Ask
from penstock.gateway.parts import Part, Splitter
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
        self._splitters = [ask.splitter() for _ in self._heads]

    def open(self, choice: int, prompt_logprobs: PromptLogprobs) -> bytes:
        table = {
            "index": choice,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._opening + encode(table) + self._closing

    def chunk(self, piece: Piece) -> bytes:
        splitter = self._splitters[piece.choice]
        if splitter is not None:
            return self._parts_chunk(piece, splitter)
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

    def _parts_chunk(self, piece: Piece, splitter: Splitter) -> bytes:
        """An event a part; the log-probabilities go with the first, the reason with the last."""
        parts = splitter.push(piece.text)
        if piece.finish is not None:
            parts += splitter.end()
        deltas = [self._delta(piece.choice, part) for part in parts]
        if piece.finish is not None or (piece.entries and not deltas):
            deltas.append({})
        events = []
        for place, delta in enumerate(deltas):
            is_last = piece.finish is not None and place == len(deltas) - 1
            table = {
                "index": piece.choice,
                "delta": delta,
                "logprobs": self._logprobs(piece.entries if place == 0 else ()),
                "finish_reason": _reason(piece.finish, splitter) if is_last else None,
            }
            if is_last:
                table["stop_reason"] = piece.stop_reason
            events.append(self._opening + encode(table) + self._closing)
        return b"".join(events)

    def _delta(self, choice: int, part: Part) -> dict[str, Any]:
        match part.kind:
            case "said":
                return {"content": part.text}
            case "thought":
                return {"reasoning_content": part.text}
            case "call":
                call = {**self._call(choice, part), "index": part.call}
                return {"tool_calls": [call]}
            case "arguments":
                return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}

    def _call(self, choice: int, part: Part) -> dict[str, Any]:
        """A call that has just begun. Mistral's template takes names of nine letters and digits only."""
        told = f"{self._ask.id}.{choice}.{part.call}".encode()
        name = hashlib.blake2b(told, digest_size=12).hexdigest()
        form = self._ask.form
        is_short = form is not None and form.is_list
        return {
            "id": name[:9] if is_short else f"call_{name}",
            "type": "function",
            "function": {"name": part.text, "arguments": ""},
        }

    def _message(self, number: int, choice: Choice) -> tuple[dict[str, Any], str | None]:
        """A whole answer as the assistant's message, and the reason it ended."""
        splitter = self._ask.splitter()
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if splitter is None:
            return message, reason(choice.finish)
        told = {"said": "", "thought": ""}
        calls: list[dict[str, Any]] = []
        for part in (*splitter.push(choice.text), *splitter.end()):
            match part.kind:
                case "call":
                    calls.append(self._call(number, part))
                case "arguments":
                    calls[-1]["function"]["arguments"] += part.text
                case _:
                    told[part.kind] += part.text
        message["content"] = told["said"] or (None if calls else "")
        if told["thought"]:
            message["reasoning_content"] = told["thought"]
        if calls:
            message["tool_calls"] = calls
        return message, _reason(choice.finish, splitter)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._opening + b'],"usage":' + encode(usage.table()) + b"}\n\n"

    def whole(
        self, choices: Sequence[Choice], prompt_logprobs: Sequence[PromptLogprobs], usage: Usage
    ) -> dict[str, Any]:
        body = head(self._ask, KIND, self._created)
        told = [self._message(number, choice) for number, choice in enumerate(choices)]
        body["choices"] = [
            {
                "index": number,
                "message": message,
                "logprobs": self._logprobs(choice.entries),
                "finish_reason": finish,
                "stop_reason": choice.stop_reason,
            }
            for number, (choice, (message, finish)) in enumerate(zip(choices, told, strict=True))
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


def _reason(finish: FinishReason | None, splitter: Splitter) -> str | None:
    told = reason(finish)
    return "tool_calls" if told == "stop" and splitter.num_calls else told


def _token(text: TextModel, id: int, logprob: float) -> dict[str, Any]:
    piece = text.token_bytes(id)
    return {
        "token": piece.decode("utf-8", "replace"),
        "logprob": finite(logprob),
        "bytes": list(piece),
    }
