"""Consistent hashing: who stands next on a ring. A newcomer takes keys from its neighbours and from nobody else.

Source: Karger et al., "Consistent Hashing and Random Trees", STOC 1997.

Every replica stands at `points` places of a ring of 2^64; a key belongs to the first replica at or after its own place.
With many points each replica owns nearly the same share. When one comes or goes, only the keys between its points and
those before them change hands. `salt` makes independent mappings over the same places (DualMap's two).

Work: O(log(points * replicas)) a look-up; a change of the replicas makes the ring anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from hashlib import blake2b

POINTS = 64


def place_of(key: bytes, salt: bytes = b"") -> int:
    """Where a key stands on the ring."""
    return int.from_bytes(blake2b(key, digest_size=8, key=salt).digest(), "big")


class Ring:
    """Made for the names it was last asked with."""

    def __init__(self, points: int = POINTS) -> None:
        self._points = points
        self._names: list[str] = []
        self._places: list[int] = []
        self._owners: list[str] = []

    def keep(self, names: Sequence[str]) -> None:
        """Have these names on the ring, and no others."""
        if self._names == names:
            return
        self._names = list(names)
        stands = sorted(
            (place_of(f"{name}#{point}".encode()), name)
            for name in names
            for point in range(self._points)
        )
        self._places = [place for place, _ in stands]
        self._owners = [name for _, name in stands]

    def after(self, place: int) -> Iterator[str]:
        """The names from a place on around the ring, each once. The first owns the place."""
        owners, seen = self._owners, set()
        first = bisect_left(self._places, place)
        for step in range(len(owners)):
            name = owners[(first + step) % len(owners)]
            if name not in seen:
                seen.add(name)
                yield name

    def owner(self, place: int) -> str:
        return self._owners[bisect_left(self._places, place) % len(self._owners)]
