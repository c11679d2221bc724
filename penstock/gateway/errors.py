"""Errors as HTTP: the only place that knows a status code for a `PenstockError`.

The body has OpenAI's shape, {"error": {"message", "type", "param", "code"}}, so its clients raise their own
classes. Statuses that ask for another try carry Retry-After in whole seconds, at least 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from penstock.core.errors import (
    BadRequest,
    ContextTooLong,
    Draining,
    Overloaded,
    PenstockError,
    ReplicaLost,
    StepFailed,
    Unauthorized,
    UnknownModel,
    UpstreamFailed,
)


class BodyTooLarge(BadRequest):
    pass


class NoSuchPath(BadRequest):
    pass


class WrongMethod(BadRequest):
    pass


class Unrecognised(BadRequest):
    """A field that this API does not have."""


class Unsupported(BadRequest):
    """A field of this API that Penstock does not serve."""


class Face(NamedTuple):
    """How one class of error looks from outside."""

    status: int
    type: str
    code: str | None


FACES: dict[type[PenstockError], Face] = {
    BodyTooLarge: Face(413, "invalid_request_error", "body_too_large"),
    NoSuchPath: Face(404, "invalid_request_error", "unknown_url"),
    WrongMethod: Face(405, "invalid_request_error", "method_not_allowed"),
    Unrecognised: Face(400, "invalid_request_error", "unknown_parameter"),
    Unsupported: Face(400, "invalid_request_error", "unsupported_parameter"),
    ContextTooLong: Face(400, "invalid_request_error", "context_length_exceeded"),
    UnknownModel: Face(404, "invalid_request_error", "model_not_found"),
    Unauthorized: Face(401, "invalid_request_error", "invalid_api_key"),
    BadRequest: Face(400, "invalid_request_error", None),
    Overloaded: Face(429, "rate_limit_error", "rate_limit_exceeded"),
    Draining: Face(503, "service_unavailable_error", "draining"),
    ReplicaLost: Face(503, "service_unavailable_error", "replica_lost"),
    StepFailed: Face(500, "server_error", "step_failed"),
    UpstreamFailed: Face(502, "server_error", "upstream_failed"),
    PenstockError: Face(500, "server_error", None),
}


def face(error: PenstockError) -> Face:
    """The face of the nearest class of the error that has one."""
    return next(FACES[cls] for cls in type(error).__mro__ if cls in FACES)


def error_body(error: PenstockError) -> dict[str, object]:
    shown = face(error)
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return {
        "error": {
            "message": message,
            "type": shown.type,
            "param": error.param,
            "code": shown.code,
        }
    }


def error_bytes(error: PenstockError) -> bytes:
    return msgspec.json.encode(error_body(error))


def error_event(error: PenstockError) -> bytes:
    """The error as an event, for a stream that had begun."""
    return b"data: " + error_bytes(error) + b"\n\ndata: [DONE]\n\n"


def error_headers(error: PenstockError, retry_after_s: float) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", b"application/json")]
    if face(error).status in (429, 503):
        seconds = max(1, math.ceil(error.retry_after_s or retry_after_s))
        headers.append((b"retry-after", str(seconds).encode()))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


INTERNAL = PenstockError(
    "something went wrong inside the server", hint="the server's log says what"
)
