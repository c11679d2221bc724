"""A replica's part in fetching prefixes, between its channel and its turns, as receiver and as owner.

Receiver: what the replica wants is said (Seek), what was shown is copied and its checksums compared, and whatever the
end was is told to the replica and, if the owner keeps blocks for it, to the fleet (Leave). After `timeout_s` the
replica is told that it is late; a copy that is under way by then goes on to its end, as it writes into memory.

Owner: blocks that are to be shown are pinned by the replica, then summed up, which reads all of them, and shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from penstock.core.clock import running_loop
from penstock.core.errors import PenstockError
from penstock.core.fetching import Hint, Leave, Seek, Show, Shown
from penstock.core.prompt import HASH_BYTES
from penstock.core.transport import Transport
from penstock.core.types import BlockHash
from penstock.engine.joinings import Pairs
from penstock.engine.peers import PeersConfig
from penstock.engine.pins import Pinning, Unpinning
from penstock.engine.replica import Replica
from penstock.engine.seeks import Answering, Delaying, Fetched, Hinting

HEAD_BYTES = 64  # what a modelled link is charged for a message, beside what it lists
NUMBER_BYTES = 8
USUAL = PeersConfig()
SPOILT = "what came is not what the peer has"
Say = Callable[[object, int], None]


class HostFetches:
    """`transport` None: nothing can be fetched from here or to here."""

    def __init__(
        self,
        replica: Replica,
        transport: Transport | None,
        say: Say,
        touch: Callable[[], None] = lambda: None,
        config: PeersConfig = USUAL,
    ) -> None:
        """`touch` hears when something has changed that nobody is told of."""
        self._replica, self._transport, self._say, self._touch = replica, transport, say, touch
        self._config = config
        self._hint: Hint | None = None  # of the request that comes next
        self._timers: dict[int, asyncio.TimerHandle] = {}  # of seeks that are not late
        self._shown: dict[int, Shown] = {}  # and not copied yet
        self._copying: set[int] = set()
        self._pinned: dict[int, Show] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def submitted(self, request: str) -> None:
        """The replica has just got it."""
        hint, self._hint = self._hint, None
        if hint is not None and hint.request == request and self._transport is not None:
            self._replica.move(Hinting(request, hint.peer, hint.num_blocks, self._seek))

    def hear(self, told: Hint | Show | Shown | Leave) -> None:
        if isinstance(told, Hint):
            self._hint = told
        elif isinstance(told, Show):
            self._show(told)
        elif isinstance(told, Shown):
            self._take(told)
        elif self._pinned.pop(told.seek, None) is not None:
            self._replica.move(Unpinning(told.seek))

    def abandon(self) -> None:
        """The controller is gone: nobody will say who has left, and nobody answers."""
        for seek in sorted(self._pinned):
            self._replica.move(Unpinning(seek))
        self._pinned.clear()
        self._hint = None
        for seek in sorted(self._timers):
            self._delay(seek)

    async def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---------------------------------------------------------------- as receiver

    def _seek(
        self, seek: int, peer: str, names: tuple[BlockHash, ...], before: tuple[BlockHash, ...]
    ) -> None:
        """The replica wants these."""
        loop = running_loop()
        self._timers[seek] = loop.call_later(self._config.timeout_s, self._delay, seek)
        num_names = len(names) + len(before)
        self._say(Seek(seek, peer, names, before), HEAD_BYTES + HASH_BYTES * num_names)

    def _delay(self, seek: int) -> None:
        """What has not begun to come by now will not."""
        self._forget(seek)
        self._replica.move(Delaying(seek))
        self._shown.pop(seek, None)
        if seek not in self._copying:
            self._leave(seek)

    def _take(self, told: Shown) -> None:
        seek = told.seek
        if seek not in self._timers:
            return  # it was late, and its owner has been told

        def on_room(pairs: Pairs | str) -> None:
            shown = self._shown.pop(seek, None)
            if isinstance(pairs, str):
                self._forget(seek)
                self._leave(seek)
            elif shown is None:
                self._end(seek, 0, "it is late")
            else:
                self._copying.add(seek)
                self._spawn(self._copy(shown, pairs))

        self._replica.move(Answering(seek, told.blocks, told.error, on_room))
        if told.blocks and told.error is None:
            self._shown[seek] = told
            return
        self._forget(seek)
        if told.error is None:
            self._leave(seek)

    async def _copy(self, shown: Shown, pairs: Pairs) -> None:
        error, num_bytes, transport = None, 0, self._transport
        assert transport is not None
        try:
            await transport.pull(shown.address, pairs)
            there = dict(zip(shown.blocks, shown.sums, strict=True))
            here = [block + at for _, block, count in pairs for at in range(count)]
            wanted = tuple([there[one + at] for one, _, count in pairs for at in range(count)])
            if await transport.sums(here) != wanted:
                error = SPOILT
            num_bytes = transport.card.block_bytes * len(here)
        except PenstockError as failed:
            error = failed.message
        self._end(shown.seek, num_bytes, error)

    def _end(self, seek: int, num_bytes: int, error: str | None) -> None:
        self._forget(seek)
        self._copying.discard(seek)
        self._replica.move(Fetched(seek, num_bytes if error is None else 0, error))
        self._leave(seek)
        self._touch()

    def _forget(self, seek: int) -> None:
        timer = self._timers.pop(seek, None)
        if timer is not None:
            timer.cancel()

    def _leave(self, seek: int) -> None:
        self._say(Leave(seek), HEAD_BYTES)

    # ---------------------------------------------------------------- as owner

    def _show(self, told: Show) -> None:
        transport = self._transport
        if transport is None:
            self._say(Shown(told.seek, error="its blocks cannot be read"), HEAD_BYTES)
            return
        behind = transport.behind

        def on_pinned(blocks: tuple[int, ...], hosts: tuple[int, ...]) -> None:
            there = (*blocks, *((behind or 0) + each for each in hosts))
            self._spawn(self._sum_up(told, transport, there))

        self._pinned[told.seek] = told
        reads_host = behind is not None
        self._replica.move(Pinning(told.seek, told.names, told.before, reads_host, on_pinned))

    async def _sum_up(self, told: Show, transport: Transport, blocks: tuple[int, ...]) -> None:
        try:
            sums = await transport.sums(blocks)
            shown = Shown(told.seek, blocks, sums, transport.card.address)
        except PenstockError as failed:
            shown = Shown(told.seek, error=failed.message)
        if self._pinned.get(told.seek) is not told:
            return
        if shown.error is not None:  # nobody will read them, nor say so
            del self._pinned[told.seek]
            self._replica.move(Unpinning(told.seek))
        self._say(shown, HEAD_BYTES + 2 * NUMBER_BYTES * len(shown.blocks))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
