"""Engines in turns: for each number of threads and each width of weights, all engines are loaded and take turns.

Measures come in groups that need about the same memory; the processes of a group are started for it and ended after it.
Within a measure every repeat begins with a plain read of memory and goes around all engines, beginning with another one
each time. An engine that cannot do something, or breaks, is listed with its reason and the run goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from penstock.core.types import SCHEMA
from penstock.cost.profile import describe_machine
from penstock.cost.shapes import ModelShape, shape_of
from penstock.lab.speed import side
from penstock.lab.speed.asks import Ask, Sample, Sizes, Taker, alone, many_of, prefixed, started
from penstock.lab.speed.models import model_folder
from penstock.lab.speed.peer import Peer, PeerFailed, PeerSpec
from penstock.lab.speed.reading import Reader, ReadSpeed

OURS = "penstock"
MEASURES = ("decode", "prefill", "many", "prefix", "start")
WEIGHTS = ("bf16", "int8", "int4")
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to measure. `loads`: fields of EngineConfig for Penstock's sides."""

    model: str
    peers: tuple[PeerSpec, ...] = ()
    weights: tuple[str, ...] = ("bf16",)
    threads: tuple[int, ...] = (1,)
    measures: tuple[str, ...] = MEASURES
    repeats: int = 3
    sizes: Sizes = Sizes()
    scratch: Path
    has_port: bool = False
    loads: dict[str, object] = field(default_factory=dict)


class Absent(NamedTuple):
    """What was not run, and why."""

    engine: str
    weights: str
    threads: int
    measure: str
    why: str


@dataclass(slots=True, kw_only=True)
class Run:
    """All that was seen. `reads`: by measure and repeat, as (threads, weights, measure, repeat, speed)."""

    model: str
    shape: ModelShape
    sizes: Sizes
    machine: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    reads: list[tuple[int, str, str, int, ReadSpeed]] = field(default_factory=list)
    abouts: dict[str, str] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """For JSON; figures.py reads it back."""
        reads = [[*told, asdict(speed)] for *told, speed in self.reads]
        return {
            "schema": SCHEMA,
            "model": self.model,
            "shape": asdict(self.shape),
            "sizes": asdict(self.sizes),
            "machine": self.machine,
            "abouts": self.abouts,
            "absent": [each._asdict() for each in self.absent],
            "reads": reads,
            "samples": [asdict(sample) for sample in self.samples],
        }


class Leg(NamedTuple):
    """A group of measures under one number of threads and one width."""

    threads: int
    weights: str
    measures: tuple[str, ...]


def legs(wanted: Wanted) -> Iterator[Leg]:
    groups = (("decode", "prefill"), ("many",), ("prefix",), ("start",))
    for threads in wanted.threads:
        for weights in wanted.weights:
            for group in groups:
                chosen = tuple(each for each in group if each in wanted.measures)
                if chosen:
                    yield Leg(threads, weights, chosen)


def engines(wanted: Wanted) -> list[PeerSpec]:
    """Penstock first."""
    mine: dict[str, object] = {"engine": wanted.loads}
    found = [PeerSpec(name=OURS, command=side.command("replica"), loads=mine)]
    if wanted.has_port:
        alone_only = frozenset({"decode", "prefill"})
        port = PeerSpec(
            name=f"{OURS} port", command=side.command("port"), loads=mine, measures=alone_only
        )
        found.append(port)
    if side.has_packed_cache():
        bare: dict[str, object] = {"engine": {**wanted.loads, **side.NO_PACKED_CACHE}}
        found.append(
            PeerSpec(
                name=f"{OURS}, packed anew",
                command=side.command("replica"),
                loads=bare,
                measures=frozenset({"start"}),
            )
        )
    return [*found, *wanted.peers]


