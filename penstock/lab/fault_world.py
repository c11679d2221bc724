"""A fleet in virtual time on which faults fall, and what must hold after every callback of the loop.

owners        every request under way is in the hands of one link, the one its fleet thinks, or of none while it is
              routed again; of replicas that can be reached at most one holds it, unless it moves
outstanding   what the router counts of a replica is what the fleet has there
blocks        held + free = all, in device and host memory, recomputed after every turn (`is_checked`)
tokens        see fault_callers: each is the right one, told once, and every request has one end
in the end    nothing is held, counted, queued or timed any more, and no task runs
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from penstock.assemble import replica_specs, router_of
from penstock.assemble.leaves import Leaves
from penstock.cluster.fleet import Fleet
from penstock.cluster.fleets import Fleets
from penstock.cluster.link import ReplicaLink
from penstock.cluster.scaling import Scaling
from penstock.cluster.spec import ReplicaSpec
from penstock.core.clock import now
from penstock.core.events import Completed, Event, Stepped
from penstock.core.messages import Message
from penstock.core.moving import Migrated, MoveMode
from penstock.core.rng import stream
from penstock.core.types import BlockHash, RequestId
from penstock.engine.block_news import NewsDesk
from penstock.engine.replica import Replica
from penstock.lab.fault_callers import Broken, Caller, moody
from penstock.lab.fault_case import Ask, Case
from penstock.lab.fault_site import Site
from penstock.net.codec import Codec
from penstock.policy import scale
from penstock.report.log import encode
from penstock.sim.cable import Cable
from penstock.sim.faults import SKEW_S, Fault
from penstock.sim.speech import SpeechFabric
from penstock.sim.transport import Fabric

INNER = (Stepped, Completed)  # nobody gets or loses a request by them alone
MODES: tuple[MoveMode, ...] = ("live", "blocking", "queued", "pull")
PATIENCE_S = 60.0  # of virtual time, after which a request that has not ended is lost
QUIET_S = 1.0
MOST_CALLBACKS = 500_000  # some thousands are usual
FORGOTTEN_S = 0.3  # at the latest, unless something of SLOW happens
SLOW = frozenset({"stall", "delay", "cut", "kill", "socket", "restart"})


class Notes:
    """The log of a run: keeps what happened, and remembers that something did. A full disk loses what comes."""

    def __init__(self) -> None:
        self.events: list[Event | dict[str, object]] = []
        self.is_new = True
        self.full_until = 0.0
        self.moves = Counter[str]()  # of requests, by outcome

    def emit(self, event: Event) -> None:
        self.is_new = self.is_new or not isinstance(event, INNER)
        if isinstance(event, Migrated):
            self.moves[event.outcome] += 1
        if now() >= self.full_until:
            self.events.append(event)

    def note(self, told: str) -> None:
        self.is_new = True
        self.events.append({"kind": "fault", "at": now(), "told": told})

    def lines(self) -> tuple[str, ...]:
        """All of it as JSON."""
        return tuple([encode(event).decode() for event in self.events])


class World:
    """One run of a case; `after` is to be called after every callback."""

    def __init__(self, case: Case) -> None:
        self.case, self.notes = case, Notes()
        self._rng = stream(case.seed, "faults", "ways")
        self._kinds = frozenset(case.kinds)
        self._codec = Codec(Message)
        self._fleet_config = case.config.fleet[0]
        self._fabric = SpeechFabric(Fabric(case.kv_link))
        self._num_callbacks = 0
        self._num_moving = 0  # of the movements asked for here
        self._specs = replica_specs(case.config, 0)
        self.sites = [self._site(spec) for spec in self._specs]
        self._put_out: list[Site] = []  # before the present controller came
        self.callers: list[Caller] = []
        self.num_faults = 0
        self._timers: list[asyncio.TimerHandle] = []
        self._count = len(self.sites)
        self._controller()
        cache = self._fleet_config.cache
        self._context = (cache.num_blocks or 0) * cache.block_size
        self._is_running = False

    # ---------------------------------------------------------------- a run

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for site in self.sites:
            site.start()
        await asyncio.gather(*(site.link.ready() for site in self.sites))
        self._is_running = True
        begun_at = loop.time()
        for ask in self.case.asks:
            self._timers.append(loop.call_at(begun_at + ask.at, self._ask, ask))
        for fault in self.case.faults:
            self._timers.append(loop.call_at(begun_at + fault.at, self._befall, fault))
        await self._until_over(begun_at)
        await asyncio.sleep(QUIET_S)
        self._check_quiet()
        await self._end()

    async def _until_over(self, begun_at: float) -> None:
        instants = [ask.at for ask in self.case.asks] + [
            fault.at + fault.for_s for fault in self.case.faults
        ]
        last = max(instants, default=0.0)
        while now() < begun_at + last or not all(caller.is_over for caller in self.callers):
            await asyncio.sleep(0.1)
            if now() > begun_at + last + PATIENCE_S:
                waiting = [caller.name for caller in self.callers if not caller.is_over]
                raise Broken("lost", f"{', '.join(waiting)} never ended")

    async def _end(self) -> None:
        await self._fleet.drain()
        self._is_running = False
        await self._scaling.stop()
        for site in self.sites:
            await site.link.stop()
        await asyncio.sleep(QUIET_S)
        for site in (*self.sites, *self._put_out):
            await site.stop()

    # ---------------------------------------------------------------- who asks

    def _ask(self, ask: Ask) -> None:
        caller = Caller(ask, self._kinds, self._tell, context=self._context)
        self.callers.append(caller)
        moody(caller, self.callers, self._ask_more)
        if ask.leaves_at is not None:
            loop = asyncio.get_running_loop()
            in_s = ask.leaves_at - ask.at
            self._timers.append(loop.call_later(in_s, caller.leave))
        caller.begin(Fleets({"m": self._fleet}))

    def _ask_more(self) -> None:
        """From inside a callback."""
        like = self._rng.choice(self.case.asks)
        request = replace(like.request, id=RequestId(f"more{len(self.callers)}"))
        self._ask(replace(like, request=request, mood="patient", leaves_at=None))

    def _tell(self) -> None:
        self.notes.is_new = True

    # ---------------------------------------------------------------- what goes wrong

    def _befall(self, fault: Fault) -> None:
        there = [site for site in self.sites if not site.link.is_stopped]
        site = there[fault.replica % len(there)]
        self.num_faults += 1
        self.notes.note(f"{fault.kind} {site.name} for {fault.for_s:.3f} s, luck {fault.luck:.3f}")
        befall: dict[str, Callable[[], None]] = {
            "kill": site.kill,
            "stall": lambda: site.stall(fault.for_s),
            "delay": lambda: site.delay(fault.for_s, fault.luck),
            "cut": site.cut,
            "stale": lambda: site.mute(fault.for_s),
            "skew": lambda: site.skew((2 * fault.luck - 1) * SKEW_S),
            "log": lambda: self._fill_log(fault.for_s),
            "step": lambda: site.fail_step(fault.luck),
            "cancels": lambda: self._cancel_many(fault.luck),
            "move": lambda: self._move_many(fault.luck),
            "wire": lambda: self._break_wire(site, fault),
            "scale": lambda: self._scale(site),
            "restart": self._restart,
            "fetch": lambda: site.disturb_fetches(fault.for_s, fault.luck),
        }
        befall[fault.kind]()

    def _fill_log(self, for_s: float) -> None:
        self.notes.full_until = now() + for_s

    def _cancel_many(self, luck: float) -> None:
        for caller in [one for one in self.callers if not one.is_over]:
            if self._rng.random() < luck:
                caller.leave()

    def _move_many(self, luck: float) -> None:
        names = [site.name for site in self.sites if not site.link.is_stopped]
        for name, holder in list(self._fleet.holders().items()):
            others = [each for each in names if each != holder] or names
            if self._rng.random() < max(luck, 0.3):
                self._num_moving += 1
                mode, target = self._rng.choice(MODES), self._rng.choice(others)
                self._fleet.move(name, target, mode, on_over=self._moved)

    def _moved(self, told: Migrated) -> None:
        self._num_moving -= 1

    def _break_wire(self, site: Site, fault: Fault) -> None:
        site.break_wire(fault.for_s, fault.luck)
        self._move_many(0.7)

    def _scale(self, site: Site) -> None:
        """One leaves and one comes, as a scale policy would have it."""
        is_leaving = site.link.is_alive and not self._router.reports[site.name].is_draining
        drain = (site.name,) if is_leaving else ()
        self._scaling.carry_out(scale.Decision(add={"any": 1}, drain=drain, why="a fault"))

    async def _start(self, spec: ReplicaSpec, link: ReplicaLink) -> None:
        site = self._site(spec)
        site.link = link
        self.sites.append(site)
        self._count += 1
        site.start()
        await link.ready()

    def _restart(self) -> None:
        """The callers of the old one are gone; some ask the new one again, by the same names."""
        self._put_out += [site for site in self.sites if site.link.is_stopped]
        self.sites = [site for site in self.sites if not site.link.is_stopped]
        asyncio.get_running_loop().create_task(self._scaling.stop())
        self._num_moving = 0
        self._fleet._waiting._waits.clear()
        for ticket in self._fleet._tickets.values():
            ticket.is_cancelled, ticket.on_ended = True, None
            if ticket.movement is not None and ticket.movement._timer is not None:
                ticket.movement._timer.cancel()  # a process that is gone has no timers
        gone = [one for one in self.callers if not one.is_over]
        for site in self.sites:
            site.abandon()
        for caller in gone:
            caller.leave("gone")
        self._controller()
        loop = asyncio.get_running_loop()
        for site in self.sites:
            site.start_in(self._rng.choice((0.0, 0.0, 0.05, 0.2)))
        for caller in gone:
            if self._rng.random() < 0.5:
                again = replace(caller.ask, mood="patient", leaves_at=None)
                in_s = self._rng.choice((0.012, 0.025, 0.3)) * self._rng.random()
                self._timers.append(loop.call_later(in_s, self._ask, again))

    # ---------------------------------------------------------------- what is made

    def _controller(self) -> None:
        """A fleet that knows its replicas by name, and nothing else of what was before."""
        leaves = Leaves(start=self._start, stop=self._nothing, log=lambda who: self.notes)
        self._router, _ = router_of(self.case.config, 0, leaves)
        links = [site.link for site in self.sites]
        bound = self._fleet_config.max_outstanding
        self._fleet = Fleet("m", links, self._router, max_outstanding=bound, moves=self.case.moves)
        self._scaling = Scaling(self._fleet, self._start, self._specs[0], self._count)

    async def _nothing(self) -> None: ...

    def _site(self, spec: ReplicaSpec) -> Site:
        return Site(
            spec,
            self.notes,
            self._rng,
            case=self.case,
            open_cable=self._open_cable,
            fabric=self._fabric,
        )

    def _open_cable(self) -> Cable:
        return Cable(
            latency_s=self.case.config.net.latency_s,
            limit=self.case.queue_limit,
            copied=self._copied if self.case.copies else lambda message: message,
        )

    def _copied(self, message: object) -> object:
        return self._codec.decode(self._codec.encode(message))

    # ---------------------------------------------------------------- what must hold

    def after(self) -> None:
        self._num_callbacks += 1
        if self._num_callbacks > MOST_CALLBACKS:
            raise Broken("lost", f"time stands still at {now()} s: callbacks without an end")
        if self._is_running and self.notes.is_new:
            self.notes.is_new = False
            for caller in self.callers:
                if caller.broken is not None:
                    raise caller.broken
            for site in self.sites:
                if site.failure is not None:
                    raise site.failure
            self._fabric.moved.update(self._fleet.moving)
            self._check_owners()
            if not SLOW & self._kinds:
                self._check_left()

    def _check_left(self) -> None:
        """Who left is forgotten soon."""
        holders, at = self._fleet.holders(), now()
        for caller in self.callers:
            is_late = caller.left_at is not None and at - caller.left_at > FORGOTTEN_S
            if is_late and caller.name in holders and caller.end == "left":
                raise Broken("leaked", f"{caller.name} left {FORGOTTEN_S} s ago and still runs")

    def _check_owners(self) -> None:
        holders = self._fleet.holders()
        counted = dict.fromkeys([site.name for site in self.sites], 0)
        for name in holders.values():
            counted[name] += 1
        there: set[str] = set()
        for site in self.sites:
            name, said = site.name, self._router.outstanding.get(site.name, 0)
            if said != counted[name]:
                raise Broken("owners", f"{said} are counted at {name}, and it has {counted[name]}")
            for request in site.link.requests():
                if holders.get(request) != name:
                    told = f"{name} has {request}; the fleet says {holders.get(request)}"
                    raise Broken("owners", told)
            if site.host is not None and site.is_connected:
                for request in site.host.requests():
                    if request in there and request not in self._fabric.moved:
                        raise Broken("owners", f"{request} stands at two replicas")
                    there.add(request)

    def _check_quiet(self) -> None:
        """All have ended: nothing is left of them anywhere."""
        leaks = [f"{self._num_moving} movements have no end"] if self._num_moving else []
        if self._fleet.num_outstanding or any(self._router.outstanding.values()):
            leaks.append(f"outstanding: {self._router.outstanding}")
        for site in self.sites:
            host, speaker = site.host, site.speaker
            if site.link.is_stopped:
                if host is not None and not self.case.outlives:  # such a one waits for its next
                    leaks.append(f"{site.name} was put out and still runs")
                continue
            if host is None or speaker is None:
                leaks.append(f"{site.name} did not come up again")
                continue
            replica, report = host.replica, host.replica.report()
            replica.check()
            if replica.requests() or report.num_running or report.num_waiting:
                leaks.append(f"{site.name} still holds {replica.requests()}")
            if report.free_blocks != report.total_blocks:
                leaks.append(f"{site.name}: {report.free_blocks} of {report.total_blocks} are free")
            if not speaker.is_clear:
                leaks.append(f"the executor of {site.name} remembers jobs that ended")
            if site.link.requests():
                leaks.append(f"the link of {site.name} still holds {site.link.requests()}")
            known = self._router.reports[site.name]
            if (known.free_blocks, known.is_alive) != (report.free_blocks, True):
                leaks.append(f"the last report of {site.name} is not what it is: {known}")
            leaks += self._told_wrongly(site.name, replica)
            if not (replica._moves.pins.is_empty and not replica._moves.seeks.under_way):
                leaks.append(f"{site.name} keeps blocks for peers, or waits for some")
        if leaks:
            raise Broken("leaked", "; ".join(leaks))

    def _told_wrongly(self, name: str, replica: Replica) -> list[str]:
        """Where the fleet's index differs from what a replica holds."""
        index, news, leaks = self._router.sight.blocks, replica.ledger.news, []
        if index is not None and isinstance(news, NewsDesk):
            index.check()
            if index.told(name) != news.contents():
                leaks.append(f"the index of blocks is wrong about {name}")
            if index.told_behind(name) != _behind(replica):
                leaks.append(f"the index of tiers is wrong about {name}")
        return leaks


def _behind(replica: Replica) -> tuple[set[BlockHash], set[BlockHash]]:
    """What its host memory and its disk hold."""
    tiers = replica._tiers
    return (set(), set()) if tiers is None else (set(tiers.store.host), set(tiers.store.disk))
