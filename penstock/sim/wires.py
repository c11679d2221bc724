"""When modelled copies between device and host begin and end.

Each way has a wire of its own, on which copies follow each other; copies that plans wait for also follow each other
both ways, as they do when one thread makes them. Nothing is in use by two at once (core.ports.MovingExecutor): a copy
begins when earlier ones of the same blocks have ended, a plan when those of the blocks that are new to it have.

    seconds = num_runs * pieces * dispatch_s / threads + bytes / bytes_per_s
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

from penstock.core.plans import Decodes, Plan, Transfer
from penstock.core.types import HostLink


class _Copy(NamedTuple):
    device: frozenset[int]
    host: frozenset[int]
    is_sync: bool
    end: float


class Wires:
    """The two wires of one device."""

    def __init__(self, link: HostLink) -> None:
        self._link = link
        self._free_at = {True: 0.0, False: 0.0}  # out, in
        self._copies: list[_Copy] = []

    def begin(self, transfer: Transfer, at: float) -> float:
        """Put a copy on its wire; the instant it ends."""
        device = frozenset(chain.from_iterable(range(d, d + n) for d, _, n in transfer.runs))
        host = frozenset(chain.from_iterable(range(h, h + n) for _, h, n in transfer.runs))
        starts = [at, self._free_at[transfer.is_out]]
        for copy in self._still(at):
            is_before = transfer.is_sync and copy.is_sync
            if is_before or not (copy.device.isdisjoint(device) and copy.host.isdisjoint(host)):
                starts.append(copy.end)
        seconds = self._link.seconds(len(transfer.runs), transfer.num_blocks, transfer.threads)
        end = max(starts) + seconds
        self._free_at[transfer.is_out] = end
        self._copies.append(_Copy(device, host, transfer.is_sync, end))
        return end

    def ready_at(self, plan: Plan, at: float) -> float:
        """When a plan that is launched now can begin."""
        copies = self._still(at)
        if not copies:
            return at
        work = plan.work
        fresh: set[int] = set()
        if isinstance(work, Decodes):
            fresh.update(chain.from_iterable(work.fresh.values()))
            work = work.others
        fresh.update(chain.from_iterable([one.blocks for one in work]))
        ends = [copy.end for copy in copies if copy.is_sync or not copy.device.isdisjoint(fresh)]
        return max(ends, default=at)

    def _still(self, at: float) -> list[_Copy]:
        """Those under way."""
        if self._copies:
            self._copies = [copy for copy in self._copies if copy.end > at]
        return self._copies
