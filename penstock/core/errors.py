"""One tree of errors. Each class says whose fault it is, whether to retry, and gives a hint.

    PenstockError
    |- BadRequest            caller, never       the request cannot be served as written
    |  |- ContextTooLong     caller, never       prompt (and output) exceed the model's context
    |  |- UnknownModel       caller, never       no fleet serves that name
    |  `- Unauthorized       caller, never       missing or wrong API key
    |- BadConfig             caller, never       the configuration file or a flag is wrong
    |- BadTrace              caller, never       a trace or log cannot be read
    |- BadModel              caller, never       a model folder is missing, broken or not supported
    |- MissingExtra          caller, never       an optional dependency is not installed
    |- SchemaMismatch        caller, never       written by an incompatible version
    |- Overloaded            us, later           the queue is full
    |- Draining              us, elsewhere       shutting down; another replica or a later try will do
    |- ReplicaLost           us, elsewhere       the engine process died with the request inside
    |- StepFailed            us, now             a step raised; its requests ended with this
    `- UpstreamFailed        upstream, elsewhere a backend in front of which we stand did not answer

HTTP statuses are mapped in `gateway` only. Messages are written for the caller: no internal names.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Fault = Literal["caller", "us", "upstream"]
Retry = Literal["never", "now", "later", "elsewhere"]


class PenstockError(Exception):
    """Base of all errors that a caller may see. `hint` says what to do; `param` names the field at fault."""

    fault: ClassVar[Fault] = "us"
    retry: ClassVar[Retry] = "never"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class BadRequest(PenstockError):
    fault = "caller"


class ContextTooLong(BadRequest):
    pass


class UnknownModel(BadRequest):
    pass


class Unauthorized(BadRequest):
    pass


class BadConfig(PenstockError):
    fault = "caller"


class BadTrace(PenstockError):
    fault = "caller"


class BadModel(PenstockError):
    fault = "caller"


class MissingExtra(PenstockError):
    fault = "caller"


class SchemaMismatch(PenstockError):
    fault = "caller"


class Overloaded(PenstockError):
    retry = "later"


class Draining(PenstockError):
    retry = "elsewhere"


class ReplicaLost(PenstockError):
    retry = "elsewhere"


class StepFailed(PenstockError):
    retry = "now"


class UpstreamFailed(PenstockError):
    fault = "upstream"
    retry = "elsewhere"


def error_class(code: str) -> type[PenstockError]:
    """The class of an error that travelled by its name; an unknown one is a failure of ours."""
    found = globals().get(code)
    if isinstance(found, type) and issubclass(found, PenstockError):
        return found
    return StepFailed


def missing_extra(package: str, extra: str) -> MissingExtra:
    """The error for an optional dependency that is not installed."""
    return MissingExtra(
        f"this needs the package {package!r}, which is not installed",
        hint=f"pip install 'penstock[{extra}]'",
    )
