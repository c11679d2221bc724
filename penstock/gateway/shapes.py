"""What both shapes of an answer share: finish reasons, usage, token logprobs, and pieces of events made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

from penstock.core.types import FinishReason, TokenLogprob
from penstock.gateway.answer import Entry
from penstock.gateway.ask import Ask

LOWEST = -9999.0  # JSON has no minus infinity; OpenAI's clients know this number for it
DONE = b"data: [DONE]\n\n"

encode = msgspec.json.encode


class Piece(NamedTuple):
    """News of one choice; the last one has `finish`."""

    choice: int
    text: str
    entries: Sequence[Entry] = ()
    finish: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def table(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice(NamedTuple):
    """A whole answer."""

    text: str
    entries: Sequence[Entry]
    finish: FinishReason
    stop_reason: str | int | None


PromptLogprobs = Sequence[TokenLogprob | None]


class Shape(Protocol):
    """One kind of body: `/v1/completions` or `/v1/chat/completions`."""

    def open(self, choice: int, prompt_logprobs: PromptLogprobs) -> bytes:
        """Events that come before the first news of a choice."""
        ...

    def chunk(self, piece: Piece) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def whole(
        self, choices: Sequence[Choice], prompt_logprobs: Sequence[PromptLogprobs], usage: Usage
    ) -> dict[str, Any]: ...


def reason(finish: FinishReason | None) -> str | None:
    return "length" if finish == "length" else None if finish is None else "stop"


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def head(ask: Ask, kind: str, created: int) -> dict[str, Any]:
    return {"id": ask.id, "object": kind, "created": created, "model": ask.model}


def opening(ask: Ask, kind: str, created: int) -> bytes:
    """An event up to where its choices begin."""
    return b"data: " + encode(head(ask, kind, created))[:-1] + b',"choices":['


def closing(ask: Ask) -> bytes:
    """What follows an event's choices: streams that end with a usage have a null one in each other event."""
    return b'],"usage":null}\n\n' if ask.include_usage else b"]}\n\n"
