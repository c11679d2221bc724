"""The tables of a report, and what of a run goes into its JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from penstock.report.causes import CAUSES, DUST_S, WORK, Explanation
from penstock.report.collect import Facts
from penstock.report.money import Money
from penstock.report.movements import Movements
from penstock.report.offered import WINDOWS_S
from penstock.report.page import Cell, Grid, kept
from penstock.report.summary import Figures, GroupFigures
from penstock.report.table import LATENCIES, seconds, share

MOST_REASONS = 20
TIMES = ("mean", "p50", "p90", "p95", "p99", "max")


def latency_grid(found: GroupFigures) -> Grid:
    rows: list[tuple[Cell, ...]] = []
    for label, name in LATENCIES:
        spread = getattr(found, name)
        if spread.num:
            rows.append((label, *(getattr(spread, each) for each in TIMES), spread.num))
    return Grid(
        title="Latencies, s",
        caption="ITL: every gap between two tokens. Queue: arrival to first start.",
        columns=("", *TIMES, "of"),
        rows=tuple(rows),
    )


def group_grid(figures: Figures) -> Grid:
    rows = [
        (
            kind, name, found.num_offered, found.num_finished, kept(found.attainment), found.goodput_per_s,
            found.ttft_s.p50, found.ttft_s.p99, found.tpot_s.p50, found.tpot_s.p99, found.e2e_s.p50, found.e2e_s.p99,
        )
        for kind, groups in (("class", figures.classes), ("tenant", figures.tenants))
        for name, found in groups.items()
        if len(groups) > 1
    ]  # fmt: skip
    names = ("", "", "offered", "finished", "kept", "goodput/s")
    latencies = ("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "E2E p50", "E2E p99")
    return Grid(
        title="By class and tenant",
        columns=(*names, *latencies),
        rows=tuple(rows),
        narrow=(1, 2, 4, 5, 7, 9, 11),
    )


def slowest_grid(slowest: Sequence[tuple[str, Explanation]]) -> Grid:
    """The slowest answers and what delayed them, in words; runs are named if any is."""
    has_runs = any(run for run, _ in slowest)
    rows: list[tuple[Cell, ...]] = []
    for run, told in slowest:
        head: tuple[Cell, ...] = (run,) if has_runs else ()
        rows.append((
            *head, told.request, told.who, told.e2e_s, told.ttft_s, told.tpot_s, told.num_prompt, told.num_output,
            _delays(told), told.why_routed,
        ))  # fmt: skip
    columns = (
        "request",
        "replica",
        "E2E",
        "TTFT",
        "TPOT",
        "prompt",
        "output",
        "what delayed it",
        "routed because",
    )
    return Grid(
        title="Why the slowest were slow",
        caption="Times in seconds, prompt and output in tokens. `penstock report LOG --request ID` tells the life of "
        "any request in words.",
        columns=(*(("run",) if has_runs else ()), *columns),
        rows=tuple(rows),
        narrow=tuple(([0] if has_runs else []) + [place + has_runs for place in (0, 2, 3, 4, 7)]),
    )


def _delays(told: Explanation, most: int = 3) -> str:
    """The largest parts that were not its own work."""
    delays = sorted(
        (
            (value, cause)
            for cause, value in told.parts.items()
            if cause not in WORK and value >= DUST_S
        ),
        reverse=True,
    )
    return "; ".join(f"{seconds(value)} {CAUSES[cause]}" for value, cause in delays[:most])


def run_grid(runs: Sequence[Facts], money: Mapping[str, Money]) -> Grid:
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        found = run.figures.all
        groups = [*run.figures.classes.values(), *run.figures.tenants.values()]
        worst = min(
            (each.attainment for each in groups if each.attainment is not None), default=None
        )
        known = money.get(run.name)
        rows.append((
            run.name, run.offered_per_s, found.num_offered, found.num_finished, kept(found.attainment), kept(worst),
            found.goodput_per_s, found.ttft_s.p50, found.ttft_s.p99, found.tpot_s.p50, found.tpot_s.p99,
            found.e2e_s.p99, found.output_tokens_per_s, found.num_preemptions, share(found.prefix_hit_rate),
            None if known is None else known.per_million_output(run.figures),
        ))  # fmt: skip
    columns = (
        "run", "offered/s", "offered", "finished", "kept", "worst class", "goodput/s", "TTFT p50", "TTFT p99",
        "TPOT p50", "TPOT p99", "E2E p99", "output tok/s", "preempted", "prefix hits", "$/M output",
    )  # fmt: skip
    return Grid(
        title="Runs side by side",
        caption="Latencies in seconds.",
        columns=columns,
        rows=tuple(rows),
        narrow=(0, 1, 4, 5, 6, 8, 10),
    )


def offered_grid(run: Facts) -> Grid:
    """The card of what was asked: rate, bursts, lengths."""
    offered = run.offered
    rows: list[tuple[Cell, ...]] = [
        ("requests", offered.num_requests, None, None, None, None),
        ("answers/s", offered.rate_per_s, None, None, None, None),
    ]
    rows += [
        (f"dispersion of arrivals in {size:g} s (Poisson: 1)", value, None, None, None, None)
        for size in WINDOWS_S
        if (value := offered.dispersion(size)) is not None
    ]
    rows += [
        (name, mean, *picked, most) for name, num, mean, picked, most in offered.lengths() if num
    ]
    return Grid(
        title="What was asked",
        columns=("", "number or mean", "p50", "p90", "p99", "max"),
        rows=tuple(rows),
        is_wide=False,
    )


def money_grid(money: Money, figures: Figures) -> Grid:
    return Grid(
        title="Cost and energy",
        caption="Replicas are paid for from the first arrival to the last answer, busy or not.",
        columns=("", "", "unit"),
        rows=tuple(money.rows(figures)),
        is_wide=False,
    )


def movement_grids(told: Movements) -> list[Grid]:
    """What moved between replicas and why, and what was decided about replicas; none where nothing was."""
    grids = []
    moved: list[tuple[Cell, ...]] = [
        (
            mode, outcome.replace("_", " "), found.num, found.pauses_s.percentile(50), found.pauses_s.percentile(99),
            found.num_blocks, found.num_bytes / 1e6,
        )
        for (mode, outcome), found in sorted(told.moved.items())
    ]  # fmt: skip
    if moved:
        names = (
            "mode",
            "ended as",
            "number",
            "pause p50, s",
            "pause p99, s",
            "blocks copied",
            "MB",
        )
        grids.append(
            Grid(
                title="Movements between replicas",
                caption="Pause: from the word that the source had let it go to the word that the target runs it.",
                columns=names,
                rows=tuple(moved),
                narrow=(0, 1, 2, 4),
            )
        )
    reasons: list[tuple[Cell, ...]] = [
        (f"moved: {what.replace('_', ' ')}", why, num)
        for (what, why), num in told.reasons.most_common(MOST_REASONS)
    ]
    reasons += [("forbidden by a rule", rule, num) for rule, num in told.denied.most_common()]
    reasons += [(what, why, num) for (what, why), num in told.scaled.most_common(MOST_REASONS)]
    if reasons:
        columns = ("what", "why", "number")
        title = "Why requests moved, and what was decided about replicas"
        grids.append(Grid(title=title, columns=columns, rows=tuple(reasons)))
    return grids


def error_grid(errors: Mapping[str, Mapping[str, int]]) -> Grid:
    rows = [
        (run, code, count) for run, codes in errors.items() for code, count in sorted(codes.items())
    ]
    return Grid(
        title="Errors", columns=("run", "error", "requests"), rows=tuple(rows), is_wide=False
    )


def run_dict(run: Facts, money: Money | None) -> dict[str, object]:
    """One run for JSON: its figures and everything its charts show."""
    return {
        "figures": run.figures.to_dict(),
        "offered_per_s": run.offered_per_s,
        "num_events": run.num_events,
        "num_replicas": run.num_replicas,
        "cdfs": run.cdfs,
        "series": [dataclasses.asdict(curve) for curve in run.curves],
        "series_width_s": run.width_s,
        "bands": [dataclasses.asdict(band) for band in run.bands],
        "slowest": [told.to_dict() for told in run.slowest],
        "asked": [told.to_dict() for told in run.asked],
        "movements": run.movements.to_dict(),
        "refused": {request: list(why) for request, why in run.refusals.items()},
        "money": None
        if money is None
        else {name: [value, unit] for name, value, unit in money.rows(run.figures)},
        "notes": list(run.notes),
    }
