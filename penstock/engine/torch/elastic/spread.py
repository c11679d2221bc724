"""The experts of a model over device processes, as its mixtures see them.

    a layer    x and the rows go to the exchange; each device gets its segments; all compute at once; parts come back

The table says for each expert of a layer which devices have it. It is read and changed (change.py) under the lock that
a layer is computed under, and the same kernels give the same numbers wherever they run, so it may change in the middle
of a step. An expert with several copies has its rows split among them, in order and as evenly as possible.

A device process that dies takes no expert with it, as its arena is held here: a standby maps it and gets the work that
the dead one did not end. If none can be started the step fails, and the next one tries again.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from penstock.core.errors import PenstockError, StepFailed
from penstock.engine.torch.elastic.exchange import MOST_ROWS, Exchange, Form, new_memory
from penstock.engine.torch.elastic.orders import Map, Segment, Stock, told
from penstock.engine.torch.elastic.pages import Arena
from penstock.engine.torch.elastic.workers import DeviceGone, Standbys, Worker
from penstock.policy.move import Slots

TRIES = 2  # at bringing a device back within one step
Table = dict[int, Slots]  # layer -> the experts of each device
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Device:
    """A place for experts, and the process that computes there now."""

    arena: Arena
    worker: Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is spread. `threads`: of all devices together."""

    layers: tuple[int, ...]
    num_experts: int
    page_bytes: int
    form: Form
    threads: int


class Spread:
    """Implements engine.torch.mlp.Spread. `devices` and `table` change together, under `guard`."""

    def __init__(self, wanted: Wanted, standbys: Standbys) -> None:
        self.wanted, self.standbys = wanted, standbys
        self.devices: list[Device] = []
        self.table: Table = {layer: () for layer in wanted.layers}
        self.guard = threading.Lock()  # of these, the exchange and the work lines
        self.num_revived = 0
        self._memory = new_memory(wanted.form)
        self._exchange = Exchange(self._memory, wanted.form)
        self._asked: list[tuple[int, bytes]] = []
        self._num_rows = 0
        self._failed: StepFailed | None = None

    @property
    def pids(self) -> list[int]:
        return [each.worker.child.pid for each in self.devices] + self.standbys.pids

    def begin(self, layer: int, x: Tensor, rows: Tensor, counts: Sequence[int]) -> None:
        """See mlp.Spread. The lock is held until `end`."""
        self.guard.acquire()
        self._asked, self._failed = [], None
        self._num_rows = len(rows)
        if len(x) > MOST_ROWS:
            self._failed = StepFailed(f"a step of {len(x)} tokens, the devices take {MOST_ROWS}")
            return
        self._exchange.x[: len(x)] = x
        self._exchange.rows[: len(rows)] = rows
        for device, segments in enumerate(shares(self.table[layer], counts)):
            if segments:
                self._ask(device, told(layer, len(x), segments))

    def end(self) -> Tensor:
        """See mlp.Spread."""
        try:
            for device, message in self._asked:
                self._await(device, message)
            if self._failed is not None:
                raise self._failed
            return self._exchange.parts[: self._num_rows].clone()
        finally:
            self.guard.release()

    def map(self, arena: Arena, worker: Worker, num_devices: int) -> None:
        """Make a device of a standby. Raises DeviceGone, BadModel."""
        wanted = self.wanted
        order = Map(wanted.page_bytes, wanted.form, max(1, wanted.threads // num_devices))
        worker.tell(order, arena.fd, self._memory)
        worker.hear()

    def close(self) -> None:
        with self.guard:
            devices, self.devices = self.devices, []
        for device in devices:
            device.worker.end()
            device.arena.close()
        self.standbys.close()
        os.close(self._memory)

    def _ask(self, device: int, message: bytes) -> None:
        self._asked.append((device, message))
        try:
            self.devices[device].worker.ask(message)
        except DeviceGone:  # heard again when the answer is awaited
            pass

    def _await(self, device: int, message: bytes) -> None:
        """Every device is heard, also after one failed, or its answer would be taken for that to the next layer."""
        for _ in range(TRIES + 1):
            try:
                self.devices[device].worker.answer()
                return
            except StepFailed as error:
                self._failed = error
                return
            except DeviceGone as why:
                logger.warning("device process %d is gone: %s", device, why)
            try:
                self._revive(self.devices[device])
                self.devices[device].worker.ask(message)
            except (DeviceGone, PenstockError, OSError) as why:
                self._failed = StepFailed(
                    f"a device process died and cannot be replaced: {why}", hint="try again"
                )
                return
        self._failed = StepFailed("a device process dies again and again")

    def _revive(self, device: Device) -> None:
        """Another process takes the arena over; nobody tells it anything before it has. Raises DeviceGone, BadModel."""
        device.worker.end()
        worker = self.standbys.wake()
        self.map(device.arena, worker, len(self.devices))
        worker.tell(Stock(kept=tuple(device.arena.pages.items())))
        worker.hear()
        device.worker = worker
        self.num_revived += 1
        self.standbys.start()


def shares(slots: Slots, counts: Sequence[int]) -> list[list[Segment]]:
    """What each device is to compute of rows that lie expert by expert."""
    holders: dict[int, list[int]] = {}
    for device, held in enumerate(slots):
        for expert in held:
            holders.setdefault(expert, []).append(device)
    found: list[list[Segment]] = [[] for _ in slots]
    at = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        where = holders[expert]
        each, more = divmod(count, len(where))
        for turn, device in enumerate(where):
            part = each + (turn < more)
            if part:
                found[device].append((expert, at, part))
                at += part
    return found
