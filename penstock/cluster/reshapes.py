"""Replicas that get more or fewer devices: the link's words for it, and the fleet's."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping

from penstock.cluster.router import Router
from penstock.core.clock import now
from penstock.core.errors import BadRequest, Overloaded, PenstockError, ReplicaLost, error_class
from penstock.core.messages import Reshape, ReshapeDone
from penstock.core.ports import ReplicaPort, ReshapingPort
from penstock.core.reshaping import NewShape, Placing, Reshaped


class ReshapingEnd(ABC):
    """A part of cluster.link.ReplicaLink, which hands messages over (`_put`)."""

    def __init__(self) -> None:
        self._told: tuple[int, Placing] | None = None  # its successor is told again
        self._reshaping: asyncio.Future[NewShape] | None = None

    @property
    @abstractmethod
    def is_alive(self) -> bool: ...

    @abstractmethod
    def _put(self, message: object, num_bytes: int = 0) -> None:
        """Say it, unless there is nobody to say it to."""

    async def reshape(self, devices: int, placing: Placing) -> NewShape:
        """See core.ports.ReshapingPort."""
        if self._reshaping is not None:
            raise Overloaded("its devices are being changed already", retry_after_s=1.0)
        if not self.is_alive:
            raise ReplicaLost("the replica is not running", hint="try again when it is up")
        self._reshaping = asyncio.get_running_loop().create_future()
        self._put(Reshape(devices, placing))
        try:
            found = await self._reshaping
        finally:
            self._reshaping = None
        self._told = (devices, placing)
        return found

    def _hear_shape(self, told: ReshapeDone) -> None:
        waiting = self._reshaping
        if waiting is None or waiting.done():
            return
        if told.shape is not None:
            waiting.set_result(told.shape)
            return
        waiting.set_exception(error_class(told.code)(told.message, hint=told.hint))

    def _reshape_again(self) -> None:
        if self._told is not None:
            self._put(Reshape(*self._told))

    def _lose_shape(self, lost: ReplicaLost) -> None:
        if self._reshaping is not None and not self._reshaping.done():
            self._reshaping.set_exception(lost)


class Reshapes:
    """A fleet's changes of devices, and how many each replica has (`now`, of those that told)."""

    def __init__(self, ports: Mapping[str, ReplicaPort], router: Router) -> None:
        self._ports, self._router = ports, router
        self.now: dict[str, int] = {}

    async def reshape(
        self, replica: str, devices: int, placing: Placing = "elastic-moe"
    ) -> NewShape:
        """Raises PenstockError, and the log says so too."""
        port = self._ports.get(replica)
        if port is None or not isinstance(port, ReshapingEnd):
            known = ", ".join(
                name for name, one in self._ports.items() if isinstance(one, ReshapingEnd)
            )
            raise BadRequest(
                f"no replica {replica!r} of this fleet has devices to change",
                hint=f"there are: {known or 'none'}",
                param="replica",
            )
        since, error = now(), ""
        shape = NewShape(self.now.get(replica, 0), self.now.get(replica, 0))
        reshaping: ReshapingPort = port
        try:
            shape = await reshaping.reshape(devices, placing)
            self.now[replica] = shape.devices
        except PenstockError as why:
            error = why.message
            raise
        finally:
            self._router.write(
                Reshaped(
                    at=now(),
                    who=self._router.name,
                    replica=replica,
                    was=shape.was,
                    devices=shape.devices,
                    took_s=now() - since,
                    placing=placing,
                    num_copied=shape.num_copied,
                    num_read=shape.num_read,
                    num_bytes=shape.num_bytes,
                    error=error,
                )
            )
        return shape
