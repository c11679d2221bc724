"""What an OpenAI-compatible server sends: its events, its errors, and the times of one answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp
import msgspec

from penstock.core.errors import BadRequest, UpstreamFailed


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    def shown(self) -> str:
        if self.delta is None:
            return self.text or ""
        return (self.delta.reasoning_content or "") + (self.delta.content or "")


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None


class Event(msgspec.Struct):
    id: str | None = None
    choices: list[Choice] = []
    usage: Usage | None = None
    error: dict[str, object] | str | None = None


class Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct):
    data: list[Model] = []


class Counted(msgspec.Struct):
    count: int


class Failed(UpstreamFailed):
    """What went wrong with one request. `kind` is short and the same for all alike; `status` is HTTP's, if any."""

    def __init__(self, kind: str, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.status = kind, status


@dataclass(slots=True, eq=False)
class Reading:
    """One answer as it came. `gaps_s` are those between events that showed something; `id` is the server's."""

    id: str | None = None
    first_at: float | None = None
    last_at: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    num_events: int = 0
    num_prompt: int | None = None
    num_output: int | None = None
    num_cached: int = 0
    finish: str | None = None

    def take(self, event: Event, at: float) -> None:
        """Note an event that came at `at`."""
        self.id = event.id
        if event.usage is not None:
            self.num_prompt, self.num_output = (
                event.usage.prompt_tokens,
                event.usage.completion_tokens,
            )
            details = event.usage.prompt_tokens_details
            self.num_cached = (details.cached_tokens or 0) if details else 0
        for choice in event.choices:
            self.finish = choice.finish_reason or self.finish
            if choice.shown() or (choice.finish_reason is not None and self.first_at is None):
                self.mark(at)

    def mark(self, at: float) -> None:
        self.num_events += 1
        if self.last_at is None:
            self.first_at = at
        else:
            self.gaps_s.append(at - self.last_at)
        self.last_at = at


@contextmanager
def reaching(url: str, timeout_s: float) -> Iterator[None]:
    """Turns what can go wrong on the way into Failed."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise Failed("cannot connect", f"{url} did not accept a connection") from None
    except TimeoutError:
        raise Failed("timeout", f"{url} did not finish within {timeout_s:g} s") from None
    except aiohttp.ClientConnectorError as error:
        raise Failed("cannot connect", f"cannot reach {url}: {error}") from None
    except aiohttp.InvalidURL:
        raise BadRequest(f"{url} is no URL") from None
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError) as error:
        raise Failed("cut off", f"{url} closed the connection: {error}") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Failed(type(error).__name__, f"{url}: {error}") from None


def decoded(told: bytes) -> Event:
    try:
        event = msgspec.json.decode(told, type=Event)
    except msgspec.MsgspecError as error:
        raise Failed("bad stream", f"the server sent no JSON event: {error}") from None
    if event.error is not None:
        code, message = error_of(told)
        raise Failed(f"in the stream: {code}", message)
    return event


def error_of(body: bytes) -> tuple[str, str]:
    """(code, message) of an OpenAI-shaped error body, or of any other."""
    try:
        told = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return "", body[:200].decode("utf-8", "replace").strip()
    error = told.get("error", told) if isinstance(told, dict) else told
    if not isinstance(error, dict):
        return "", str(error)
    code = error.get("code") or error.get("type") or ""
    message = error.get("message") or error.get("detail") or str(error)
    return str(code), str(message)


async def check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    code, message = error_of(await response.read())
    kind = f"HTTP {response.status}" + (f" {code}" if code else "")
    raise Failed(kind, message or f"the server answered {kind}", status=response.status)
