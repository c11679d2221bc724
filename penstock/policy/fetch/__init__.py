"""Are cached blocks brought back from where they lie, or computed again? Asked for each stretch that could be.

Where: host memory behind the device, the disk behind that (engine.tiers), or a peer: the memory of another replica
(engine.seeks). And where host memory is full of blocks that the disk does not have yet: is what waits to let the disk
catch up, or are so many of them computed again some day? Then `copy_s` is what writing them takes, and `cached` is 0.

Law: there is something to bring, and what it takes is no negative number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from msgspec import Struct

from penstock.core.views import Rng

Place = Literal["host", "disk", "peer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """`tokens` could be brought, behind `cached` that are here.

    copy_s: what that takes, None while nobody knows; compute_s: what computing them takes.
    """

    now: float
    rng: Rng
    place: Place
    tokens: int
    cached: int
    copy_s: float | None
    compute_s: float


class Decision(Struct, frozen=True, gc=False):
    fetches: bool
    why: str = ""


def law(view: View, decision: Decision) -> None:
    assert isinstance(decision.fetches, bool), "neither yes nor no"
    assert view.tokens > 0 and view.cached >= 0, "there is nothing to bring"


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
