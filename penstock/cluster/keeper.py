"""Keeps one replica up, wherever it runs, and says what a runtime is.

When what runs the replica ends without being told to, its link loses it at once (requests inside fail with
ReplicaLost, the report says dead). It is started again after BACKOFF_S, doubled each time up to MAX_BACKOFF_S; one that
lived for SETTLED_S starts the count anew, and after `max_restarts` in a row it stays dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from penstock.cluster.link import ReplicaLink
from penstock.cluster.spec import ReplicaSpec
from penstock.core.clock import now
from penstock.core.errors import PenstockError

BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
SETTLED_S = 60.0
_log = logging.getLogger("penstock.engine")


class Engine(Protocol):
    """What runs one replica, and its successors."""

    spec: ReplicaSpec
    link: ReplicaLink


class Runtime(Protocol):
    """Where replicas run."""

    @property
    def engines(self) -> Sequence[Engine]: ...

    async def start(self, spec: ReplicaSpec, link: ReplicaLink) -> None:
        """Return when the replica answers on its link. Raises why it cannot."""
        ...

    async def stop(self) -> None: ...

    def kill(self) -> None:
        """End all now."""
        ...


class Keeper:
    """`launch` brings it up and returns when it is ready; `until_over` returns when it ended, with words for that."""

    def __init__(
        self,
        link: ReplicaLink,
        *,
        what: str,
        launch: Callable[[], Awaitable[None]],
        until_over: Callable[[], Awaitable[str]],
        max_restarts: int,
    ) -> None:
        self._link, self._what = link, what
        self._launch, self._until_over = launch, until_over
        self._max_restarts = max_restarts
        self._task: asyncio.Task[None] | None = None
        self.is_stopping = False

    def begin(self) -> None:
        """It is up: from now on it is kept up."""
        self._task = asyncio.create_task(self._keep(), name=f"keeper of {self._link.name}")

    def stop(self) -> None:
        self.is_stopping = True
        if self._task is not None:
            self._task.cancel()

    async def _keep(self) -> None:
        failures = 0
        while True:
            began_at = now()
            ending = await self._until_over()
            if self.is_stopping or self._link.is_stopped:
                return
            self._link.lose(f"its {self._what} {ending}")
            failures = 1 if now() - began_at >= SETTLED_S else failures + 1
            if not await self._restart(failures, ending):
                return

    async def _restart(self, failures: int, ending: str) -> bool:
        """Start again until it works; False when it is given up."""
        name, what = self._link.name, self._what
        while failures <= self._max_restarts:
            delay_s = min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** (failures - 1))
            _log.warning(
                "[%s] the %s %s; starting it again in %.1f s (%d of %d)",
                name, what, ending, delay_s, failures, self._max_restarts,
            )  # fmt: skip
            await asyncio.sleep(delay_s)
            if self._link.is_stopped:  # it was put out meanwhile
                return False
            try:
                await self._launch()
            except (PenstockError, OSError) as error:  # the disk for its sockets may be full
                ending = f"did not start: {error}"
                failures += 1
                continue
            _log.warning("[%s] the %s is up again", name, what)
            return True
        _log.error("[%s] the %s is given up after %d restarts", name, what, self._max_restarts)
        return False
