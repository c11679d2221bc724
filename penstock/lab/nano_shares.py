"""Phase 2 of the search for a pipeline: how large a share each nano-operation gets, with interference.

The structure of phase 1 is played (cost.nano_play). Once it is periodic, a period falls into intervals in which the
same kernels run. With the order of these intervals kept, best lengths and shares are a mixed-integer linear program:

    minimise  sum of t_e                                 e: intervals; t_e >= 0, so that an interval may vanish
    x_il = 1 for one level l of each i                   i: memory- and network-bound nano-operations
    sum over e of w_eil = x_il d_i / P(s_l)              w_eil: how long i runs at level l within e
    sum over l of w_eil = t_e                            for every e in which i runs
    sum over e of (t_e - sum of s_l w_eil) = d_a         a: products, which get what the others leave
    t_e >= sum of s_l w_eil                              shares of an interval sum to at most 1

Its shares are played again, which moves borders that pressed against each other past one another, until nothing gets
better. `fluid_bound` is what no schedule with this sharing beats, whatever its split, order and shares: a linear
program over how long each pair of shares is in use.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from penstock.cost.nano_layer import Resource
from penstock.cost.nano_play import STEADY, Player, Schedule, Span
from penstock.cost.nano_sharing import Sharing
from penstock.lab.nano_structure import NODES, Rows, solve

ROUNDS = 12
BETTER = 1e-4  # least relative gain for which another round is worth it
SAME = 1e-6  # of a period: how far layers may differ and still count as one pace


@dataclass(frozen=True, slots=True)
class Interval:
    """A stretch of a period; `running` names the nano-operations."""

    seconds: float
    running: frozenset[int]


def intervals_of(spans: Sequence[Span], num_ops: int) -> list[Interval] | None:
    """One period in the middle of what was played; None when layers there differ."""
    layer = STEADY[1] - 1
    starts = {(span.number, span.layer): span.start for span in spans}
    begin, end = starts[0, layer], starts[0, layer + 1]
    for number in range(num_ops):
        apart = starts[number, layer + 1] - starts[number, layer]
        if abs(apart - (end - begin)) > SAME * (end - begin):
            return None
    inside = [span for span in spans if span.end > begin and span.start < end]
    borders = {begin, end}
    borders |= {at for span in inside for at in (span.start, span.end) if begin < at < end}
    ordered = sorted(borders)
    return [
        Interval(
            after - before,
            frozenset(s.number for s in inside if s.start <= before and s.end >= after),
        )
        for before, after in itertools.pairwise(ordered)
        if after - before > 0
    ]


def best_shares(
    schedule: Schedule, sharing: Sharing, seconds: Sequence[float], *, nodes: int = NODES
) -> tuple[Schedule, float]:
    """The schedule with the best shares found, and its pace in seconds a layer."""
    best, best_s = schedule, Player(schedule, sharing).pace_s(seconds)
    current = schedule
    for _ in range(ROUNDS if len(sharing.levels) > 1 else 0):
        spans = Player(current, sharing).spans(seconds)
        intervals = intervals_of(spans, len(schedule.ops))
        if intervals is None:
            break
        shares = _shares(current, sharing, seconds, intervals, nodes)
        if shares == current.shares:
            break
        current = dataclasses.replace(current, shares=shares)
        pace = Player(current, sharing).pace_s(seconds)
        if pace > best_s * (1 - BETTER):
            break
        best, best_s = current, pace
    return best, best_s


def _shares(
    schedule: Schedule,
    sharing: Sharing,
    seconds: Sequence[float],
    intervals: Sequence[Interval],
    nodes: int,
) -> tuple[float, ...]:
    """The program above, in thousandths of a layer: solvers take 1e-6 for nothing."""
    unit = sum(seconds) / 1000
    seconds = [each / unit for each in seconds]
    ops, levels = schedule.ops, range(len(sharing.levels))
    others = [i for i in range(len(ops)) if ops[i].resource != "compute" and seconds[i] > 0]
    first_x = len(intervals)
    x = {(i, n): first_x + place for place, (i, n) in enumerate(itertools.product(others, levels))}
    runs = [(e, i) for e, each in enumerate(intervals) for i in others if i in each.running]
    first_w = first_x + len(x)
    w = {
        (e, i, n): first_w + place
        for place, ((e, i), n) in enumerate(itertools.product(runs, levels))
    }
    rows = Rows(first_w + len(w))
    for i in others:
        rows.add([(x[i, n], 1.0) for n in levels], 1, 1)
        speeds = [sharing.speed(ops[i].resource, share) for share in sharing.levels]
        for n in levels:
            mine = [(w[e, i, n], 1.0) for e, j in runs if j == i]
            rows.add([*mine, (x[i, n], -seconds[i] / speeds[n])], 0, 0)
    for e, i in runs:
        rows.add([(e, -1.0), *((w[e, i, n], 1.0) for n in levels)], 0, 0)
    _add_products(rows, schedule, sharing, seconds, intervals, w)
    whole = np.zeros(rows.num_columns, dtype=bool)
    whole[first_x:first_w] = True
    upper = np.full(rows.num_columns, 1e5)
    upper[first_x:first_w] = 1
    objective = np.zeros(rows.num_columns)
    objective[:first_x] = 1
    solved = solve(rows, objective, upper=upper, whole=whole, nodes=nodes)
    found = list(schedule.shares)
    for i in others:
        found[i] = sharing.levels[max(levels, key=lambda n: solved.x[x[i, n]])]
    return tuple(found)


def _add_products(
    rows: Rows,
    schedule: Schedule,
    sharing: Sharing,
    seconds: Sequence[float],
    intervals: Sequence[Interval],
    w: Mapping[tuple[int, int, int], int],
) -> None:
    """Products get done with what the others leave them, which is never less than nothing."""
    taken: list[list[tuple[int, float]]] = [[] for _ in intervals]
    for (e, _, n), column in w.items():
        taken[e].append((column, -sharing.levels[n]))
    for e in range(len(intervals)):
        rows.add([(e, 1.0), *taken[e]], 0)
    for a, op in enumerate(schedule.ops):
        if op.resource == "compute" and seconds[a] > 0:
            mine = [e for e, each in enumerate(intervals) if a in each.running]
            terms = [term for e in mine for term in ((e, 1.0), *taken[e])]
            rows.add(terms, seconds[a], seconds[a])


def fluid_bound(busy_s: Mapping[Resource, float], sharing: Sharing) -> float:
    """Seconds below which no layer with so much to do can come under this sharing."""
    levels = sorted({0.0, *sharing.levels})
    pairs = [(m, n) for m, n in itertools.product(levels, repeat=2) if m + n <= 1 + 1e-9]
    unit = sum(busy_s.values())
    rows = Rows(len(pairs))
    told: tuple[tuple[Resource, list[float]], ...] = (
        ("compute", [1 - m - n for m, n in pairs]),
        ("memory", [sharing.speed("memory", m) for m, _ in pairs]),
        ("network", [sharing.speed("network", n) for _, n in pairs]),
    )
    for resource, speeds in told:
        terms = [(place, speed) for place, speed in enumerate(speeds) if speed > 0]
        rows.add(terms, busy_s[resource] / unit)
    objective = np.ones(len(pairs))
    return unit * solve(rows, objective, upper=np.full(len(pairs), np.inf)).value


def nominal_shares(busy_s: Mapping[Resource, float], sharing: Sharing) -> dict[Resource, float]:
    """One share for each of memory and network with which a saturated device is done soonest."""

    def least_s(pair: tuple[float, float]) -> float:
        memory_s = busy_s["memory"] / sharing.speed("memory", pair[0])
        network_s = busy_s["network"] / sharing.speed("network", pair[1])
        products_s = busy_s["compute"] + pair[0] * memory_s + pair[1] * network_s
        return max(products_s, memory_s, network_s)

    pairs = [
        (m, n) for m, n in itertools.product(sharing.levels, repeat=2) if m + n <= 1 + 1e-9
    ] or [(sharing.levels[0], sharing.levels[0])]
    memory, network = min(pairs, key=least_s)
    return {"compute": 0.0, "memory": memory, "network": network}
