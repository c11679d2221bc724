"""A foreign server as a replica: requests are HTTP exchanges that it answers, reports are what it is seen to be.

It takes exchanges only (core.forward): what is made of token ids has no form there. What else a replica of ours can,
and these cannot, is missing from `capabilities` and refused: moving a request, handing over its keys and values,
adapters.

An exchange is one task: post, pass on each piece as it comes, count. When the server is seen to be down, exchanges
that have heard nothing yet are given back (ReplicaLost), so that another server gets them; those in the middle of an
answer go on as long as bytes come. A cancelled one closes its connection, which is how such servers learn of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from penstock.cluster.foreign import RemoteConfig
from penstock.cluster.passage import Passage, Renaming, body_for
from penstock.cluster.server import Server
from penstock.core.clock import now
from penstock.core.errors import BadRequest, PenstockError, ReplicaLost, StepFailed, UpstreamFailed
from penstock.core.forward import Forward, forward_of
from penstock.core.ports import OnFailed, OnOutput
from penstock.core.types import FinishReason, Output, Report, Request
from penstock.net.upstream import Answer, Unreached

_log = logging.getLogger("penstock.cluster")
AGAIN = "send the request again"


class _Held:
    """An exchange under way."""

    __slots__ = ("request", "forward", "on_output", "on_failed", "is_heard", "task")

    def __init__(
        self, request: Request, forward: Forward, on_output: OnOutput, on_failed: OnFailed
    ) -> None:
        self.request, self.forward = request, forward
        self.on_output, self.on_failed = on_output, on_failed
        self.is_heard = False
        self.task: asyncio.Task[None] | None = None


class RemoteReplica:
    """One model of one server; a core.ports.ReplicaPort."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, name: str, server: Server, theirs: str, config: RemoteConfig) -> None:
        self._name = name
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

    def submit(
        self,
        request: Request,
        on_output: OnOutput,
        *,
        on_failed: OnFailed,
        every_token: bool = True,
    ) -> None:
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
            held = _Held(request, forward, on_output, on_failed)
            self._held[request.id] = held
            held.task = loop.create_task(self._serve(held))

    def cancel(self, request_id: str) -> None:
        held = self._held.get(request_id)
        if held is not None and self._let_go(held):
            loop = asyncio.get_running_loop()
            loop.call_soon(held.on_output, Output(0, (), 0, "cancelled"))

    def listen(self, on_report: Callable[[Report], None]) -> None:
        self._on_report = on_report
        on_report(self._report())

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
            for held in [each for each in self._held.values() if not each.is_heard]:
                self._give_back(held, f"the server at {self.url} is down")

    def _report(self) -> Report:
        server, size = self._server, self._config.block_tokens
        load = server.load
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
        )

    # ---------------------------------------------------------------- one exchange

    async def _serve(self, held: _Held) -> None:
        forward, upstream = held.forward, self._server.upstream
        body = body_for(forward, self._theirs, adds_usage=self._config.has_usage)
        answer: Answer | None = None
        try:
            answer = await upstream.post(forward.path, body, held.request.id)
            passage = Passage(
                shows_usage=forward.takes_usage, rename=self._renaming(held.request.model)
            )
            if forward.is_stream:
                await self._stream(held, answer, passage)
            else:
                data = passage.whole(await answer.whole())
                self._end(held, data, passage)
        except PenstockError as error:
            if self._let_go(held):
                self._fail(held, error)
        except Exception as error:  # noqa: BLE001 - whoever waits for the answer must hear of it
            _log.exception("exchange %s with %s failed", held.request.id, self.url)
            if self._let_go(held):
                held.on_failed(StepFailed(f"the exchange failed: {error!r}"))
        finally:
            if answer is not None:
                answer.close()

    async def _stream(self, held: _Held, answer: Answer, passage: Passage) -> None:
        if not answer.is_events:
            raise UpstreamFailed(f"the server at {self.url} does not answer in a stream")
        on_output = held.on_output
        while not passage.is_done:
            data = await answer.some()
            if not data:
                break
            told = passage.events(data)
            if passage.is_done:
                self._end(held, told, passage)
            elif told:
                held.is_heard = True
                on_output(Output(0, (), 0, data=told))
        if not passage.is_done:
            told = passage.rest()
            if not passage.is_done:
                raise UpstreamFailed(
                    f"the server at {self.url} ended the answer before it was complete"
                )
            self._end(held, told, passage)
        await answer.end()

    def _end(self, held: _Held, data: bytes, passage: Passage) -> None:
        if not self._let_go(held, cancels=False):
            return
        usage = held.forward.usage = passage.counted()
        finish: FinishReason = "length" if passage.is_length else "stop"
        held.on_output(
            Output(0, (), usage.num_output, finish, num_cached=usage.num_cached, data=data)
        )

    def _fail(self, held: _Held, error: PenstockError) -> None:
        held.on_failed(error)
        if isinstance(error, Unreached):
            self._server.miss()
        elif isinstance(error, ReplicaLost):
            self._server.doubt()

    def _renaming(self, asked: str) -> Renaming | None:
        if asked == self._theirs:
            return None
        found = self._renamings.get(asked)
        if found is None:
            found = self._renamings[asked] = Renaming(self._theirs, asked)
        return found

    def _give_back(self, held: _Held, why: str) -> None:
        if self._let_go(held):
            held.on_failed(ReplicaLost(why, hint=AGAIN))

    def _let_go(self, held: _Held, *, cancels: bool = True) -> bool:
        """Whoever gets True, once an exchange, tells how it ended."""
        if self._held.pop(held.request.id, None) is None:
            return False
        if cancels and held.task is not None and held.task is not asyncio.current_task():
            held.task.cancel()
        if not self._held:
            for done in self._empty:
                if not done.done():
                    done.set_result(None)
            self._empty.clear()
        return True
