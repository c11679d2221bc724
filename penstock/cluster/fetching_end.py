"""What a replica's link says and hears of cached prefixes that replicas fetch from each other (cluster.fetches)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from penstock.core.errors import ReplicaLost
from penstock.core.fetching import Hint, Leave, Seek, Show, Shown
from penstock.core.prompt import HASH_BYTES

NUMBER_BYTES = 8  # what a modelled link is charged for a number
OnFetch = Callable[[Seek | Shown | Leave | ReplicaLost], None]


class FetchingEnd(ABC):
    """A part of cluster.link.ReplicaLink, which hands messages over (`_put`)."""

    def __init__(self) -> None:
        self._on_fetch: OnFetch | None = None

    @abstractmethod
    def _put(self, message: object, num_bytes: int = 0) -> None:
        """Say it, unless there is nobody to say it to."""

    def listen_fetches(self, on_fetch: OnFetch) -> None:
        """Set who hears what it wants and shows, and if it is lost."""
        self._on_fetch = on_fetch

    def _hear_fetch(self, told: Seek | Shown | Leave | ReplicaLost) -> None:
        if self._on_fetch is not None:
            self._on_fetch(told)

    def hint(self, told: Hint) -> None:
        """Before the request is submitted."""
        self._put(told)

    def show(self, told: Show) -> None:
        self._put(told, HASH_BYTES * (len(told.names) + len(told.before)))

    def tell_shown(self, told: Shown) -> None:
        self._put(told, 2 * NUMBER_BYTES * len(told.blocks))

    def leave(self, told: Leave) -> None:
        self._put(told)
