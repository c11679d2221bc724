"""The far end of a channel: binds a replica to whoever sends it requests, in this process or another one.

It turns messages into calls and what the replica says into messages: Hello first, then one Outputs a step, a Refuse
for a request not taken, a Say when something changed (at most one every `report_s` seconds, the first at once; where
`beat_s` is told at least one so often, so that silence means something), Drained, and Failed when the replica cannot
go on. It ends when told to Stop or when the channel's other end is gone: a replica nobody can reach has no reason to
run.

Unless it is one that outlives its controller (`orphan_s`): then it keeps its weights and its cached prefixes, and ends
only when nobody has adopted it for so long. `adopt` gives it another channel, at any time. With a channel go all who
wait for answers, so what the replica holds by then is cancelled, and nothing is said of it any more: a request of the
same name may come on the next channel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path

from penstock.core.clock import now, running_loop
from penstock.core.errors import BadRequest, PenstockError
from penstock.core.fetching import Hint, Leave, Show, Shown
from penstock.core.messages import (
    AdapterTaken,
    Borrow,
    Cancel,
    Drain,
    Drained,
    DropAdapter,
    Failed,
    GiveBack,
    GoOn,
    Hello,
    Lend,
    Offer,
    Outputs,
    Recall,
    Refuse,
    Reshape,
    Say,
    SetRole,
    Settle,
    Stop,
    Submit,
    Take,
    TakeAdapter,
)
from penstock.core.ports import Channel, Transport
from penstock.core.prompt import HASH_BYTES
from penstock.core.reshaping import Reshaper
from penstock.core.types import Output, Report, Request
from penstock.engine.host_adapters import HostAdapters
from penstock.engine.host_fetches import HostFetches
from penstock.engine.host_moves import HostMoves
from penstock.engine.host_shape import HostShape
from penstock.engine.peers import PeersConfig
from penstock.engine.replica import OnOutputs, Replica
from penstock.net.outbox import Outbox

OUTPUT_BYTES = 64  # what a modelled link is charged for one output
SMALL_BYTES = 256  # and for any message that carries no tokens


class Host:
    """Serves one replica on one channel. `open_replica` makes it, given where its outputs go."""

    def __init__(
        self,
        channel: Channel,
        open_replica: Callable[[OnOutputs], Replica],
        *,
        report_s: float = 0.1,
        about: str = "",
        adapters: HostAdapters | None = None,
        beat_s: float | None = None,
        orphan_s: float | None = None,
    ) -> None:
        self.replica = open_replica(self._send_outputs)
        self._moves = HostMoves(self.replica, None, self._put, self._touch)
        self._fetches = HostFetches(self.replica, None, self._put)
        self._shape = HostShape(None, self._put)
        self._channel = channel
        self._outbox = Outbox(channel)
        self._report_s, self.orphan_s = report_s, orphan_s
        self._about = about
        self._beat_s = beat_s
        self._beat: asyncio.TimerHandle | None = None
        self._adapters = adapters or HostAdapters()
        self._said_at = now()
        self._absorbed = 0  # the highest number among the requests it was sent
        self._timer: asyncio.TimerHandle | None = None
        self._orphaned: asyncio.TimerHandle | None = None
        self._orphans: set[str] = set()  # requests whose callers are gone, until they are freed
        self._tasks: set[asyncio.Task[None]] = set()

    def use(self, transport: Transport, peers: PeersConfig | None = None) -> None:
        """Requests move with their keys and values from now on, and cached prefixes come alone; before `run`."""
        self._moves = HostMoves(self.replica, transport, self._put, self._touch)
        self._fetches = HostFetches(
            self.replica, transport, self._put, self._touch, peers or PeersConfig()
        )

    def spread(self, reshaper: Reshaper) -> None:
        """Its devices can be changed; before `run`."""
        self._shape = HostShape(reshaper, self._put)

    async def run(self) -> None:
        """Serve until stopped; raises what ended the replica otherwise."""
        self._greet()
        try:
            await self.replica.run()
        except Exception as error:
            self._outbox.put(Failed(type(error).__name__, f"the replica failed: {error!r}"))
            await self.replica.stop()
            raise
        finally:
            await self._close()

    async def stop(self) -> None:
        """End `run` from this side."""
        await self._end()

    def adopt(self, channel: Channel) -> None:
        """Serve whoever is at the other end of this channel. Whoever was there before is not heard any more."""
        before, self._channel = self._channel, channel
        self._let_go(before)
        self._outbox = Outbox(channel)
        if self._orphaned is not None:
            self._orphaned.cancel()
            self._orphaned = None
        self.replica.is_draining = False  # that was the other one's affair
        self._greet()
        self._touch()  # what its blocks hold is told with a report

    def _greet(self) -> None:
        channel = self._channel
        channel.watch(partial(self._lose, channel))
        channel.listen(self._hear)
        self._absorbed = 0  # whoever listens now counts anew, and knows of no block
        self.replica.restart_news()
        hello = Hello(self._report(), about=self._about, kv=self._moves.card)
        self._outbox.put(hello, SMALL_BYTES)
        if self._beat_s is not None:
            self._touch()

    def _lose(self, channel: Channel, why: str) -> None:
        """The other end is gone, and with it all who wait for answers."""
        if channel is not self._channel or self._orphaned is not None:
            return
        if self.orphan_s is None:
            self._spawn(self._end())
            return
        self._let_go(channel)
        self._orphaned = running_loop().call_later(self.orphan_s, lambda: self._spawn(self._end()))

    def _let_go(self, channel: Channel) -> None:
        """Neither say nor hear anything there; closing takes a turn, in which something may still come."""
        channel.listen(_ignore)
        self._moves.abandon()
        self._fetches.abandon()
        for request in self.replica.requests():
            self._orphans.add(request)
            self.replica.cancel(request)
        self._outbox.close()
        self._spawn(channel.close())

    # ---------------------------------------------------------------- what the other end says

    def _hear(self, message: object) -> None:
        if self._orphans and isinstance(message, (Submit, Take)):
            self._forget_freed()  # it may come again by the name of one
        if isinstance(message, Submit):
            self._absorbed = max(self._absorbed, message.seq)
            self._submit(message)
        elif isinstance(message, (Offer, Take, Settle, Lend, Borrow, GiveBack, Recall)):
            self._moves.hear(message)
        elif isinstance(message, (Hint, Show, Shown, Leave)):
            self._fetches.hear(message)
        elif isinstance(message, Cancel):
            self.replica.cancel(message.request)
        elif isinstance(message, TakeAdapter):
            taken = self._adapters.take(message.adapter, Path(message.folder))
            self._spawn(self._answer_taken(message.adapter, taken))
        elif isinstance(message, DropAdapter):
            self._adapters.folders.pop(message.adapter, None)
        elif isinstance(message, GoOn):
            self._moves.go_on(message.request)
        elif isinstance(message, Reshape):
            self._spawn(self._shape.reshape(message))
        elif isinstance(message, SetRole):
            self.replica.role = message.role
        elif isinstance(message, Drain):
            self._spawn(self._drain())
        elif isinstance(message, Stop):
            self._spawn(self._end())
        else:
            raise AssertionError(f"a replica is never told {type(message).__name__}")
        self._touch()

    def _submit(self, told: Submit) -> None:
        request = told.request
        try:
            self._adapters.refuse_if_unknown(request)
            self._hash(request)
            self.replica.submit(request, every_token=told.every_token, state=told.state)
            if told.pauses is not None:
                self._moves.pause(request.id, told.pauses)
            self._fetches.submitted(request.id)
        except PenstockError as error:
            refusal = Refuse(
                request.id,
                type(error).__name__,
                error.message,
                error.hint,
                error.param,
                error.retry_after_s,
            )
            self._outbox.put(refusal, SMALL_BYTES)

    async def _answer_taken(self, adapter: str, taken: Awaitable[None]) -> None:
        answer = AdapterTaken(adapter)
        try:
            await taken
        except PenstockError as error:
            answer = AdapterTaken(adapter, type(error).__name__, error.message, error.hint)
        self._outbox.put(answer, SMALL_BYTES)

    def _hash(self, request: Request) -> None:
        """Block hashes are computed here, once, so that a prompt that cannot be hashed harms nobody else."""
        config = self.replica.config
        if config.has_prefix_cache:
            try:
                request.prompt.blocks(config.block_size)
            except ValueError as error:
                raise BadRequest(str(error), param="prompt") from None

    async def _drain(self) -> None:
        await self.replica.drain()
        self._outbox.put(Drained(), SMALL_BYTES)

    async def _end(self) -> None:
        await self.replica.stop()

    # ---------------------------------------------------------------- what the replica says

    def requests(self) -> tuple[str, ...]:
        """Ids of those that somebody waits for."""
        return tuple([one for one in self.replica.requests() if one not in self._orphans])

    def _send_outputs(self, items: tuple[tuple[str, Output], ...]) -> None:
        if self._orphans:
            items = tuple([item for item in items if item[0] not in self._orphans])
            self._forget_freed()
        if items:
            self._outbox.put(Outputs(items), OUTPUT_BYTES * len(items))
        self._touch()

    def _forget_freed(self) -> None:
        self._orphans.intersection_update(self.replica.requests())

    def _put(self, message: object, num_bytes: int) -> None:
        self._outbox.put(message, num_bytes)
        self._touch()

    def _touch(self) -> None:
        """Something changed: a report is due, unless one is under way."""
        if self._timer is None:
            loop = running_loop()
            due = max(self._said_at + self._report_s, loop.time())
            self._timer = loop.call_at(due, self._say)

    def _say(self) -> None:
        self._timer = None
        self._said_at = now()
        news = self.replica.news()
        num_hashes = 0 if news is None else news.num_blocks
        self._outbox.put(Say(self._report(), news), SMALL_BYTES + HASH_BYTES * num_hashes)
        if self._beat_s is not None:
            if self._beat is not None:
                self._beat.cancel()
            self._beat = running_loop().call_later(self._beat_s, self._touch)
        if "steady" in self.replica.config.tells and not self.replica.is_idle:
            self._touch()

    def _report(self) -> Report:
        report = self.replica.report()
        report.absorbed = self._absorbed
        return report

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        for timer in (self._timer, self._beat, self._orphaned):
            if timer is not None:
                timer.cancel()
        await self._fetches.close()
        await self._moves.close()
        await self._outbox.flush()
        self._outbox.close()
        await self._channel.close()


def _ignore(message: object) -> None:
    """From a channel that does not count any more."""
