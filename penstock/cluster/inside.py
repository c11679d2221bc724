"""Replicas inside this process: in virtual time with modelled leaves, or embedded in a program.

The code between fleet and executor is the one that runs across processes; only the channel is nearer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from penstock.cluster.link import ReplicaLink
from penstock.cluster.spec import OpenOutside, ReplicaSpec, open_host
from penstock.core.ports import Channel

OpenPair = Callable[[], tuple[Channel, Channel]]


class Inside:
    """Brings up replicas in this process."""

    def __init__(self, open_outside: OpenOutside, open_pair: OpenPair) -> None:
        self._open_outside, self._open_pair = open_outside, open_pair
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, spec: ReplicaSpec, link: ReplicaLink) -> None:
        """Return when the replica answers on its link."""
        if spec.is_added and spec.executor.start_s:
            await asyncio.sleep(spec.executor.start_s)
        near, far = self._open_pair()
        host = open_host(spec, far, self._open_outside(spec))
        task = asyncio.get_running_loop().create_task(host.run(), name=spec.name)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        link.attach(near)
        await link.ready()

    async def stop(self) -> None:
        """Wait for the replicas to end; their links have told them to stop. Raises what failed one, now or before."""
        tasks, self._tasks = self._tasks, set()
        await asyncio.gather(*tasks)

    def _forget(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._tasks.discard(task)
