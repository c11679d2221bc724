"""Consistent hashing: who stands next on a ring. A newcomer takes keys from its neighbours and from nobody else.

Source: Karger et al., "Consistent Hashing and Random Trees", STOC 1997.

Every replica stands at `points` places of a ring of 2^64; a key belongs to the first replica at or after its own place.
With many points each replica owns nearly the same share. When one comes or goes, only the keys between its points and
those before them change hands. `salt` makes independent mappings over the same places (DualMap's two).

Work: O(log(points * replicas)) a look-up; a change of the replicas sorts the ring anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import chain

POINTS = 64
MOST_NAMES = 1024


def place_of(key: bytes, salt: bytes = b"") -> int:
    """Where a key stands on the ring."""
    return int.from_bytes(blake2b(key, digest_size=8, key=salt).digest(), "big")


class Ring:
    """Made for the names it was last asked with."""

    def __init__(self, points: int = POINTS) -> None:
        self._points = points
        self._names: list[str] = []
        self._stands: dict[
            str, list[tuple[int, str]]
        ] = {}  # of each name there ever was, up to MOST_NAMES
        self._places: list[int] = []
        self._owners: list[str] = []

    def keep(self, names: Sequence[str]) -> bool:
        """Have these names on the ring, and no others. Whether that changed it."""
        if self._names == names:
            return False
        self._names = list(names)
        if len(self._stands) > MOST_NAMES:
            self._stands.clear()
        stands = sorted(chain.from_iterable(map(self._stands_of, names)))
        self._places = [place for place, _ in stands]
        self._owners = [name for _, name in stands]
        return True

    def _stands_of(self, name: str) -> list[tuple[int, str]]:
        found = self._stands.get(name)
        if found is None:
            points = range(self._points)
            found = [(place_of(f"{name}#{point}".encode()), name) for point in points]
            self._stands[name] = found
        return found

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
