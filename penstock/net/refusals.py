"""What a foreign server's refusal means, by our own names: told apart by what a fleet should do about it.

no connection                   Unreached, a ReplicaLost: nobody should ask there now
hung up                         ReplicaLost       the server is gone; another one may take it
429                             Overloaded        it is full
503                             ReplicaLost       it is not ready, or going down
400 409 413 415 422, 404 of a model  BadRequest   the caller's, and every other server would say the same
401 403, 404 408 5xx, silence   UpstreamFailed    its fault, or ours in how it is set up; another may do
"""

from __future__ import annotations

import msgspec

from penstock.core.errors import (
    BadRequest,
    ContextTooLong,
    Overloaded,
    PenstockError,
    ReplicaLost,
    UnknownModel,
    UpstreamFailed,
)

AGAIN = "send the request again"
TOO_LONG = "context_length_exceeded"


class Unreached(ReplicaLost):
    """Nobody listens there."""


class _Told(msgspec.Struct):
    """OpenAI's error, inside `error` or as the body itself."""

    message: str | None = None
    param: str | None = None
    code: str | int | None = None
    type: str | None = None


class _Body(msgspec.Struct):
    error: _Told | str | None = None
    message: str | None = None
    detail: object = None


def _said(body: bytes) -> tuple[str, str | None, str]:
    """Message, parameter and code of an error's body, whatever its shape."""
    try:
        told = msgspec.json.decode(body, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:200].decode("utf-8", "replace").strip(), None, ""
    inner = told.error
    if isinstance(inner, _Told):
        is_long = "context" in (inner.type or "")  # llama.cpp: exceed_context_size_error
        return inner.message or "", inner.param, TOO_LONG if is_long else str(inner.code or "")
    detail = told.detail if isinstance(told.detail, str) else None
    if told.detail is not None and detail is None:
        detail = msgspec.json.encode(told.detail)[:500].decode()
    return inner or told.message or detail or "", None, ""


def error_of(url: str, status: int, body: bytes, retry_after: str | None = None) -> PenstockError:
    """A refusal by our own name; see the module's text."""
    message, param, code = _said(body)
    message = message or f"it answered with status {status}"
    if status == 429:
        seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
        return Overloaded(message, hint="try again later", retry_after_s=seconds)
    if status == 503:
        return ReplicaLost(f"the server at {url} is not ready: {message}", hint=AGAIN)
    if status in (401, 403):
        return UpstreamFailed(
            f"the server at {url} does not accept this server's key",
            hint="set fleet.N.remote.api_key",
        )
    if status == 404 and (code == "model_not_found" or "model" in message.lower()):
        return UnknownModel(message, param=param or "model")
    if code == TOO_LONG:
        return ContextTooLong(message, param=param)
    if status in (400, 409, 413, 415, 422):
        return BadRequest(message, param=param)
    if status in (404, 405, 501):
        return UpstreamFailed(f"the server at {url} does not offer this path: {message}")
    return UpstreamFailed(f"the server at {url} failed: {message}", hint=AGAIN)
