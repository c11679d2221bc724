"""Real benches of one server, again and again: first all at once, then every load in turn, as often as wanted."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from penstock.core.errors import StepFailed
from penstock.lab.bench import Bench, Benched, bench
from penstock.lab.calibrate import OnStage
from penstock.lab.drive import Driven
from penstock.lab.local_server import LocalServer
from penstock.lab.neighbours import Watch
from penstock.report.summary import Figures

BURST = 1e6  # times as fast as traced: all at once
ANSWERED = (
    0.8  # of a burst: its tail runs in ever smaller batches and says nothing about saturation
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One bench at one load."""

    load: float
    repeat: int
    speed: float
    figures: Figures
    neighbours: float | None
    lateness_p99_s: float | None
    is_marked: bool

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**dataclasses.asdict(self), "figures": self.figures.to_dict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Benches `server` with the first `num_requests` of a trace."""

    server: LocalServer
    trace: Path
    num_requests: int
    neighbour_limit: float
    tell: OnStage

    def saturation(self) -> tuple[float, int]:
        """Requests a second when there are always more than can be served; and the context that the server has."""
        self.tell("saturation", 0, 1)
        found = self._bench(BURST, 0)
        assert found.server.max_context is not None, "our own server tells its context"
        return answered_rate(found.driven), found.server.max_context

    def runs(self, speeds: Mapping[float, float], repeats: int) -> list[Run]:
        """Every load's speed, and that `repeats` times. Prompts have other words each time, so none is cached."""
        found: list[Run] = []
        for repeat in range(repeats):
            for load, speed in speeds.items():
                self.tell("bench", len(found), repeats * len(speeds))
                watch = Watch(self.server.pids)
                benched = self._bench(speed, len(found) + 1)
                neighbours = watch.share()
                found.append(
                    Run(
                        load=load,
                        repeat=repeat,
                        speed=speed,
                        figures=benched.figures,
                        neighbours=neighbours,
                        lateness_p99_s=benched.lateness.p99,
                        is_marked=is_noisy(neighbours, self.neighbour_limit),
                    )
                )
        return found

    def _bench(self, speed: float, seed: int) -> Benched:
        """Raises StepFailed when not all were answered: there is nothing to compare then."""
        wanted = Bench(
            url=self.server.url,
            trace=self.trace,
            limit=self.num_requests,
            speed=speed,
            seed=seed,
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(bench(wanted))
        if not found.is_whole:
            raise KeyboardInterrupt
        if found.figures.errors:
            told = ", ".join(f"{count} {kind}" for kind, count in found.figures.errors.items())
            raise StepFailed(f"requests of the bench failed: {told}")
        return found


def is_noisy(neighbours: float | None, limit: float) -> bool:
    """Whether a run is marked. Where nothing is known of neighbours nothing is marked."""
    return neighbours is not None and neighbours > limit


def answered_rate(driven: Driven) -> float:
    """Of a burst: answers a second until ANSWERED of them had ended."""
    ended_s: Sequence[float] = sorted(
        value for group in driven.groups.values() for value in group.e2e_s
    )
    num = max(1, round(ANSWERED * len(ended_s)))
    return num / ended_s[num - 1]
