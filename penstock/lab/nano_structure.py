"""Phase 1 of the search for a pipeline: which split and which order in each stream, as if kernels did not interfere.

Layers follow each other without end, so what counts is the period T after which the next layer is as far. In units of
the period (u = start / T, r = 1 / T) the best periodic schedule is a mixed-integer linear program:

    maximise r                                       r = sum of y_c, where y_c = r for the chosen split c, else 0
    u_j + apart >= u_i + p_i r                       j waits for i of `apart` layers before; p_i r = sum of p_ic y_c
    u_j + k_ij >= u_i + p_i r                        two of one resource: j after i in some layer ...
    u_i + 1 - k_ij >= u_j + p_j r                    ... and i of the next one after j; k_ij whole
    sum over a resource of p_i r <= 1                what it has to do fits in a period

This is the cyclic job shop with its products of T and k divided away. Pieces of one operator keep the order of their
tokens. Solved by HiGHS, up to a number of nodes; `bound` is what no schedule of these candidates beats, `gap` how far
the found one is from it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import StepFailed, missing_extra
from penstock.cost.nano_layer import RESOURCES, NanoOp, Wait

DEEPEST = 3.0  # layers from the first start to the last
LEAST_GAP = 2e-3
NODES = 4000  # of a program's tree; real layers took up to 2,500
LIMIT_S = 300.0  # against programs that nobody thought of: nodes end a search alike on a busy and on an idle machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """`choice`: which of the candidates. Periods in seconds, places in layers."""

    choice: int
    period_s: float
    bound_s: float
    places: tuple[float, ...]

    @property
    def gap(self) -> float:
        return self.period_s / self.bound_s - 1


class Rows:
    """Linear constraints `low <= row <= high`, gathered one by one."""

    def __init__(self, num_columns: int) -> None:
        self.num_columns = num_columns
        self.data: list[float] = []
        self.at: tuple[list[int], list[int]] = ([], [])
        self.low: list[float] = []
        self.high: list[float] = []

    def add(
        self, terms: Sequence[tuple[int, float]], low: float = -np.inf, high: float = np.inf
    ) -> None:
        row = len(self.low)
        for column, value in terms:
            self.at[0].append(row)
            self.at[1].append(column)
            self.data.append(value)
        self.low.append(low)
        self.high.append(high)


@dataclass(frozen=True, slots=True)
class Solved:
    """Values of the columns, of the objective, and a bound of it."""

    x: NDArray[np.float64]
    value: float
    bound: float


@contextmanager
def quiet_output() -> Iterator[None]:
    """HiGHS writes remarks on repaired solutions to the process's output, past Python: nobody asked for them."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def solve(
    rows: Rows,
    objective: NDArray[np.float64],
    *,
    upper: NDArray[np.float64],
    lower: NDArray[np.float64] | None = None,
    whole: NDArray[np.bool_] | None = None,
    nodes: int = NODES,
) -> Solved:
    """Minimise. Raises MissingExtra without scipy, StepFailed when nothing was found in time."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
        from scipy.sparse import coo_array  # type: ignore[import-untyped]
    except ImportError:
        raise missing_extra("scipy", "lab") from None
    shape = (len(rows.low), rows.num_columns)
    table = coo_array((rows.data, rows.at), shape=shape).tocsr()
    with quiet_output():
        found = milp(
            objective,
            constraints=LinearConstraint(table, rows.low, rows.high),
            bounds=Bounds(np.zeros(rows.num_columns) if lower is None else lower, upper),
            integrality=None if whole is None else whole.astype(int),
            options={"node_limit": nodes, "time_limit": LIMIT_S, "mip_rel_gap": LEAST_GAP},
        )
    if found.x is None:
        raise StepFailed(
            f"the solver found no pipeline: {found.message}", hint="allow it more nodes"
        )
    bound = found.mip_dual_bound
    return Solved(found.x, float(found.fun), float(found.fun if bound is None else bound))


class _Columns:
    """Where the variables stand: y and x of the candidates, u of the nano-operations, k of the pairs."""

    def __init__(self, num_choices: int, num_ops: int, pairs: Sequence[tuple[int, int]]) -> None:
        self.num_choices, self.num_ops = num_choices, num_ops
        self.first_u = 2 * num_choices
        self.k = {pair: self.first_u + num_ops + place for place, pair in enumerate(pairs)}
        self.num = self.first_u + num_ops + len(pairs)

    def u(self, op: int) -> int:
        return self.first_u + op


def best_structure(
    ops: Sequence[NanoOp],
    seconds: Sequence[Sequence[float]],
    waits: Sequence[Wait],
    *,
    nodes: int = NODES,
) -> Structure:
    """`seconds`: of every nano-operation, a row for each candidate split; `ops` and `waits` are alike for all."""
    table = np.asarray(seconds, dtype=float)
    unit = table.sum(axis=1).min()
    busy = {name: _busy(ops, table / unit, name) for name in RESOURCES}
    fastest = 1 / max(each.min() for each in busy.values())
    pairs = _pairs(ops, table.max(axis=0) > 0)
    columns = _Columns(len(table), len(ops), pairs)
    rows = _rows(ops, table / unit, waits, columns, fastest)
    lower, upper = np.zeros(columns.num), np.full(columns.num, DEEPEST)
    upper[: columns.num_choices] = fastest
    upper[columns.num_choices : columns.first_u] = 1
    upper[columns.u(0)] = 0
    whole = np.zeros(columns.num, dtype=bool)
    whole[columns.num_choices : columns.first_u] = True
    for (a, b), column in columns.k.items():
        whole[column] = True
        lower[column] = 0 if _are_pieces(ops, a, b) else -DEEPEST
        upper[column] = 0 if _are_pieces(ops, a, b) else DEEPEST + 1
    objective = np.zeros(columns.num)
    objective[: columns.num_choices] = -1
    solved = solve(rows, objective, upper=upper, lower=lower, whole=whole, nodes=nodes)
    choice = int(np.argmax(solved.x[columns.num_choices : columns.first_u]))
    places = solved.x[columns.first_u : columns.first_u + len(ops)]
    return Structure(
        choice=choice,
        period_s=float(-unit / solved.value),
        bound_s=float(unit / min(fastest, -solved.bound)),
        places=tuple(places.tolist()),
    )


def _busy(ops: Sequence[NanoOp], table: NDArray[np.float64], resource: str) -> NDArray[np.float64]:
    mine = [number for number, op in enumerate(ops) if op.resource == resource]
    found: NDArray[np.float64] = table[:, mine].sum(axis=1)
    return found


def _pairs(ops: Sequence[NanoOp], takes_time: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Of one resource; what takes no time is in nobody's way."""
    busy = [number for number in range(len(ops)) if takes_time[number]]
    return [
        (a, b) for a, b in itertools.combinations(busy, 2) if ops[a].resource == ops[b].resource
    ]


