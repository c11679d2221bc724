"""Stop strings, found across the borders of tokens.

Law: the text ends before the stop string whose last character comes first (of several that end there, the
longest), however the text was cut into pieces; and no character that might still belong to a stop string is told.
"""

from __future__ import annotations

from collections.abc import Iterable


class Stops:
    """The stop strings of one request: searched for by each of its answers."""

    __slots__ = ("strings", "_prefixes", "_longest", "_heads")

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(strings)
        assert all(self.strings), "a stop string is never empty"
        self._prefixes = frozenset(s[:size] for s in self.strings for size in range(1, len(s)))
        self._longest = max((len(s) for s in self.strings), default=0)
        self._heads = frozenset(s[0] for s in self.strings)

    def find(self, text: str) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first; None when there is none."""
        best: tuple[int, int, str] | None = None
        for string in self.strings:
            start = text.find(string)
            if start >= 0 and (best is None or (start + len(string), start) < best[:2]):
                best = (start + len(string), start, string)
        return None if best is None else best[1:]

    def num_open(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string may begin."""
        longest = min(self._longest - 1, len(text))
        for size in range(longest, 0, -1):
            if text[-size] in self._heads and text[-size:] in self._prefixes:
                return size
        return 0


class StopFinder:
    """One answer's view of its stop strings."""

    __slots__ = ("_stops", "_held", "hit")

    def __init__(self, stops: Stops) -> None:
        self._stops = stops
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Text that may be told now. After a match `hit` is set and nothing more is told."""
        if self.hit is not None:
            return ""
        text = self._held + text
        found = self._stops.find(text)
        if found is not None:
            start, self.hit = found
            self._held = ""
            return text[:start]
        certain = len(text) - self._stops.num_open(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text
