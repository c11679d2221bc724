"""What goes wrong at the callers' end: calls that fail before they are served, and callers that give up.

Failures come in bursts, as BurstGPT's do: beside a steady `share`, there are bursts in which most calls fail. Bursts
begin as a Poisson process, one in `burst_every_s` on average, and last an exponential time of mean `burst_lasts_s`.
A call that fails is

    become = "dropped"      never sent, and counted with its reason, as a row of 0 output tokens in a trace is
    become = "abandoned"    sent, and given up after `failing_s`, as by a caller that has crashed

Callers give up on an answer that has not ended after their patience, a draw of `patience_s` (exponential is the usual
model); `impatient` is the share of callers that have a limit at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.core.rng import stream
from penstock.traffic.draws import Drawn, draw_of
from penstock.traffic.rows import Drop, Flow, Row, Step

REASON = "failed at the source"
BURST_REASON = "failed at the source, in a burst"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    share: float = 0.0
    burst_every_s: float | None = None
    burst_lasts_s: float = 60.0
    burst_share: float = 0.9
    become: Literal["dropped", "abandoned"] = "dropped"
    failing_s: float = 1.0
    patience_s: Drawn | None = None
    impatient: float = 1.0

    def __post_init__(self) -> None:
        for name in ("share", "burst_share", "impatient"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.share == 1 and self.become == "dropped":
            raise ValueError("with a share of 1 every call fails and none is sent")
        for name in ("burst_every_s", "burst_lasts_s", "failing_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


class Faults:
    """Decides in time order what becomes of calls. All calls of one source share the bursts."""

    def __init__(self, failures: Failures, *, seed: int, owner: str, where: str) -> None:
        self._failures = failures
        self._chance = stream(seed, "traffic", "failures", owner)
        self._bursts = stream(seed, "traffic", "bursts", owner)
        patience_s = failures.patience_s
        self._patience = None if patience_s is None else draw_of(patience_s, f"{where}.patience_s")
        self._from_s = self._until_s = 0.0
        self._next_burst(0.0)

    def befall(self, found: Row | Flow) -> Row | Flow | Drop:
        """What becomes of a call or a workflow that begins now. A workflow fails with its first call."""
        assert found.at_s is not None
        share, reason = self._failures.share, REASON
        if self._is_burst(found.at_s):
            share, reason = self._failures.burst_share, BURST_REASON
        if share and self._chance.random() < share:
            if self._failures.become == "dropped":
                return Drop(reason)
            return _limited(found, [self._failures.failing_s])
        if self._patience is None or self._chance.random() >= self._failures.impatient:
            return found
        num = 1 if isinstance(found, Row) else len(found.steps)
        return _limited(found, [max(1e-3, self._patience.draw(self._chance)) for _ in range(num)])

    def _is_burst(self, at_s: float) -> bool:
        while at_s >= self._until_s:
            self._next_burst(self._until_s)
        return at_s >= self._from_s

    def _next_burst(self, after_s: float) -> None:
        if self._failures.burst_every_s is None:
            self._from_s = self._until_s = float("inf")
            return
        self._from_s = after_s + self._bursts.expovariate(1 / self._failures.burst_every_s)
        self._until_s = self._from_s + self._bursts.expovariate(1 / self._failures.burst_lasts_s)


def _limited(found: Row | Flow, limits_s: list[float]) -> Flow:
    """The same, given up after these times; the last one holds for all further calls."""
    if isinstance(found, Row):
        assert found.at_s is not None
        return Flow(found.at_s, "call", (Step(found, abandon_s=limits_s[0]),))
    limits_s = limits_s + limits_s[-1:] * (len(found.steps) - len(limits_s))
    steps = (
        step._replace(abandon_s=limit_s)
        for step, limit_s in zip(found.steps, limits_s, strict=True)
    )
    return found._replace(steps=tuple(steps))
