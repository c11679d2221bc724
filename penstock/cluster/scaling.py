"""Brings replicas of a fleet up and puts them out while it serves.

A new replica joins the fleet when it answers; one that cannot start is forgotten, with a warning, and the policy sees
at its next question that it is not there. One that is put out takes no new requests, sees those it has
moved away or ends them, is told to stop and leaves the fleet. Replicas are numbered upwards and
no number is given twice, so that the logs of one that left are not written over.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import cast

from penstock.cluster.fleet import Fleet
from penstock.cluster.link import ReplicaLink
from penstock.cluster.spec import ReplicaSpec
from penstock.core.errors import PenstockError
from penstock.core.ports import RolePort
from penstock.core.types import Role
from penstock.policy import scale

_log = logging.getLogger("penstock.cluster")
Start = Callable[[ReplicaSpec, ReplicaLink], Awaitable[None]]


class Scaling:
    """`spec` is what new replicas are made from, but for their names; `count` were made before."""

    def __init__(self, fleet: Fleet, start: Start, spec: ReplicaSpec, count: int) -> None:
        self._fleet, self._start, self._spec, self._count = fleet, start, spec, count
        self._starting: Counter[Role] = Counter()
        self._leaving: set[str] = set()  # reports say it later
        self._reshaping: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def starting(self) -> Mapping[Role, int]:
        """Replicas on their way up, by role."""
        return {role: count for role, count in self._starting.items() if count}

    @property
    def devices(self) -> Mapping[str, int]:
        """Of replicas that can have more or fewer; none while one changes."""
        first = self._spec.executor.expert_devices
        if first is None:
            return {}
        names = [report.replica for report in self._fleet.reports() if report.is_alive]
        known = self._fleet.devices
        return {name: known.get(name, first) for name in names if name not in self._reshaping}

    def carry_out(self, decision: scale.Decision) -> None:
        """Begin all that was decided; nothing waits."""
        for name, role in decision.roles.items():
            cast(RolePort, self._fleet.port(name)).set_role(role)
        for name, devices in decision.devices.items():
            self._spawn(self._reshape(name, devices))
        for name in decision.drain:
            if name not in self._leaving:
                self._leaving.add(name)
                self._spawn(self._put_out(name))
        for role, count in decision.add.items():
            for _ in range(count):
                self._spawn(self._bring_up(role))

    async def stop(self) -> None:
        """Let go of what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _bring_up(self, role: Role) -> None:
        name = f"{self._fleet.name}-{self._count}"
        near = self._spec.neighbours
        place = replace(near, index=(near.index + self._count) % near.count)
        self._count += 1
        self._starting[role] += 1
        link = ReplicaLink(name)
        try:
            spec = replace(self._spec, name=name, role=role, neighbours=place, is_added=True)
            await self._start(spec, link)
            await self._fleet.adapters.introduce(link)
        except PenstockError as error:
            _log.warning("the replica %s does not start: %s", name, error)
            await link.stop()
            return
        finally:
            self._starting[role] -= 1
        self._fleet.join(link)

    async def _reshape(self, name: str, devices: int) -> None:
        self._reshaping.add(name)
        try:
            await self._fleet.reshape(name, devices)
        except PenstockError as error:
            _log.warning("the devices of %s stay as they are: %s", name, error)
        finally:
            self._reshaping.discard(name)

    async def _put_out(self, name: str) -> None:
        await self._fleet.drain_replica(name)
        await self._fleet.port(name).stop()
        self._fleet.leave(name)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a change of replicas failed", exc_info=task.exception())
