"""The replicas of one model as one service.

A request is routed, sent, and heard of until all its answers ended. When a replica turns it away (Overloaded, Draining)
or is lost before its first token, it is routed again among the replicas it has not met; when nobody is left the last
error is the caller's. After a first token it goes on at another replica from the tokens heard so far, if these are all
that was lost: one answer, heard token by token, and nothing read off its prompt. Greedy and seeded draws depend on
the tokens and on the place alone, so the text is the one that the lost replica would have said; without a seed the rest
is another draw from the same distribution. Otherwise the request ends with ReplicaLost.

A route policy that raises ends the request it was asked about with StepFailed, and nothing else. Whoever waits in a
task calls `submit`, whoever wants to be called `start`; the one is made of the other. Cancelling the waiting task (or
the call) sends a Cancel on the same turn of the loop; the request counts as outstanding until the replica confirms, so
policies see blocks that are still held.

A request may move to another replica while it runs (`move`, cluster.movement), and all of one's, to let it end: the
ticket stays, and its caller hears nothing but tokens. `reshape` is of cluster.reshapes, `lend` and `recall` of
cluster.lendings.

Work per token: one call of `on_output`. Memory: one Ticket a request, at most `max_outstanding`, with its tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from msgspec import UNSET
from msgspec.structs import replace

from penstock.cluster.fetches import Fetches
from penstock.cluster.handoff import HandOff
from penstock.cluster.lendings import Lendings
from penstock.cluster.movement import MoveBounds
from penstock.cluster.moves import Moves
from penstock.cluster.reshapes import Reshapes
from penstock.cluster.router import Router
from penstock.cluster.steering import Steering
from penstock.cluster.ticket import Ticket
from penstock.cluster.told_adapters import ToldAdapters
from penstock.cluster.waiting import Waiting
from penstock.core.clock import now
from penstock.core.errors import (
    BadRequest,
    Draining,
    Overloaded,
    PenstockError,
    ReplicaLost,
    StepFailed,
    UpstreamFailed,
)
from penstock.core.messages import BlockNews, Submit
from penstock.core.moving import Migrated, MoveMode
from penstock.core.ports import OnEnded, OnOutput, ReplicaPort
from penstock.core.types import Report, Request
from penstock.policy.move import Cause, Move

OnHappened = Callable[[Cause, str], None]
RETRY_AFTER_S = 1.0  # what a caller is told when nothing better is known
_log = logging.getLogger("penstock.cluster")
TURNED_AWAY = (Overloaded, Draining, ReplicaLost, UpstreamFailed)


class Fleet:
    """Replicas that serve the same model; see the module's text."""

    def __init__(
        self,
        name: str,
        ports: Sequence[ReplicaPort],
        router: Router,
        *,
        max_outstanding: int | None = None,
        steering: Steering | None = None,
        moves: MoveBounds | None = None,
    ) -> None:
        self.name = name
        self._ports = {port.name: port for port in ports}
        self._router = router
        self._bound, self._steering = max_outstanding, steering
        self._tickets: dict[str, Ticket] = {}
        self._waiting = Waiting(lambda ticket: self._place(ticket, now(), None))
        self._moves = Moves(self._ports, router, self._tickets, moves or MoveBounds())
        self._lendings = lendings = Lendings(self._ports, router, self._tickets)
        self._fetches = Fetches(self._ports, router)
        self._hand_off = HandOff(self._ports, router, self._moves, self._has, steering)
        reshapes = Reshapes(self._ports, router)
        self.reshape, self.devices = reshapes.reshape, reshapes.now
        self.lent, self.lend, self.recall = lendings.lent, lendings.lend, lendings.recall
        self.adapters = ToldAdapters(self._ports)
        self._is_draining = False
        self._on_happened: OnHappened | None = None
        self._hears_all = steering is not None and steering.hears_tokens
        self._empty: list[asyncio.Future[None]] = []
        for port in ports:
            self._listen(port)

    @property
    def num_outstanding(self) -> int:
        return len(self._tickets)

    def holders(self) -> Mapping[str, str]:
        """Which replica has each request that is under way; those that wait for one are left out."""
        return {
            request: ticket.replica
            for request, ticket in self._tickets.items()
            if request not in self._waiting
        }

    def reports(self) -> Sequence[Report]:
        return list(self._router.reports.values())

    async def submit(self, request: Request, on_output: OnOutput | None = None) -> None:
        """Serve one request; see core.ports.Service."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_ended(error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        ticket = self.start(request, on_ended, on_output)
        try:
            await done
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    def start(
        self, request: Request, on_ended: OnEnded, on_output: OnOutput | None = None
    ) -> Ticket:
        """Begin to serve one request; see core.ports.StartService."""
        at = now()
        self._refuse_if_needed(at, request)
        self._router.arrive(at, request)
        if self._steering is not None:
            self._steering.arrive(at)
        ticket = Ticket(self, request, on_ended, on_output)
        self._tickets[request.id] = ticket
        if self._waiting:
            self._waiting.add(ticket)
        else:
            self._place(ticket, at, None)
        return ticket

    async def drain(self) -> None:
        """Refuse new requests; return when the running ones have ended."""
        self._is_draining = True
        if self._tickets:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._empty.append(done)
            await done
        await asyncio.gather(*(port.drain() for port in self._ports.values()))

    def move(
        self,
        request_id: str,
        target: str,
        mode: MoveMode = "live",
        *,
        on_over: Callable[[Migrated], None] | None = None,
    ) -> None:
        """Begin to move a request, or refuse to. Whatever becomes of it, a Migrated event says it, to `on_over` too."""
        self._moves.begin(request_id, target, mode, on_over)

    @property
    def moving(self) -> Mapping[str, Move]:
        """Movements under way, by request."""
        return self._moves.under_way

    async def drain_replica(self, name: str) -> None:
        """Give a replica no new requests, move away those that can, and return when the last one has ended there."""
        drained = asyncio.ensure_future(self._ports[name].drain())
        try:
            await self._moves.send_away(name)
            await drained
        finally:  # who asked may have been cancelled
            drained.cancel()

    async def stop(self) -> None:
        """End the replicas now; requests inside them are lost."""
        self._is_draining = True
        await asyncio.gather(*(port.stop() for port in self._ports.values()))

    # ---------------------------------------------------------------- replicas that come and go

    def port(self, name: str) -> ReplicaPort:
        """The replica's port. Raises KeyError."""
        return self._ports[name]

    def join(self, port: ReplicaPort) -> None:
        """A replica that answers takes requests from now on."""
        assert port.name not in self._ports, f"{port.name} is of this fleet already"
        self._ports[port.name] = port
        self._listen(port)
        self.happen("joined", port.name)

    def leave(self, name: str) -> None:
        """Forget a replica that was stopped."""
        del self._ports[name]
        self._router.forget(now(), name)

    def tell_what_happens(self, on_happened: OnHappened) -> None:
        """Set who hears of a cause (policy.move.Cause) and the request or replica concerned."""
        self._on_happened = on_happened

    def happen(self, cause: Cause, about: str) -> None:
        if self._on_happened is not None:
            self._on_happened(cause, about)

    # ---------------------------------------------------------------- called by tickets

    def abandon(self, ticket: Ticket) -> None:
        """The caller is gone: tell the replica, and keep counting until it answers."""
        if not ticket.is_cancelled and self._tickets.get(ticket.request.id) is ticket:
            ticket.is_cancelled = True
            self._router.cancel(now(), ticket.request.id)
            if self._waiting.drop(ticket.request.id):
                self._close(ticket, None)
            else:
                if ticket.movement is not None:
                    ticket.movement.unwanted()
                self._ports[ticket.replica].cancel(ticket.request.id)

    def hand_on(self, ticket: Ticket) -> None:
        """Its prompt is computed, and somebody else is to write the answer."""
        self._hand_off.hand_on(ticket)

    def begin(self, ticket: Ticket) -> None:
        """The first of it was heard."""
        self._router.begin(now(), ticket.request.id, ticket.replica)

    def finish(self, ticket: Ticket) -> None:
        """All answers ended at the replica."""
        if ticket.movement is not None:
            ticket.movement.ended()
        self._router.end(now(), ticket.request.id, ticket.replica)
        self._close(ticket, ticket.error)
        self._waiting.ask_for_oldest()

    def retry(self, ticket: Ticket, error: PenstockError) -> None:
        """The replica refused, or is lost."""
        at = now()
        self._router.end(at, ticket.request.id, ticket.replica)
        self._lendings.end(ticket)
        if ticket.is_cancelled:
            self._close(ticket, None)
        elif isinstance(error, TURNED_AWAY) and (not ticket.is_heard or ticket.state()):
            self._place(ticket, at, error)
        else:
            self._refuse(ticket, at, error)

    # ---------------------------------------------------------------- inside

    def _listen(self, port: ReplicaPort) -> None:
        listen_blocks = getattr(port, "listen_blocks", None)
        if listen_blocks is not None:
            listen_blocks(partial(self._hear_blocks, port.name))
        self._fetches.listen(port)
        port.listen(self._hear)

    def _has(self, ticket: Ticket) -> bool:
        return self._tickets.get(ticket.request.id) is ticket

    def _hear(self, report: Report) -> None:
        if report.replica not in self._ports:
            return  # it has left
        before = self._router.reports.get(report.replica)
        if report.is_suspect and not self._router.has_other(report):
            report = replace(report, is_suspect=UNSET)  # a doubtful one is better than none
        self._router.hear(now(), report)
        if not report.is_alive or report.is_draining:
            self._trust_those_left()
        self._lendings.hear(report)
        if before is not None and before.is_alive and not report.is_alive:
            self.happen("lost", report.replica)
        elif report.is_draining and not (before is not None and before.is_draining):
            self.happen("draining", report.replica)

    def _trust_those_left(self) -> None:
        """A replica was doubtful while another one could take its requests."""
        for each in list(self._router.reports.values()):
            if each.is_suspect and not self._router.has_other(each):
                self._router.hear(now(), replace(each, is_suspect=UNSET))

    def _hear_blocks(self, replica: str, news: BlockNews) -> None:
        self._router.tell(now(), replica, news)

    def _refuse_if_needed(self, at: float, request: Request) -> None:
        error: PenstockError | None = None
        if self._is_draining:
            error = Draining(
                "the server is shutting down",
                hint="send the request to another server, or try again in a moment",
                retry_after_s=RETRY_AFTER_S,
            )
        elif self._bound is not None and len(self._tickets) >= self._bound:
            error = Overloaded(
                f"{len(self._tickets)} requests for {self.name!r} are under way and the limit is {self._bound}",
                hint="try again in a moment",
                retry_after_s=RETRY_AFTER_S,
            )
        elif request.id in self._tickets:
            error = BadRequest(f"a request named {request.id!r} is running already", param="id")
        if error is not None:
            self._router.turn_away(at, request, type(error).__name__, error.message)
            raise error

    def _place(self, ticket: Ticket, at: float, why: PenstockError | None) -> None:
        """Send the ticket to a replica it has not met; end it when there is none. Raises nothing."""
        try:
            chosen = self._router.choose(at, ticket.request, ticket.tried)
        except Exception as error:  # noqa: BLE001 - the policy's own; others wait for this call to return
            _log.exception("the route policy of %s failed on %s", self.name, ticket.request.id)
            failed = StepFailed(f"the route policy of {self.name!r} failed: {error!r}")
            failed.__cause__ = error
            self._refuse(ticket, at, failed)
            return
        if chosen is None:
            again_s = self._router.again_s
            if again_s is None:
                if why is None or isinstance(why, Draining):  # that is one replica's affair
                    why = self._nobody()
                self._refuse(ticket, at, why)
                asyncio.get_running_loop().call_soon(self._waiting.ask_for_oldest)
            else:
                self._waiting.add(ticket, again_s)
            return
        moves = self._router.moves
        send = partial(self._send, ticket, chosen, why)
        if not self._lendings.defers(ticket, chosen, send):
            self._hand_over(ticket, at, chosen, why)
        for each in moves:
            self.move(each.request, each.target, each.mode)

    def _send(
        self, ticket: Ticket, chosen: str, why: PenstockError | None, error: PenstockError | None
    ) -> None:
        """Others keep blocks for it by now, or cannot."""
        if error is None and not ticket.is_cancelled:
            self._hand_over(ticket, now(), chosen, why)
        else:
            ticket.tried = (*ticket.tried, chosen)
            self.retry(ticket, error or self._nobody())

    def _hand_over(self, ticket: Ticket, at: float, chosen: str, why: PenstockError | None) -> None:
        ticket.replica = chosen
        ticket.tried = (*ticket.tried, chosen)
        port, state = self._ports[chosen], ticket.state() if ticket.is_heard else None
        seq = self._router.last_seq(chosen)
        ticket.pauses = self._hand_off.pauses(ticket, chosen) if state is None else None
        if state is None:
            request = ticket.request_now()
            self._fetches.hint(request, chosen)
            wants_all = self._hears_all or ticket.on_output is not None
            asked = Submit(request, wants_all, seq=seq, pauses=ticket.pauses)
            port.submit(asked, ticket.hear, ticket.fail)
        elif getattr(port, "kv", None) is not None:
            port.submit(Submit(ticket.request, state=state, seq=seq), ticket.hear, ticket.fail)
        else:
            lost = why or ReplicaLost(f"{chosen} cannot go on with what another replica began")
            self._router.end(at, ticket.request.id, chosen)
            self._refuse(ticket, at, lost)

    def _nobody(self) -> PenstockError:
        alive = sum(report.is_alive for report in self._router.reports.values())
        return (Overloaded if alive else ReplicaLost)(
            f"none of the {len(self._ports)} replicas of {self.name!r} can take a request now ({alive} are running)",
            hint="try again in a moment",
            retry_after_s=RETRY_AFTER_S,
        )

    def _refuse(self, ticket: Ticket, at: float, error: PenstockError) -> None:
        self._router.refuse(at, ticket.request.id, type(error).__name__, error.message)
        self._close(ticket, error)

    def _close(self, ticket: Ticket, error: PenstockError | None) -> None:
        del self._tickets[ticket.request.id]
        self._lendings.end(ticket)
        if self._steering is not None:
            self._steering.over(now(), ticket.served(error))
        ticket.end(error)
        if not self._tickets:
            for done in self._empty:
                if not done.done():
                    done.set_result(None)
            self._empty.clear()
