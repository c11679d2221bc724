"""How a model gets more or fewer devices, or other experts on those it has, while it serves.

    plan       which experts each device is to hold: a move policy says so, layer by layer
    wake       a standby for each new device
    prepare    what a device gets is copied from the pages of one that has it, or read from disk if none has, into fresh
               pages, by all devices at once; meanwhile the old table serves
    switch     when all are ready: the table is changed, between two layers
    clean      pages that nobody needs are dropped; devices that left are standbys again

Until the switch anything that goes wrong (a full memory, a process that dies) leaves the table as it was, and the fresh
pages are dropped: a change happens as a whole or not at all. Keys and values are elsewhere and stay where they are.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.core.errors import BadRequest, PenstockError, StepFailed
from penstock.core.reshaping import NewShape
from penstock.core.rng import stream
from penstock.engine.torch.elastic.orders import Drop, Order, Peer, Rest, Stock, Threads
from penstock.engine.torch.elastic.pages import Arena, Place
from penstock.engine.torch.elastic.spread import Device, Spread, Table
from penstock.engine.torch.elastic.workers import DeviceGone, Worker
from penstock.policy import move
from penstock.policy.move import Experts

Loads = Mapping[int, Sequence[float]]  # layer -> rows that each expert took
Fresh = list[tuple[Place, int]]
SPARE = 1  # experts more than its share that a device may have of a layer


@dataclass(slots=True)
class Stocking:
    """What one device is to get, and who was told. `num_answers` are awaited of `worker`."""

    device: Device
    worker: Worker
    fresh: Fresh
    copied: tuple[tuple[Place, int, int, int], ...]
    read: tuple[tuple[Place, int], ...]
    num_answers: int = 0


@dataclass(slots=True)
class Change:
    """One change under way. `new`: devices that did not serve before."""

    devices: list[Device] = field(default_factory=list)
    new: list[Device] = field(default_factory=list)
    stockings: list[Stocking] = field(default_factory=list)

    @property
    def num_copied(self) -> int:
        return sum(len(each.copied) for each in self.stockings)

    @property
    def num_read(self) -> int:
        return sum(len(each.read) for each in self.stockings)


class Changes:
    """Changes of one spread model, one at a time."""

    def __init__(self, spread: Spread) -> None:
        self.spread = spread
        self._one = threading.Lock()

    def reshape(self, devices: int, policy: move.Policy, loads: Loads) -> NewShape:
        """Return when it serves so. For a thread of its own.

        Raises BadRequest, BadModel, StepFailed; then nothing has changed.
        """
        with self._one:
            was = len(self.spread.devices)
            target = self.plan(devices, policy, loads)
            if target == self.spread.table:
                return NewShape(was, devices)
            change = self._carry_out(devices, target)
            moved = (change.num_copied + change.num_read) * self.spread.wanted.page_bytes
            return NewShape(was, devices, change.num_copied, change.num_read, moved)

    def plan(self, devices: int, policy: move.Policy, loads: Loads) -> Table:
        """Raises BadRequest."""
        count = self.spread.wanted.num_experts
        if not 1 <= devices <= count:
            raise BadRequest(f"{count} experts cannot be spread over {devices} devices")
        found: Table = {}
        room = -(-count // devices) + SPARE
        for layer, now in self.spread.table.items():
            asked = Experts(loads.get(layer) or [1.0] * count, now, devices, room)
            view = move.View(0.0, stream(0, "experts"), (), {}, {}, experts=asked)
            decision = policy.decide(view)
            move.law(view, decision)
            found[layer] = now if decision.experts is None else decision.experts
            if len(found[layer]) != devices:
                raise BadRequest("this move policy does not change the number of devices")
        return found

    def _carry_out(self, count: int, target: Table) -> Change:
        change, spread = Change(), self.spread
        try:
            for _ in range(count - len(spread.devices)):
                change.new.append(self._new_device(count))
            change.devices = [*spread.devices, *change.new][:count]
            self._prepare(change, target)
            leaving = self._switch(change, target)
        except (DeviceGone, PenstockError, OSError) as why:
            self._undo(change)
            if isinstance(why, PenstockError):
                raise
            raise StepFailed(f"the devices stay as they were: {why}", hint="try again") from None
        self._clean(leaving)
        return change

    def _new_device(self, count: int) -> Device:
        """Raises DeviceGone, BadModel."""
        wanted = self.spread.wanted
        worker = self.spread.standbys.wake()
        arena = Arena(len(wanted.layers) * wanted.num_experts, wanted.page_bytes)
        try:
            self.spread.map(arena, worker, count)
        except (DeviceGone, PenstockError):
            worker.end()
            arena.close()
            raise
        return Device(arena, worker)

    def _prepare(self, change: Change, target: Table) -> None:
        """Every device copies and reads beside the others. Raises what the first one said that cannot."""
        for at, device in enumerate(change.devices):
            wanted = [(layer, each) for layer, slots in target.items() for each in slots[at]]
            missing = [place for place in wanted if place not in device.arena.pages]
            if missing:
                change.stockings.append(self._stocking(device, missing))
        errors: list[DeviceGone | PenstockError] = []
        for each in change.stockings:
            try:
                self._tell(each)
            except DeviceGone as error:
                errors.append(error)
        for each in change.stockings:  # all are heard, whatever one says
            while each.num_answers:
                each.num_answers -= 1
                try:
                    each.worker.hear()
                except DeviceGone as error:
                    each.num_answers = 0
                    errors.append(error)
                except PenstockError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _stocking(self, device: Device, missing: Sequence[Place]) -> Stocking:
        sources = {
            place: (at, page)
            for at, other in enumerate(self.spread.devices)
            for place, page in other.arena.pages.items()
        }
        fresh = device.arena.take(missing)
        copied = tuple((p, page, *sources[p]) for p, page in fresh if p in sources)
        read = tuple((p, page) for p, page in fresh if p not in sources)
        return Stocking(device, device.worker, fresh, copied, read)

    def _tell(self, stocking: Stocking) -> None:
        """Raises DeviceGone."""
        for peer in sorted({source for _, _, source, _ in stocking.copied}):
            stocking.worker.tell(Peer(peer), self.spread.devices[peer].arena.fd)
            stocking.num_answers += 1
        stocking.worker.tell(Stock(copied=stocking.copied, read=stocking.read))
        stocking.num_answers += 1

    def _switch(self, change: Change, target: Table) -> Sequence[Device]:
        """The devices that left. Raises DeviceGone when one that was ready is not any more."""
        spread = self.spread
        with spread.guard:
            for each in change.stockings:
                if each.device.worker is not each.worker:
                    raise DeviceGone("a process died before all were ready")
            leaving = spread.devices[len(change.devices) :]
            spread.devices, spread.table = change.devices, target
            for each in change.stockings:
                each.device.arena.pages.update(each.fresh)
        return leaving

    def _undo(self, change: Change) -> None:
        for device in change.new:
            device.worker.end()
            device.arena.close()
        for each in change.stockings:
            if each.device not in change.new:
                self._drop(each.device, each.fresh)

    def _clean(self, leaving: Sequence[Device]) -> None:
        """A process that dies here is replaced by the next layer."""
        spread = self.spread
        for at, device in enumerate(spread.devices):
            wanted = {(layer, each) for layer, slots in spread.table.items() for each in slots[at]}
            with spread.guard:
                over = [one for one in device.arena.pages.items() if one[0] not in wanted]
                for place, _ in over:
                    del device.arena.pages[place]
            self._drop(device, over)
            self._order(device, Threads(max(1, spread.wanted.threads // len(spread.devices))))
        for device in leaving:
            if self._order(device, Rest()):
                spread.standbys.give(device.worker)
            else:
                device.worker.end()
            device.arena.close()
        spread.standbys.start()

    def _drop(self, device: Device, pages: Fresh) -> None:
        if pages:
            if not self._order(device, Drop(tuple(pages))):
                device.arena.punch(page for _, page in pages)
            device.arena.give(page for _, page in pages)

    def _order(self, device: Device, order: Order) -> bool:
        """Whether it was carried out."""
        worker = device.worker
        try:
            worker.tell(order)
            worker.hear()
        except (DeviceGone, PenstockError):
            return False
        return True