def _are_pieces(ops: Sequence[NanoOp], a: int, b: int) -> bool:
    return ops[a].operator == ops[b].operator


def _rows(
    ops: Sequence[NanoOp],
    table: NDArray[np.float64],
    waits: Sequence[Wait],
    columns: _Columns,
    fastest: float,
) -> Rows:
    rows, choices = Rows(columns.num), range(columns.num_choices)

    def minus(op: int) -> list[tuple[int, float]]:
        """- p r of a nano-operation."""
        return [(c, -float(table[c, op])) for c in choices if table[c, op] > 0]

    rows.add([(columns.num_choices + c, 1.0) for c in choices], 1, 1)
    for c in choices:
        rows.add([(c, 1.0), (columns.num_choices + c, -fastest)], high=0)
    for sooner, later, apart in waits:
        if sooner != later:
            rows.add([(columns.u(later), 1.0), (columns.u(sooner), -1.0), *minus(sooner)], -apart)
    for (a, b), k in columns.k.items():
        rows.add([(columns.u(b), 1.0), (columns.u(a), -1.0), (k, 1.0), *minus(a)], 0)
        rows.add([(columns.u(a), 1.0), (columns.u(b), -1.0), (k, -1.0), *minus(b)], -1)
    for resource in RESOURCES:
        mine = [number for number, op in enumerate(ops) if op.resource == resource]
        if mine:
            rows.add([(c, float(table[c, mine].sum())) for c in choices], high=1)
    return rows
