"""How many replicas, in which role? Asked of a fleet every `every_s` seconds of the policy, and when one is lost.

A mechanism (cluster.scaling) brings replicas up, drains and ends them, changes their roles and devices; it takes longer
than the time between two questions, so a view says what is under way.

Law: the total stays within its bounds; roles are changed of replicas that are alive; nobody is both changed and put
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from msgspec import Struct

from penstock.core.types import Report, Role
from penstock.core.views import PhaseCost, Rng


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How few and how many replicas there may be. Raises ValueError."""

    least: int = 1
    most: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(
                f"least and most must be 1 <= least <= most, got {self.least} and {self.most}"
            )


class Served(NamedTuple):
    """A request that is over. `ttft_s` None: it had no token. `is_refused`: it was turned away or failed."""

    at: float
    arrived_at: float
    ttft_s: float | None
    num_prompt: int
    num_output: int
    is_refused: bool = False


class View(Struct, gc=False):
    """`starting`: replicas on their way up, by role. `served`: what was over within the policy's `window_s`, in order;
    `arrived`: how many came within it. `devices`: of replicas that can have more or fewer. `cost` and `token_s`:
    predictions, as routes have them; None and 0 without any.
    """

    now: float
    rng: Rng
    reports: Sequence[Report]
    outstanding: Mapping[str, int]
    bounds: Bounds
    starting: Mapping[Role, int]
    served: Sequence[Served] = ()
    arrived: int = 0
    devices: Mapping[str, int] = {}
    cost: PhaseCost | None = None
    token_s: float = 0.0

    def active(self) -> list[Report]:
        """Replicas that take requests, in the order of their names."""
        able = [each for each in self.reports if each.is_alive and not each.is_draining]
        return sorted(able, key=lambda report: report.replica)


class Decision(Struct, frozen=True, gc=False):
    """`add`: replicas to bring up, by role. `drain`: to put out, once what they serve has ended or moved away.
    `roles`: new roles of some. `devices`: how many some are to have. Nothing of all that = stay as it is. `why` is not
    empty when something changes.
    """

    add: Mapping[Role, int] = {}
    drain: tuple[str, ...] = ()
    roles: Mapping[str, Role] = {}
    devices: Mapping[str, int] = {}
    why: str = ""


def law(view: View, decision: Decision) -> None:
    active = {report.replica for report in view.active()}
    assert all(count > 0 for count in decision.add.values()), "nothing is added"
    assert set(decision.drain) <= active, "puts out a replica that takes no requests"
    assert len(set(decision.drain)) == len(decision.drain), "puts one out twice"
    assert set(decision.roles) <= active - set(decision.drain), "changes the role of another one"
    total = len(active) + sum(view.starting.values())
    after = total + sum(decision.add.values()) - len(decision.drain)
    if after > total:
        assert after <= view.bounds.most, (
            f"{after} replicas, at most {view.bounds.most} are allowed"
        )
    if after < total:
        assert after >= view.bounds.least, (
            f"{after} replicas, at least {view.bounds.least} are wanted"
        )
    known = set(decision.devices) <= set(view.devices) - set(decision.drain)
    assert known, "changes the devices of another one"
    assert all(count >= 1 for count in decision.devices.values()), "a replica without devices"
    changes = bool(decision.add or decision.drain or decision.roles or decision.devices)
    assert decision.why or not changes, "a change without a reason"


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
