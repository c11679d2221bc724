"""Calls that wait for each other: a conversation, an agent program, or one call whose caller may give up.

A trace yields `(at_s, Workflow)` where the instant of a call is nobody's to know in advance: it begins `wait_s` after
the last of the calls it comes `after` has ended (thinking, or a tool at work). Whoever plays it sleeps
(`lab.workflow`); a slow service is asked for the next call later, as by people and agents.

Calls stand in an order in which every call comes after those that it waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock.core.types import ProgramId, Request
from penstock.traffic.rows import Flow, FlowKind

NOMINAL_S_PER_TOKEN = (
    0.02  # how fast answers are taken to come where instants must be told without a service
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request of a workflow. `abandon_s`: its caller gives up so long after asking; None waits for ever."""

    request: Request
    after: tuple[int, ...] = ()
    wait_s: float = 0.0
    abandon_s: float | None = None

    def __post_init__(self) -> None:
        if self.wait_s < 0:
            raise ValueError(f"wait_s must not be negative, got {self.wait_s}")
        if self.abandon_s is not None and not self.abandon_s > 0:
            raise ValueError(f"abandon_s must be positive, got {self.abandon_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflow:
    """What one caller wants done. `id` is the program of all of its requests, unless it is a lone call."""

    id: ProgramId
    kind: FlowKind
    calls: tuple[Call, ...]

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError(f"the workflow {self.id} has no calls")
        check_order([call.after for call in self.calls])

    def __len__(self) -> int:
        return len(self.calls)


def check_order(afters: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a call that waits for itself, a later one, or one that is not there."""
    for place, after in enumerate(afters):
        for each in after:
            if not 0 <= each < place:
                raise ValueError(f"call {place} cannot wait for call {each}")


def nominal_instants(at_s: float, calls: Iterable[tuple[Sequence[int], float, int]]) -> list[float]:
    """When calls would begin if every answer token took NOMINAL_S_PER_TOKEN and nothing queued.

    `calls`: (those it comes after, its wait, its answer's tokens) of each.
    """
    began: list[float] = []
    ended: list[float] = []
    for after, wait_s, num_output in calls:
        began.append(max((ended[place] for place in after), default=at_s) + wait_s)
        ended.append(began[-1] + num_output * NOMINAL_S_PER_TOKEN)
    return began


def instants_of_flow(flow: Flow) -> list[float]:
    steps = ((step.after, step.wait_s, step.row.num_output) for step in flow.steps)
    return nominal_instants(flow.at_s, steps)


def instants_of_workflow(workflow: Workflow, at_s: float) -> list[float]:
    calls = ((call.after, call.wait_s, call.request.true_output or 0) for call in workflow.calls)
    return nominal_instants(at_s, calls)
