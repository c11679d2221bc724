"""Asks a fleet's steering as often as its policies want, and has done what they say.

Questions about moves are asked while requests are under way; those about size always, since a fleet that nobody asks
anything can be smaller. What happens between two rounds (a replica joins, is lost or drains, a first token) is told by
the fleet through `tell`, if the move policy asked for that cause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from penstock.cluster.fleet import Fleet
from penstock.cluster.scaling import Scaling
from penstock.cluster.steering import Steering
from penstock.core.clock import now
from penstock.policy.move import Cause, Move, MoveMode

_log = logging.getLogger("penstock.cluster")


class Mover(Protocol):
    """What has requests moved; a fleet."""

    @property
    def moving(self) -> Mapping[str, Move]:
        """Movements under way, by request."""
        ...

    def lent(self) -> Mapping[str, Sequence[tuple[str, int]]]:
        """By request, who keeps how many of its blocks."""
        ...

    def move(self, request_id: str, target: str, mode: MoveMode) -> None: ...

    def lend(self, request_id: str, creditor: str, num_blocks: int) -> None: ...

    def recall(self, request_id: str, creditor: str, num_blocks: int) -> None: ...


class Rounds:
    """The clockwork of one fleet. `mover` None: nothing moves; `scaling` None: its size is fixed."""

    def __init__(
        self,
        fleet: Fleet,
        steering: Steering,
        *,
        mover: Mover | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        self._fleet, self._steering = fleet, steering
        self._mover, self._scaling = mover, scaling
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._causes = steering.causes if mover is not None else frozenset[Cause]()
        if self._causes:
            fleet.tell_what_happens(self.tell)

    def start(self) -> None:
        if self._mover is not None:
            self._again("move", self._steering.move_every_s, self._move)
        if self._scaling is not None:
            self._again("scale", self._steering.scale_every_s, self._scale)

    async def stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._scaling is not None:
            await self._scaling.stop()

    def tell(self, cause: Cause, about: str) -> None:
        """Something happened that a policy may want to move requests for."""
        if cause in self._causes:
            self._guarded("move", lambda: self._ask(cause, about))

    def _again(self, name: str, every_s: float | None, act: Callable[[], None]) -> None:
        if every_s is None:
            return

        def ring() -> None:
            self._guarded(name, act)
            self._again(name, every_s, act)

        self._timers[name] = asyncio.get_running_loop().call_later(every_s, ring)

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:  # noqa: BLE001 - the policy's own; the fleet goes on without its answer
            _log.exception("the %s policy of %s failed", name, self._fleet.name)

    def _move(self) -> None:
        if self._fleet.num_outstanding:
            self._ask("tick", "")

    def _ask(self, cause: Cause, about: str) -> None:
        assert self._mover is not None
        mover = self._mover
        decision = self._steering.ask_move(
            now(), mover.moving, cause=cause, about=about, lent=mover.lent()
        )
        for move in decision.moves:
            mover.move(move.request, move.target, move.mode)
        for loan in decision.loans:
            mover.lend(loan.request, loan.creditor, loan.num_blocks)
        for loan in decision.recalls:
            mover.recall(loan.request, loan.creditor, loan.num_blocks)

    def _scale(self) -> None:
        assert self._scaling is not None
        devices = self._scaling.devices
        decision = self._steering.ask_scale(now(), self._scaling.starting, devices)
        self._scaling.carry_out(decision)
