"""Words of the limit kind that others use too: who holds a share of something, and what it did with it.

A mechanism keeps the holders; a limit policy answers with a cap for each. Whoever needs the caps asks through `Limits`,
so that kinds of policy never import each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from penstock.core.events import Event
from penstock.core.views import Rng


class Use(NamedTuple):
    """So many `times` the holder did `amount` of its work in `seconds` each, with what `cap` gave it."""

    cap: float
    amount: float
    seconds: float
    times: int = 1


class Holder(NamedTuple):
    """One that shares: it needs `floor` at least, has `cap` now, and made these uses since the last question."""

    name: str
    floor: float
    cap: float
    uses: Sequence[Use] = ()


class Limits(Protocol):
    """A limit policy as others reach it."""

    def ask(
        self, now: float, rng: Rng, holders: Sequence[Holder], supply: float
    ) -> Mapping[str, float]:
        """The cap of each holder, by name."""
        ...

    def observe(self, event: Event) -> None: ...
