"""What is decided about a fleet as a whole, and what that is decided by: events, listed by core.events."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class Steered(Struct, kw_only=True, frozen=True, gc=False):
    """A fleet was asked what moves (decision): (request, source, target, mode) of each.

    `cause` and `about` are what it was asked for, `moving` the (request, target) of movements under way. `denied`:
    moves that the policy wanted and a rule forbade (cluster.arbiter), with the rule's name last. Not written when
    nothing was wanted. `lent`: (request, creditor, blocks) of loans that there were, `loans`: (request, debtor,
    creditor, blocks) of those that are to be made, `recalls` the same of what is to come home; not written where there
    are none.
    """

    kind: Literal["steered"] = "steered"
    at: float
    who: str
    cause: str
    about: str
    moving: tuple[tuple[str, str, str, str], ...]
    moves: tuple[tuple[str, str, str, str], ...]
    denied: tuple[tuple[str, str, str, str, str], ...] = ()
    why: str = ""
    lent: tuple[tuple[str, str, int], ...] | UnsetType = UNSET
    loans: tuple[tuple[str, str, str, int], ...] | UnsetType = UNSET
    recalls: tuple[tuple[str, str, str, int], ...] | UnsetType = UNSET


class Served(Struct, kw_only=True, gc=False):
    """A request is over, for policies that scale by what was served (input). `ttft_s` None: it had no token."""

    kind: Literal["served"] = "served"
    at: float
    who: str
    arrived_at: float
    ttft_s: float | None
    num_prompt: int
    num_output: int
    is_refused: bool = False


class Scaled(Struct, kw_only=True, frozen=True, gc=False):
    """A fleet was asked how many replicas there are to be (decision). `starting`: (role, number) under way.

    `had`, `devices`: (replica, number of its devices) before, and as it is to be.

    Not written when everything stays as it is.
    """

    kind: Literal["scaled"] = "scaled"
    at: float
    who: str
    starting: tuple[tuple[str, int], ...]
    add: tuple[tuple[str, int], ...] = ()
    drain: tuple[str, ...] = ()
    roles: tuple[tuple[str, str], ...] = ()
    had: tuple[tuple[str, int], ...] | UnsetType = UNSET
    devices: tuple[tuple[str, int], ...] | UnsetType = UNSET
    why: str = ""


class Left(Struct, kw_only=True, frozen=True, gc=False):
    """A replica is no longer of a fleet (input): nobody will hear of it again."""

    kind: Literal["left"] = "left"
    at: float
    who: str
    replica: str
