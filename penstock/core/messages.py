"""What a fleet and a replica say to each other over a channel. Plain data, read-only; `net` carries it unread.

Those sent for every request are not declared frozen, which would make each four times as dear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.core.types import SCHEMA, Output, Report, Request, Role


@dataclass(slots=True)
class Submit:
    """Fleet -> replica. Without `every_token` only the last output of each answer is sent back."""

    request: Request
    every_token: bool = True
    kind: Literal["submit"] = "submit"


@dataclass(frozen=True, slots=True)
class Cancel:
    """Fleet -> replica: free the request's blocks within one step."""

    request: str
    kind: Literal["cancel"] = "cancel"


@dataclass(frozen=True, slots=True)
class TakeAdapter:
    """Fleet -> replica: from now on there is this adapter, in this folder; say AdapterTaken."""

    adapter: str
    folder: str
    kind: Literal["take_adapter"] = "take_adapter"


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """Fleet -> replica: take no more requests for this adapter."""

    adapter: str
    kind: Literal["drop_adapter"] = "drop_adapter"


@dataclass(frozen=True, slots=True)
class SetRole:
    """Fleet -> replica: from now on say this role in reports; what it serves goes on."""

    role: Role
    kind: Literal["set_role"] = "set_role"


@dataclass(frozen=True, slots=True)
class Drain:
    """Fleet -> replica: refuse new requests; say Drained when the running ones ended."""

    kind: Literal["drain"] = "drain"


@dataclass(frozen=True, slots=True)
class Stop:
    """Fleet -> replica: end now."""

    kind: Literal["stop"] = "stop"


@dataclass(slots=True)
class Outputs:
    """Replica -> fleet: all that one step produced, one message a step. `items` = (request id, output)."""

    items: tuple[tuple[str, Output], ...]
    kind: Literal["outputs"] = "outputs"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Replica -> fleet: the request was not taken. `code` is a class name of core.errors."""

    request: str
    code: str
    message: str
    hint: str = ""
    param: str | None = None
    retry_after_s: float | None = None
    kind: Literal["refuse"] = "refuse"


@dataclass(frozen=True, slots=True)
class AdapterTaken:
    """Replica -> fleet: the answer to TakeAdapter; with a `code`, a class name of core.errors, why it was not taken."""

    adapter: str
    code: str | None = None
    message: str = ""
    hint: str = ""
    kind: Literal["adapter_taken"] = "adapter_taken"


@dataclass(frozen=True, slots=True)
class Hello:
    """Replica -> fleet, once: what it serves. The first message on a channel. `about` says to people on what."""

    report: Report
    schema: int = SCHEMA
    about: str = ""
    kind: Literal["hello"] = "hello"


@dataclass(slots=True)
class Say:
    """Replica -> fleet: its current report."""

    report: Report
    kind: Literal["say"] = "say"


@dataclass(frozen=True, slots=True)
class Drained:
    """Replica -> fleet: nothing runs here any more."""

    kind: Literal["drained"] = "drained"


@dataclass(frozen=True, slots=True)
class Failed:
    """Replica -> fleet: it cannot start or go on; `message` is for the operator."""

    code: str
    message: str
    hint: str = ""
    kind: Literal["failed"] = "failed"


Message = (
    Submit
    | Cancel
    | TakeAdapter
    | DropAdapter
    | SetRole
    | Drain
    | Stop
    | Outputs
    | Refuse
    | AdapterTaken
    | Hello
    | Say
    | Drained
    | Failed
)
