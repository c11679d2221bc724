"""Cached prefixes that one replica of a fleet fetches from another: who is hinted at, and what they say to each other.

A hint names the replica that told of the most of a prompt's blocks, if these are `least_blocks` more than the one has
that the request goes to, and if their memories are laid out alike. It may be wrong by the time it is used: the owner
shows what it has then. Told blocks count only, on the device or in host memory; what a replica is merely expected to
hold soon it is still computing.

Whatever is asked here is answered, or the end of it is told: when an owner is lost the receivers that wait for its
answer hear so, and when a receiver is lost its owners may let go. For everything else the receiver has a deadline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import cast

from penstock.cluster.fetching_end import FetchingEnd
from penstock.cluster.router import Router
from penstock.core.errors import ReplicaLost
from penstock.core.fetching import Hint, Leave, Seek, Show, Shown
from penstock.core.ports import ReplicaPort
from penstock.core.types import Request

TRIED = 3  # of those that seem to hold the most, until one has told so


@dataclass(slots=True)
class _Fetch:
    receiver: str
    seek: int  # the receiver's number
    owner: str
    is_shown: bool = False


class Fetches:
    """One per fleet. Where its replicas do not fetch (cluster.sight), nobody is hinted at."""

    def __init__(self, ports: Mapping[str, ReplicaPort], router: Router) -> None:
        self._ports, self._router, self._config = ports, router, router.sight.peers
        self._count = 0
        self._open: dict[int, _Fetch] = {}

    def listen(self, port: ReplicaPort) -> None:
        if self._config is not None and isinstance(port, FetchingEnd):
            name = port.name
            port.listen_fetches(lambda told: self._hear(name, told))

    def hint(self, request: Request, chosen: str) -> None:
        """Tell the replica that is about to get a request who holds more of its prompt, if somebody does."""
        config, blocks, (about, found) = self._config, self._router.sight.blocks, self._router.held
        if config is None or blocks is None or about != request.id:
            return
        hashes = request.prompt.blocks(self._router.reports[chosen].block_size)
        least = found.get(chosen, 0) + config.least_blocks
        others = [(num, name) for name, num in found.items() if num >= least and name != chosen]
        for _, name in sorted(others, key=lambda each: (-each[0], each[1]))[:TRIED]:
            if self._can_read(chosen, name):
                told = blocks.told_near(name)
                num = sum(1 for _ in takewhile(told.__contains__, hashes))
                if num >= least:
                    cast(FetchingEnd, self._ports[chosen]).hint(Hint(request.id, name, num))
                    return

    def _can_read(self, receiver: str, owner: str) -> bool:
        report = self._router.reports.get(owner)
        if report is None or not report.is_alive:
            return False
        ours, theirs = (getattr(self._ports.get(name), "kv", None) for name in (receiver, owner))
        if ours is None or theirs is None or not ours.layout:
            return False
        return bool((ours.layout, ours.block_size) == (theirs.layout, theirs.block_size))

    # ---------------------------------------------------------------- what replicas say

    def _hear(self, name: str, told: Seek | Shown | Leave | ReplicaLost) -> None:
        if isinstance(told, Seek):
            self._seek(name, told)
        elif isinstance(told, Shown):
            self._shown(name, told)
        elif isinstance(told, Leave):
            for number, fetch in list(self._open.items()):
                if (fetch.receiver, fetch.seek) == (name, told.seek):
                    self._end(number, fetch)
        else:
            self._lose(name, told)

    def _seek(self, receiver: str, told: Seek) -> None:
        owner = self._ports.get(told.peer)
        card = None if owner is None else getattr(owner, "kv", None)
        if card is None:
            self._answer(receiver, Shown(told.seek, error=f"{told.peer} is not there"))
            return
        self._count += 1
        self._open[self._count] = _Fetch(receiver, told.seek, told.peer)
        cast(FetchingEnd, owner).show(Show(self._count, told.names, told.before))

    def _shown(self, owner: str, told: Shown) -> None:
        fetch = self._open.get(told.seek)
        if fetch is None or fetch.owner != owner:
            return  # its receiver has left already
        fetch.is_shown = True
        if told.error is not None:
            del self._open[told.seek]
        shown = Shown(fetch.seek, told.blocks, told.sums, told.address, told.error)
        self._answer(fetch.receiver, shown)

    def _lose(self, name: str, lost: ReplicaLost) -> None:
        for number, fetch in list(self._open.items()):
            if fetch.owner == name:
                del self._open[number]
                if not fetch.is_shown:  # else the copy says how it went
                    self._answer(fetch.receiver, Shown(fetch.seek, error=lost.message))
            elif fetch.receiver == name:
                self._end(number, fetch)

    def _end(self, number: int, fetch: _Fetch) -> None:
        del self._open[number]
        owner = self._ports.get(fetch.owner)
        if isinstance(owner, FetchingEnd):
            owner.leave(Leave(number))

    def _answer(self, receiver: str, told: Shown) -> None:
        port = self._ports.get(receiver)
        if isinstance(port, FetchingEnd):
            port.tell_shown(told)
