"""One replica of a run with faults, and its successors: what a supervisor does, in virtual time.

The host, the link and the replica are the ones that serve; the connection between them is a sim.cable and the executor
is wrapped by sim.speech. Like cluster.process, the keeper brings a lost replica up again after a while; where replicas
outlive their connections (`Case.outlives`), it gives the one that still runs a new connection instead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from msgspec.structs import replace as changed

from penstock.assemble.leaves import modelled_outside
from penstock.cluster.link import ReplicaLink
from penstock.cluster.silence import Patience
from penstock.cluster.spec import ReplicaSpec, open_host
from penstock.core.clock import now
from penstock.core.errors import PenstockError, ReplicaLost
from penstock.core.messages import Hello, Outputs, Say
from penstock.core.ports import Log
from penstock.core.rng import Stream
from penstock.engine.host import Host
from penstock.lab.fault_callers import Broken
from penstock.lab.fault_case import Case
from penstock.sim.cable import Cable
from penstock.sim.faults import DEAD_AFTER_S
from penstock.sim.speech import Speaker, SpeechFabric, SpeechTransport

ORPHAN_S = 5.0
BEAT_S = 0.1
PATIENCE = Patience(suspect_after_s=0.3, lost_after_s=1.0)
BACKOFF_S = (0.0, 0.05, 0.3)
TOLD_S = 0.1  # until an end hears that its connection is lost, at most


class Site:
    """See the module's text. `open_cable` makes the next connection."""

    def __init__(
        self,
        spec: ReplicaSpec,
        log: Log,
        rng: Stream,
        *,
        case: Case,
        open_cable: Callable[[], Cable],
        fabric: SpeechFabric,
    ) -> None:
        self.spec, self._fabric = spec, fabric
        self._outlives, self._beats = case.outlives, case.beats
        self.link = ReplicaLink(spec.name)
        self._log, self._rng = log, rng
        self._open_cable = open_cable
        self.host: Host | None = None
        self.speaker: Speaker | None = None
        self.transport: SpeechTransport | None = None
        self.cable: Cable | None = None
        self.failure: BaseException | None = None  # of a host
        self.serving: list[asyncio.Task[None]] = []
        self._keeper: asyncio.Task[None] | None = None
        self._skew_s, self._mute_until, self._still_until = 0.0, 0.0, 0.0
        self._unsaid: list[Say] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._starting: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_connected(self) -> bool:
        cable = self.cable
        return self.host is not None and cable is not None and not cable.is_cut

    # ---------------------------------------------------------------- life

    def start(self) -> None:
        """Bring it up, or connect to the one that runs, and keep it up."""
        if self._beats:
            self.link.expect_beats(PATIENCE)
        self._connect()
        self._keeper = asyncio.get_running_loop().create_task(
            self._keep(), name=f"keeper {self.name}"
        )

    def start_in(self, seconds: float) -> None:
        """As `start`, for the next controller."""
        self._starting = asyncio.get_running_loop().call_later(seconds, self.start)

    async def stop(self) -> None:
        """Nobody brings it up again; whatever its hosts met is raised."""
        if self._keeper is not None:
            self._keeper.cancel()
        for timer in self._timers:
            timer.cancel()
        self._end_host()
        await asyncio.gather(*self.serving)
        if self.failure is not None:
            raise self.failure

    def _connect(self) -> None:
        self.cable = cable = self._open_cable()
        self._unsaid.clear()
        cable.far.alter = self._alter
        if self.host is not None:
            cable.far.stand_still(self._still_until)
        if self.host is None:
            self._launch(cable)
        else:
            self.host.adopt(cable.far)
        self.link.attach(cable.near)

    def _launch(self, cable: Cable) -> None:
        spec, fabric = self.spec, self._fabric
        opened = modelled_outside(spec, self._log, fabric=fabric.wires)
        self.speaker = speaker = Speaker(
            opened.executor,
            num_blocks=opened.num_blocks,
            block_size=spec.block_size,
            host_blocks=spec.swap.host_blocks + opened.executor.caps.tier_blocks,
            disk_blocks=opened.executor.caps.disk_blocks,
        )
        assert opened.transport is not None
        self.transport = SpeechTransport(opened.transport, speaker, fabric)
        outside = replace(opened, executor=speaker, transport=self.transport)
        beat_s = BEAT_S if self._beats else None
        self.host = host = open_host(spec, cable.far, outside, beat_s=beat_s)
        host.orphan_s = ORPHAN_S if self._outlives else None
        task = asyncio.get_running_loop().create_task(host.run(), name=f"host {self.name}")
        task.add_done_callback(lambda done: self._ended(host, done))
        self.serving.append(task)

    def _ended(self, host: Host, task: asyncio.Task[None]) -> None:
        if self.host is host:
            self.host = self.speaker = None
        if not task.cancelled():
            self.failure = self.failure or task.exception()
            self.serving.remove(task)

    async def _keep(self) -> None:
        while True:
            try:
                await self.link.ready()
            except PenstockError:
                pass  # lost before it said hello
            await self.link.gone()
            if self.link.is_stopped:
                return
            await asyncio.sleep(self._rng.choice(BACKOFF_S))
            if self.link.is_stopped:
                return
            if not self._outlives:
                self._end_host()
            self._connect()

    def _end_host(self) -> None:
        """As kill -9 does: it says nothing more."""
        host, self.host, self.speaker = self.host, None, None
        if host is not None:
            if self.cable is not None:
                self.cable.kill(
                    self.cable.far, kept=1 << 30, told_at=now() + TOLD_S, why="it was ended"
                )
            asyncio.get_running_loop().create_task(host.stop(), name=f"end of {self.name}")

    def abandon(self) -> None:
        """The controller's process is gone: its end of the connection, its keeper, its link."""
        assert self.cable is not None
        if self._keeper is not None:
            self._keeper.cancel()
        if self._starting is not None:
            self._starting.cancel()
        self.cable.kill(
            self.cable.near,
            kept=self._kept(self.cable.far.num_coming),
            told_at=now() + self._rng.uniform(0, 2 * TOLD_S),
            why="the controller is gone",
        )
        self.link.forsake()
        self.link = ReplicaLink(self.name)

    # ---------------------------------------------------------------- what goes wrong

    def kill(self) -> None:
        if self.host is None or self.cable is None:
            return
        told_at = now() + self._rng.uniform(0.0, TOLD_S)
        kept = self._kept(self.cable.near.num_coming)
        self.cable.kill(self.cable.far, kept=kept, told_at=told_at, why="its process was killed")
        self._end_host()

    def cut(self) -> None:
        cable = self.cable
        if cable is not None:
            self._cut(
                cable, (now() + self._rng.uniform(0, TOLD_S), now() + self._rng.uniform(0, TOLD_S))
            )

    def stall(self, for_s: float) -> None:
        """A long one is noticed by the heartbeats, and the replica hears of it when it goes on."""
        cable, speaker = self.cable, self.speaker
        if cable is None or speaker is None:
            return
        self._still_until = until = max(self._still_until, now() + for_s)
        cable.far.stand_still(until)
        speaker.stand_still(until)
        if for_s > DEAD_AFTER_S:
            dead_at = now() + DEAD_AFTER_S
            loop = asyncio.get_running_loop()
            self._timers.append(loop.call_at(dead_at, self._cut, cable, (dead_at, until)))

    def delay(self, for_s: float, luck: float) -> None:
        if self.cable is not None:
            self.cable.delay(luck * 0.1, now() + for_s)

    def fail_step(self, luck: float) -> None:
        if self.speaker is not None:
            positions, is_whole = (2 if luck < 0.8 else 1), luck < 0.4
            self.speaker.fail_next("out of memory", positions=positions, is_whole=is_whole)

    def break_wire(self, for_s: float, luck: float) -> None:
        """Blocks cannot be copied to here: they break off, or do not end."""
        if self.transport is not None and luck < 0.5:
            self.transport.broken_until = now() + for_s
        elif self.transport is not None:
            self.transport.hung_until = now() + for_s

    def disturb_fetches(self, for_s: float, luck: float) -> None:
        """What it fetches or shows goes wrong, or it forgets what it said to hold."""
        if self.transport is None or self.host is None:
            return
        if luck < 0.4:
            self.transport.spoilt_until = now() + for_s
        elif luck < 0.7:
            self.host.replica.ledger.reset_cache()
            self.host._touch()
        else:
            self.break_wire(for_s, (luck - 0.7) / 0.3)

    def mute(self, for_s: float) -> None:
        """Its reports come late."""
        self._mute_until = max(self._mute_until, now() + for_s)
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_at(self._mute_until, self._speak))

    def _speak(self) -> None:
        if now() < self._mute_until:
            return  # somebody else will
        with contextlib.suppress(ReplicaLost):
            while self._unsaid and self.cable is not None:
                if not self.cable.far.offer(self._unsaid[0]):
                    loop = asyncio.get_running_loop()
                    self._timers.append(loop.call_later(0.01, self._speak))
                    return
                del self._unsaid[0]

    def skew(self, seconds: float) -> None:
        self._skew_s = seconds

    def _cut(self, cable: Cable, told_at: tuple[float, float]) -> None:
        kept = (self._kept(cable.near.num_coming), self._kept(cable.far.num_coming))
        cable.cut(kept=kept, told_at=told_at, why="the connection was lost")

    def _kept(self, num_coming: int) -> int:
        return self._rng.randint(0, num_coming)

    def _alter(self, message: object) -> object | None:
        """What the replica says, on its way: nobody is told of what he did not ask for."""
        if isinstance(message, Outputs) and self.failure is None:
            names = {name for name, _ in message.items} - self._fabric.moved
            strange = [name for name in names if not self.link.has(name)]
            if strange and self.is_connected and not self.link.is_stopped:
                told = f"{self.name} tells of {', '.join(strange)}, for which nobody asked"
                self.failure = Broken("owners", told)
        is_behind = bool(self._unsaid) and message is not self._unsaid[0]
        if isinstance(message, Say) and (is_behind or now() < self._mute_until):
            self._unsaid.append(message)
            return None
        if isinstance(message, Say | Hello) and self._skew_s:
            report = changed(message.report, at=message.report.at + self._skew_s)
            if isinstance(message, Say):
                return changed(message, report=report)
            return replace(message, report=report)
        return message
