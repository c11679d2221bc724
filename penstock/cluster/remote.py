"""A foreign server as a replica: requests are HTTP exchanges that it answers, reports are what it is seen to be.

It takes exchanges only (core.forward): what is made of token ids has no form there. Requests cannot be moved to it or
away from it, nor keys and values (`kv` is None), and it is told of no adapters; whoever asks is refused.

An exchange is called back: each piece goes on as it comes, and is counted. When the server is seen to be down,
exchanges that have heard nothing yet are given back (ReplicaLost), so that another server gets them; those in the
middle of an answer go on as long as bytes come. A cancelled one closes its connection, which is how such servers
learn of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec import UNSET

from penstock.cluster.foreign import RemoteConfig
from penstock.cluster.passage import Passage, Renaming, body_for
from penstock.cluster.server import Server
from penstock.cluster.told_blocks import ToldBlocks
from penstock.core.clock import now
from penstock.core.errors import BadRequest, PenstockError, ReplicaLost, UpstreamFailed
from penstock.core.forward import Forward, forward_of
from penstock.core.messages import BlockNews, Submit
from penstock.core.moving import KvCard
from penstock.core.ports import OnFailed, OnOutput
from penstock.core.types import FinishReason, Output, Report, Request
from penstock.net.refusals import AGAIN, Unreached
from penstock.net.upstream import Exchange


class _Held:
    """An exchange under way; a net.upstream.Listener."""

    __slots__ = (
        "replica", "request", "forward", "passage", "on_output", "on_failed", "is_heard", "exchange",
    )  # fmt: skip

    def __init__(
        self,
        replica: RemoteReplica,
        request: Request,
        forward: Forward,
        on_output: OnOutput,
        on_failed: OnFailed,
    ) -> None:
        self.replica, self.request, self.forward = replica, request, forward
        self.on_output, self.on_failed = on_output, on_failed
        self.is_heard = False
        self.exchange: Exchange | None = None
        self.passage = Passage(
            shows_usage=forward.takes_usage, rename=replica.renaming(request.model)
        )

    def begun(self, is_events: bool) -> None:
        if self.forward.is_stream and not is_events:
            self._break(f"the server at {self.replica.url} does not answer in a stream")

    def answered(self, data: bytes, is_last: bool) -> None:
        passage = self.passage
        if not self.forward.is_stream:
            passage.keep(data)
            if is_last:
                self._end(passage.whole())
            return
        told = passage.events(data)
        if is_last:
            told += passage.rest()
        if passage.is_done:
            self._end(told)
            return
        if told and (self.is_heard or not is_last):  # else another server may say it better
            self.is_heard = True
            self.on_output(Output(0, (), 0, data=told))
        if is_last:
            self._break(f"the server at {self.replica.url} ended the answer before it was complete")

    def failed(self, error: PenstockError) -> None:
        if self.replica.let_go(self, cancels=False):
            self.on_failed(error)
            self.replica.doubt(error)

    def _break(self, why: str) -> None:
        if self.replica.let_go(self):
            self.on_failed(UpstreamFailed(why))

    def _end(self, data: bytes) -> None:
        if not self.replica.let_go(self, cancels=False):
            return
        usage = self.forward.usage = self.passage.counted()
        finish: FinishReason = "length" if self.passage.is_length else "stop"
        self.on_output(
            Output(0, (), usage.num_output, finish, num_cached=usage.num_cached, data=data)
        )


class RemoteReplica:
    """One model of one server; a core.ports.ReplicaPort."""

    kv: KvCard | None = None  # so nothing can be moved to it or away from it: core.ports.MovingPort

    def __init__(
        self,
        name: str,
        server: Server,
        theirs: str,
        config: RemoteConfig,
        blocks: ToldBlocks | None = None,
    ) -> None:
        self._name = name
        self._blocks = blocks
        self._server, self._theirs, self._config = server, theirs, config
        self._held: dict[str, _Held] = {}
        self._renamings: dict[str, Renaming] = {}
        self._on_report: Callable[[Report], None] | None = None
        self._empty: list[asyncio.Future[None]] = []
        self._is_stopped = False
        server.watch(self._looked)

    @property
    def name(self) -> str:
        return self._name

    @property
    def url(self) -> str:
        return self._server.url

    # ---------------------------------------------------------------- core.ports.ReplicaPort

    def submit(self, asked: Submit, on_output: OnOutput, on_failed: OnFailed) -> None:
        request = asked.request
        loop, forward = asyncio.get_running_loop(), forward_of(request)
        if forward is None:
            refusal = BadRequest(
                f"{request.model!r} is served by another server, which takes text and no token ids",
                hint="call it over HTTP",
                param="model",
            )
            loop.call_soon(on_failed, refusal)
        elif self._is_stopped or not self._server.is_alive:
            lost = ReplicaLost(f"the server at {self.url} is down", hint=AGAIN)
            loop.call_soon(on_failed, lost)
        else:
            if self._blocks is not None and getattr(request.prompt, "is_salted", False):
                self._blocks.note_salt()
            held = self._held[request.id] = _Held(self, request, forward, on_output, on_failed)
            body = body_for(forward, self._theirs, adds_usage=self._config.has_usage)
            held.exchange = self._server.upstream.post(forward.path, body, request.id, held)

    def cancel(self, request_id: str) -> None:
        held = self._held.get(request_id)
        if held is not None and self.let_go(held):
            loop = asyncio.get_running_loop()
            loop.call_soon(held.on_output, Output(0, (), 0, "cancelled"))

    def listen(self, on_report: Callable[[Report], None]) -> None:
        self._on_report = on_report
        on_report(self._report())

    def listen_blocks(self, on_news: Callable[[BlockNews], None]) -> None:
        """See core.ports.BlockPort; nothing is heard of servers that do not tell."""
        if self._blocks is not None:
            self._blocks.start(on_news)

    async def drain(self) -> None:
        """Return when nothing of ours runs there any more."""
        if self._held:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._empty.append(done)
            await done

    async def stop(self) -> None:
        """End what runs and let go of the server, which goes on without us."""
        self._is_stopped = True
        for held in list(self._held.values()):
            self._give_back(held, "this server is stopping")
        if self._blocks is not None:
            self._blocks.close()
        await self._server.close()

    async def take_adapter(self, adapter: str, folder: str) -> None:
        """Such a server reads its own folders."""
        raise BadRequest(
            "this model is served by another server, which is not told of adapters from here",
            hint="load the adapter there; it is served here as a model of its own after a restart",
            param="lora_name",
        )

    def drop_adapter(self, adapter: str) -> None:
        """There is none."""

    # ---------------------------------------------------------------- reports

    def _looked(self) -> None:
        if self._on_report is not None:
            self._on_report(self._report())
        if not self._server.is_alive:
            if self._blocks is not None:
                self._blocks.forget()
            for held in [each for each in self._held.values() if not each.is_heard]:
                self._give_back(held, f"the server at {self.url} is down")

    def _report(self) -> Report:
        server, load = self._server, self._server.load
        size = self._config.block_size(load)
        total = free = 0
        if load.num_blocks and load.block_size:
            total = load.num_blocks * load.block_size // size
            free = round(total * (1 - min(1.0, load.usage or 0.0)))
        return Report(
            replica=self._name,
            at=now(),
            is_alive=server.is_alive and not self._is_stopped,
            num_running=len(self._held) if load.num_running is None else load.num_running,
            num_waiting=load.num_waiting or 0,
            free_blocks=free,
            total_blocks=total,
            block_size=size,
            max_context=server.models.get(self._theirs) or 0,
            is_suspect=True if server.is_suspect else UNSET,
        )

    # ---------------------------------------------------------------- of exchanges

    def renaming(self, asked: str) -> Renaming | None:
        if asked == self._theirs:
            return None
        found = self._renamings.get(asked)
        if found is None:
            found = self._renamings[asked] = Renaming(self._theirs, asked)
        return found

    def doubt(self, error: PenstockError) -> None:
        """An exchange failed so."""
        if isinstance(error, Unreached):
            self._server.miss()
        elif isinstance(error, ReplicaLost):
            self._server.doubt()

    def let_go(self, held: _Held, *, cancels: bool = True) -> bool:
        """Whoever gets True, once an exchange, tells how it ended."""
        if self._held.pop(held.request.id, None) is None:
            return False
        if cancels and held.exchange is not None:
            held.exchange.cancel()
        if not self._held:
            for done in self._empty:
                if not done.done():
                    done.set_result(None)
            self._empty.clear()
        return True

    def _give_back(self, held: _Held, why: str) -> None:
        if self.let_go(held):
            held.on_failed(ReplicaLost(why, hint=AGAIN))
