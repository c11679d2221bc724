"""One replica as its fleet sees it: calls become messages, messages become calls back.

The link keeps which requests are in the replica's hands. It outlives the process at the other end: when a channel
closes, all requests in it fail with ReplicaLost and the replica is reported dead; `attach` then gives it the channel
of the next process. Nothing waits here: messages queue in an outbox, bounded by the requests outstanding.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from msgspec import UNSET
from msgspec.structs import replace

from penstock.cluster.fetching_end import FetchingEnd
from penstock.cluster.moving_end import SMALL_BYTES, TOKEN_BYTES, MovingEnd
from penstock.cluster.reshapes import ReshapingEnd
from penstock.cluster.silence import Patience, Silence
from penstock.core.clock import now
from penstock.core.errors import PenstockError, ReplicaLost, SchemaMismatch, error_class
from penstock.core.fetching import Leave, Seek, Shown
from penstock.core.messages import (
    AdapterTaken,
    BlockNews,
    Cancel,
    Drain,
    Drained,
    DropAdapter,
    Failed,
    Hello,
    Lent,
    Offered,
    Outputs,
    Recalled,
    Refuse,
    ReshapeDone,
    Say,
    SetRole,
    Stop,
    Submit,
    TakeAdapter,
    Taken,
)
from penstock.core.ports import Channel, OnFailed, OnOutput
from penstock.core.schema import check_schema
from penstock.core.types import Report, Request, Role
from penstock.net.outbox import Outbox

_log = logging.getLogger("penstock.cluster")


class _Held:
    """A request in the replica's hands."""

    __slots__ = ("on_output", "on_failed", "left")

    def __init__(self, on_output: OnOutput, on_failed: OnFailed, left: int) -> None:
        self.on_output, self.on_failed, self.left = on_output, on_failed, left