class Turns:
    """One run."""

    def __init__(self, wanted: Wanted, on_progress: OnProgress | None = None) -> None:
        self._wanted = wanted
        self._tell = on_progress or (lambda done, of, told: None)
        self._folder = model_folder(wanted.model, wanted.scratch)
        self._engines = engines(wanted)
        self._prepared: set[tuple[str, str]] = set()
        self._done = 0
        self.run = Run(
            model=wanted.model,
            shape=shape_of(str(self._folder)),
            sizes=wanted.sizes,
            machine=describe_machine(),
        )

    async def all(self) -> Run:
        for leg in legs(self._wanted):
            await (self._starts(leg) if leg.measures == ("start",) else self._leg(leg))
        return self.run

    # ------------------------------------------------------------------ loaded engines

    async def _leg(self, leg: Leg) -> None:
        async with AsyncExitStack() as stack:
            takers = []
            for spec in self._of(leg):
                peer = self._peer(spec, leg)
                stack.push_async_callback(peer.quit)
                try:
                    await self._begin(peer, leg)
                    taker = Taker(
                        peer=peer,
                        weights=leg.weights,
                        threads=leg.threads,
                        sizes=self._wanted.sizes,
                    )
                    await taker.warm_up()
                except PeerFailed as error:
                    self._leave_out(spec, leg, error, leg.measures)
                    continue
                takers.append(taker)
            if takers:
                await self._rounds(leg, takers)

    async def _rounds(self, leg: Leg, takers: list[Taker]) -> None:
        reader = Reader(leg.threads)
        names = [name for each in leg.measures for name in self._spread(each)]
        for name in names:
            taking = list(takers)
            for repeat in range(self._wanted.repeats):
                self._read(reader, leg, name, repeat)
                first = repeat % len(takers)
                for taker in (*takers[first:], *takers[:first]):
                    if taker in taking and not await self._turn(leg, taker, name, repeat):
                        taking.remove(taker)

    async def _turn(self, leg: Leg, taker: Taker, name: str, repeat: int) -> bool:
        measure, _, size = name.partition(" ")
        try:
            if measure == "prefill":
                found = await taker.prefill(int(size), repeat)
            else:
                found = await getattr(taker, measure)(repeat)
        except PeerFailed as error:
            self._leave_out(taker.peer.spec, leg, error, (name,))
            return False
        self._keep(found)
        return True

    def _spread(self, measure: str) -> list[str]:
        if measure == "prefill":
            return [f"prefill {size}" for size in self._wanted.sizes.prefills]
        return [measure]

    # ------------------------------------------------------------------ starting

    async def _starts(self, leg: Leg) -> None:
        specs = self._of(leg)
        for spec in specs:
            peer = self._peer(spec, leg)
            try:  # once uncounted: files come into memory, and what is cached between starts is made
                await self._begin(peer, leg)
            except PeerFailed as error:
                self._leave_out(spec, leg, error, leg.measures)
                specs = [each for each in specs if each is not spec]
            finally:
                await peer.quit()
        for repeat in range(self._wanted.repeats):
            first = repeat % max(1, len(specs))
            for spec in (*specs[first:], *specs[:first]):
                peer = self._peer(spec, leg)
                try:
                    question = self._question(leg)
                    self._keep([await started(peer, question, self._wanted.sizes, repeat)])
                except PeerFailed as error:
                    self._leave_out(spec, leg, error, leg.measures)
                finally:
                    await peer.quit()

    # ------------------------------------------------------------------ parts

    def _of(self, leg: Leg) -> list[PeerSpec]:
        return [
            spec
            for spec in self._engines
            if spec.measures is None or set(leg.measures) <= spec.measures
        ]

    def _peer(self, spec: PeerSpec, leg: Leg) -> Peer:
        name = "".join(c if c.isalnum() else "-" for c in spec.name)
        return Peer(spec, self._wanted.scratch / "logs" / f"{name}-{leg.weights}.txt")

    async def _begin(self, peer: Peer, leg: Leg) -> None:
        await peer.start()
        if leg.weights not in peer.weights:
            raise PeerFailed(f"no weights of {leg.weights}: it has {', '.join(peer.weights)}")
        question = self._question(leg)
        if (peer.spec.name, leg.weights) not in self._prepared:
            self._tell(self._done, self._total(), f"{peer.spec.name} converts {leg.weights}")
            await peer.prepare(question)
            self._prepared.add((peer.spec.name, leg.weights))
        self._tell(self._done, self._total(), f"{peer.spec.name} loads {leg.weights}")
        await peer.load(question)
        self.run.abouts[f"{peer.spec.name}, {leg.weights}"] = peer.about

    def _question(self, leg: Leg) -> dict[str, object]:
        asks = self._asks(leg)
        return {
            "model": str(self._folder),
            "weights": leg.weights,
            "scratch": str(self._wanted.scratch.resolve()),
            "threads": leg.threads,
            "requests": max(len(ask.prompts) for ask in asks),
            "longest": max(ask.longest for ask in asks),
            "tokens": max(ask.num_tokens for ask in asks),
        }

    def _asks(self, leg: Leg) -> Sequence[Ask]:
        """Of the leg's largest, for the sake of memory."""
        sizes = self._wanted.sizes
        if leg.measures == ("many",):
            return [many_of(sizes, repeat) for repeat in range(self._wanted.repeats)]
        if leg.measures == ("prefix",):
            return [prefixed(sizes, 0, is_shared=False)]
        longest = max(sizes.context + sizes.steps, *sizes.prefills)
        return [alone(longest, 1, 0, "size")]

    def _read(self, reader: Reader, leg: Leg, name: str, repeat: int) -> None:
        speed = max((reader.measure() for _ in range(3)), key=lambda each: each.cpu_bytes_s)
        self.run.reads.append((leg.threads, leg.weights, name, repeat, speed))

    def _keep(self, found: list[Sample]) -> None:
        self.run.samples += found
        self._done += 1
        last = found[-1]
        about = f"{last.engine} {last.weights} {last.threads} threads: {last.measure}"
        took = f"{last.wall_s:.3g} s, {last.cpu_s:.3g} s of processor"
        self._tell(self._done, self._total(), f"{about} {took}")

    def _total(self) -> int:
        """Of turns, if nobody fails."""
        count = 0
        for leg in legs(self._wanted):
            names = [name for each in leg.measures for name in self._spread(each)]
            count += len(names) * len(self._of(leg)) * self._wanted.repeats
        return count

    def _leave_out(
        self, spec: PeerSpec, leg: Leg, error: PeerFailed, measures: Sequence[str]
    ) -> None:
        for measure in measures:
            gone = Absent(spec.name, leg.weights, leg.threads, measure, str(error))
            if gone not in self.run.absent:
                self.run.absent.append(gone)
        self._tell(self._done, self._total(), f"{spec.name}: not run: {error}")
