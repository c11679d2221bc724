"""How much may each holder use? Asked whenever the holders' mechanism could apply another answer.

Holders share one supply: lanes the cores of a device, tools the memory of a host. A mechanism tells what each did with
what it had (core.limits.Use); policies that learn hear the events besides.

Law: every holder gets a cap, and nobody else does; a cap is at least the holder's floor and above 0, and at most 1
where the supply is counted in devices (no holder uses more than one); caps sum to at most the supply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct

from penstock.core.limits import Holder
from penstock.core.views import Rng

ROUNDING = 1e-9  # sums of tenths are not exact


@dataclass(slots=True)
class View:
    """`supply`: what there is in all; more than one device where holders may be promised the same cores."""

    now: float
    rng: Rng
    holders: Sequence[Holder]
    supply: float = 1.0


class Decision(Struct, gc=False):
    """A cap for each holder, by name. `why` is not empty when something changed."""

    caps: Mapping[str, float]
    why: str = ""


def law(view: View, decision: Decision) -> None:
    assert set(decision.caps) == {holder.name for holder in view.holders}, "caps of other holders"
    for holder in view.holders:
        cap = decision.caps[holder.name]
        assert 0 < cap <= 1, f"the cap of {holder.name} is outside (0, 1]"
        assert cap >= holder.floor - ROUNDING, f"{holder.name} got less than its floor"
    assert sum(decision.caps.values()) <= view.supply + ROUNDING, "more is promised than there is"


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