class ReplicaLink(MovingEnd, ReshapingEnd, FetchingEnd):
    """The near end of a replica's channel; a core.ports.MovingPort."""

    def __init__(self, name: str) -> None:
        MovingEnd.__init__(self)
        ReshapingEnd.__init__(self)
        FetchingEnd.__init__(self)
        self._name = name
        self.is_stopped = False  # by us: nobody should bring it up again
        self._held: dict[str, _Held] = {}
        self._about = ""
        self._report: Report | None = None
        self._on_report: Callable[[Report], None] | None = None
        self._on_news: Callable[[BlockNews], None] | None = None
        self._channel: Channel | None = None
        self._outbox: Outbox | None = None
        self._ready: asyncio.Future[None] | None = None
        self._gone: asyncio.Future[None] | None = None
        self._drained: list[asyncio.Future[None]] = []
        self._role: Role | None = None  # told while it ran, as adapters are
        self._adapters: dict[str, str] = {}  # told of while it ran: its successor is told again
        self._taking: dict[str, asyncio.Future[None]] = {}
        self._silence: Silence | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def about(self) -> str:
        """What the replica runs on, for people; known once it is ready."""
        return self._about

    @property
    def is_alive(self) -> bool:
        return self._report is not None and self._report.is_alive

    def requests(self) -> tuple[str, ...]:
        """Ids of those in its hands."""
        return tuple(self._held)

    def has(self, request_id: str) -> bool:
        return request_id in self._held

    # ---------------------------------------------------------------- life

    def expect_beats(self, patience: Patience) -> None:
        """The replica says something at least every BEAT_S: take silence for what cluster.silence makes of it."""
        self._silence = Silence(patience, on_suspect=self._suspect, on_lost=self.lose)

    def forsake(self) -> None:
        """Its controller is gone: nobody is to be told of anything any more."""
        if self._silence is not None:
            self._silence.end()

    def attach(self, channel: Channel) -> None:
        """Use this channel from now on. `ready()` tells when the replica at its end answered."""
        assert self._channel is None, f"{self._name} has a channel already"
        self._channel, self._outbox = channel, Outbox(channel)
        loop = asyncio.get_running_loop()
        self._ready, self._gone = loop.create_future(), loop.create_future()
        channel.watch(self.lose)
        channel.listen(self._hear)

    async def gone(self) -> None:
        """Return when the replica is lost, for whatever reason."""
        assert self._gone is not None, "attach a channel first"
        await asyncio.shield(self._gone)

    async def ready(self) -> None:
        """Return when the replica said hello; raise why it cannot."""
        assert self._ready is not None, "attach a channel first"
        await asyncio.shield(self._ready)

    def lose(self, why: str) -> None:
        """The replica is gone: fail what it held and tell that it is dead."""
        self._fail(ReplicaLost(f"the replica was lost: {why}", hint="send the request again"))

    def _fail(self, error: PenstockError) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            return
        channel.listen(_ignore)  # closing takes a turn, in which something may still come
        if self._outbox is not None:
            self._outbox.close()
        if self._silence is not None:
            self._silence.end()
        task = asyncio.get_running_loop().create_task(channel.close())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # somebody may wait, or not
        if self._report is not None:
            self._tell(
                replace(
                    self._report,
                    at=now(),
                    is_alive=False,
                    is_suspect=UNSET,
                    num_running=0,
                    num_waiting=0,
                )
            )
        self._tell_drained()
        for taking in self._taking.values():  # its successor will be told
            if not taking.done():
                taking.set_result(None)
        held, self._held = list(self._held.values()), {}
        lost = ReplicaLost(error.message, hint="send the request again")
        for one in held:
            one.on_failed(lost)
        self._lose_moves(lost)
        self._lose_shape(lost)
        self._hear_fetch(lost)

    # ---------------------------------------------------------------- core.ports.ReplicaPort

    def submit(self, asked: Submit, on_output: OnOutput, on_failed: OnFailed) -> None:
        if self._channel is None or self._outbox is None:
            lost = ReplicaLost("the replica is not running", hint="send the request again")
            asyncio.get_running_loop().call_soon(on_failed, lost)
            return
        request, state = asked.request, asked.state
        assert request.id not in self._held, f"{request.id} is in {self._name} already"
        self._held[request.id] = _Held(on_output, on_failed, request.n)
        num_bytes = SMALL_BYTES + TOKEN_BYTES * request.prompt.num_tokens
        if state is not None:
            num_bytes += TOKEN_BYTES * len(state.output_ids)
        self._outbox.put(asked, num_bytes)

    def cancel(self, request_id: str) -> None:
        if request_id in self._held and self._outbox is not None:
            self._outbox.put(Cancel(request_id), SMALL_BYTES)

    def adopt(self, request: Request, on_output: OnOutput, on_failed: OnFailed) -> None:
        assert request.id not in self._held, f"{request.id} is in {self._name} already"
        self._held[request.id] = _Held(on_output, on_failed, request.n)

    def disown(self, request_id: str) -> None:
        self._held.pop(request_id, None)

    def _put(self, message: object, num_bytes: int = 0) -> None:
        if self._channel is not None and self._outbox is not None:
            self._outbox.put(message, SMALL_BYTES + num_bytes)

    # ---------------------------------------------------------------- core.ports.AdapterPort

    async def take_adapter(self, adapter: str, folder: str) -> None:
        """See core.ports.AdapterPort."""
        if adapter in self._taking:
            await asyncio.shield(self._taking[adapter])
            return
        self._adapters[adapter] = folder
        if self._channel is None or self._outbox is None:
            return
        taking = self._taking[adapter] = asyncio.get_running_loop().create_future()
        self._outbox.put(TakeAdapter(adapter, folder), SMALL_BYTES)
        try:
            await taking
        except PenstockError:
            self._adapters.pop(adapter, None)
            raise
        finally:
            self._taking.pop(adapter, None)

    def drop_adapter(self, adapter: str) -> None:
        self._adapters.pop(adapter, None)
        if self._channel is not None and self._outbox is not None:
            self._outbox.put(DropAdapter(adapter), SMALL_BYTES)

    def listen(self, on_report: Callable[[Report], None]) -> None:
        self._on_report = on_report
        if self._report is not None:
            on_report(self._report)

    def set_role(self, role: Role) -> None:
        """Its reports say so from now on, and those of its successors."""
        self._role = role
        if self._report is not None:
            self._tell(replace(self._report, role=role))
        if self._channel is not None and self._outbox is not None:
            self._outbox.put(SetRole(role), SMALL_BYTES)

    def listen_blocks(self, on_news: Callable[[BlockNews], None]) -> None:
        """See core.ports.BlockPort."""
        self._on_news = on_news

    async def drain(self) -> None:
        """Return when nothing runs there any more (also when it is lost)."""
        if self._channel is None or self._outbox is None:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drained.append(done)
        self._outbox.put(Drain(), SMALL_BYTES)
        await done

    async def stop(self) -> None:
        """Tell the replica to end and let go of it, for good. Whatever it held is lost."""
        self.is_stopped = True
        if self._channel is None or self._outbox is None:
            return
        self._outbox.put(Stop(), SMALL_BYTES)
        await self._outbox.flush()
        self.lose("it was stopped")

    # ---------------------------------------------------------------- what the replica says

    def _hear(self, message: object) -> None:
        if self._channel is None:
            return  # said before it was lost: its report would call it alive again
        if self._silence is not None:
            self._silence.hear()
        if isinstance(message, Outputs):
            self._hear_outputs(message)
        elif isinstance(message, Say):
            if message.news is not None and self._on_news is not None:
                self._on_news(message.news)
            self._tell(message.report)
        elif isinstance(message, Hello):
            self._greet(message)
        elif isinstance(message, Refuse):
            self._hear_refusal(message)
        elif isinstance(message, (Offered, Taken, Lent, Recalled)):
            self._hear_move(message)
        elif isinstance(message, (Seek, Shown, Leave)):
            self._hear_fetch(message)
        elif isinstance(message, AdapterTaken):
            self._hear_taken(message)
        elif isinstance(message, ReshapeDone):
            self._hear_shape(message)
        elif isinstance(message, Drained):
            self._tell_drained()
        elif isinstance(message, Failed):
            self._fail(error_class(message.code)(message.message, hint=message.hint))
        else:
            raise AssertionError(f"a fleet is never told {type(message).__name__}")

    def _greet(self, hello: Hello) -> None:
        try:
            check_schema(f"replica {self._name}", hello.schema)
        except SchemaMismatch as error:  # whoever waits for `ready` hears it
            self._fail(error)
            return
        role = hello.report.role if self._role is None else self._role
        self._tell(replace(hello.report, role=role))
        self._about, self._kv = hello.about, hello.kv
        assert self._outbox is not None
        if self._role is not None:
            self._outbox.put(SetRole(self._role), SMALL_BYTES)
        for adapter, folder in self._adapters.items():
            self._outbox.put(TakeAdapter(adapter, folder), SMALL_BYTES)
        self._reshape_again()
        if self._silence is not None:
            self._silence.begin()
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _suspect(self, is_suspect: bool) -> None:
        _log.warning(
            "[%s] %s",
            self._name,
            "nothing was heard of it for a while: new requests go elsewhere where they can"
            if is_suspect
            else "it speaks again",
        )
        if self._report is not None:
            told = True if is_suspect else UNSET
            self._tell(replace(self._report, at=now(), is_suspect=told))

    def _hear_outputs(self, message: Outputs) -> None:
        held = self._held
        for request_id, output in message.items:
            one = held.get(request_id)
            if one is None:
                continue
            if output.finish is not None:
                one.left -= 1
                if not one.left:
                    del held[request_id]
            one.on_output(output)

    def _hear_refusal(self, refusal: Refuse) -> None:
        one = self._held.pop(refusal.request, None)
        if one is not None:
            error = error_class(refusal.code)(
                refusal.message,
                hint=refusal.hint,
                param=refusal.param,
                retry_after_s=refusal.retry_after_s,
            )
            one.on_failed(error)

    def _hear_taken(self, answer: AdapterTaken) -> None:
        taking = self._taking.get(answer.adapter)
        error = None
        if answer.code is not None:
            error = error_class(answer.code)(answer.message, hint=answer.hint)
        if taking is None or taking.done():
            if error is not None:
                _log.warning("%s does not take an adapter again: %s", self._name, error.message)
        elif error is None:
            taking.set_result(None)
        else:
            taking.set_exception(error)

    def _tell(self, report: Report) -> None:
        self._report = report
        if self._on_report is not None:
            self._on_report(report)

    def _tell_drained(self) -> None:
        for done in self._drained:
            if not done.done():
                done.set_result(None)
        self._drained.clear()


def _ignore(message: object) -> None:
    """From a replica that is lost already."""
