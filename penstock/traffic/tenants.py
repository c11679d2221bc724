"""Who calls: tenants with skew, and classes of service.

`[tenants]` makes `number` of them by name; the k-th is responsible for a share in proportion to 1/k^zipf. `[[tenant]]`
lists tenants of their own kind: each has a `share` of the source's arrivals, or `arrivals` of its own. Classes divide
a tenant's calls by share: an interactive one with a tight promise, a batch one with none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

from penstock.core.types import Slo
from penstock.traffic.draws import zipf_weights

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenants:
    """`number` tenants called NAME-1, NAME-2, ... by falling share."""

    number: int
    zipf: float = 1.0
    name: str = "tenant"

    def __post_init__(self) -> None:
        if self.number < 1 or self.zipf < 0:
            raise ValueError("tenants need number >= 1 and zipf >= 0")

    def picker(self) -> Picker[str]:
        names = [f"{self.name}-{rank}" for rank in range(1, self.number + 1)]
        return Picker(names, zipf_weights(self.number, self.zipf))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceClass:
    """`share` of the calls are promised `slo`. Lower priority goes first."""

    share: float
    slo: Slo = Slo()
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"the share of a class must be positive, got {self.share}")


class Picker(Generic[T]):
    """Picks by weight."""

    def __init__(self, items: Sequence[T], cumulative: Sequence[float]) -> None:
        self._items, self._cumulative = items, cumulative

    def pick(self, chance: random.Random) -> T:
        return chance.choices(self._items, cum_weights=self._cumulative)[0]


def picker_of(items: Sequence[T], shares: Sequence[float]) -> Picker[T]:
    """Shares need not sum to 1: they are relative."""
    return Picker(items, list(accumulate(shares)))
