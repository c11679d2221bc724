"""The page of a report from the facts of its runs: key figures, charts, tables and what they mean in words.

One run gets its whole inside; several are laid side by side, with goodput against load where their loads differ.
Whatever is not known (a price, energy, a promise) is left out and named among the notes.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.report import grids
from penstock.report.charts import GOAL, Latency, LoadPoint, goodput_chart, latency_chart
from penstock.report.collect import LATENCIES, SLOWEST, Facts, whole_band
from penstock.report.page import Block, Page, Words
from penstock.report.run_charts import attainment_chart, bands_chart, slowest_chart, time_chart
from penstock.report.words import Context, asked_words, in_short, run_tiles, tiles, worst_groups

MAX_COMPARED_BARS = 12


def compose(runs: Sequence[Facts], context: Context) -> Page:
    """The page; at least one run."""
    assert runs, "a report needs a run"
    blocks = _one(runs[0], context) if len(runs) == 1 else _several(runs, context)
    asked = [told for run in runs for told in run.asked]
    blocks = [*(asked_words(told) for told in asked), *_refused(runs), *blocks]
    if context.card:
        blocks.append(Words(title="The trace", lines=context.card))
    if context.sources:
        blocks.append(
            Words(title="Where step times come from", lines=context.sources, is_list=True)
        )
    first = runs[0]
    return Page(
        title=context.title
        or (f"Report of {first.name}" if len(runs) == 1 else f"Report of {len(runs)} runs"),
        subtitle=_subtitle(runs),
        banner=context.banner,
        tiles=tiles(first, context) if len(runs) == 1 else run_tiles(runs),
        blocks=tuple(blocks),
        notes=tuple(_notes(runs, context)),
        footer=context.footer,
        figures={run.name: grids.run_dict(run, context.money.get(run.name)) for run in runs},
    )


def _one(run: Facts, context: Context) -> list[Block]:
    figures = run.figures
    blocks: list[Block] = [
        Words(title="In short", lines=tuple(in_short(run)), is_list=True),
        _latencies([run]),
    ]
    groups = worst_groups(run)
    if len(groups) > 1:
        blocks.append(attainment_chart(figures.all, groups, GOAL))
    if run.curves:
        blocks.append(time_chart(run.curves, run.width_s))
    if run.bands:
        blocks.append(bands_chart([(band.name, band) for band in run.bands]))
    if run.slowest:
        blocks.append(slowest_chart([(told.request, told) for told in run.slowest]))
        blocks.append(grids.slowest_grid([("", told) for told in run.slowest]))
    blocks.append(grids.latency_grid(figures.all))
    if len(groups) > 1:
        blocks.append(grids.group_grid(figures))
    blocks.append(grids.offered_grid(run))
    blocks += grids.movement_grids(run.movements)
    money = context.money.get(run.name)
    if money is not None and money.rows(figures):
        blocks.append(grids.money_grid(money, figures))
    if figures.errors:
        blocks.append(grids.error_grid({"": figures.errors}))
    return blocks


def _several(runs: Sequence[Facts], context: Context) -> list[Block]:
    blocks: list[Block] = []
    curves = load_curves(runs)
    if any(len(points) > 1 for points in curves.values()):
        blocks.append(goodput_chart(curves))
    blocks.append(grids.run_grid(runs, context.money))
    blocks.append(_latencies(runs))
    bands = [(run.name, whole_band(run.bands)) for run in runs if run.bands]
    if bands:
        blocks.append(bands_chart(bands[:MAX_COMPARED_BARS]))
    slowest = sorted(
        ((run.name, told) for run in runs for told in run.slowest),
        key=lambda item: item[1].severity,
        reverse=True,
    )
    if slowest:
        blocks.append(grids.slowest_grid(slowest[:SLOWEST]))
    if any(run.figures.errors for run in runs):
        blocks.append(grids.error_grid({run.name: run.figures.errors for run in runs}))
    return blocks


def load_curves(runs: Sequence[Facts]) -> dict[str, list[LoadPoint]]:
    """Runs of one configuration are points of one curve, named by the first of them."""
    by_config: dict[tuple[str, ...], list[Facts]] = {}
    for run in runs:
        by_config.setdefault(tuple(header.config for header in run.headers), []).append(run)
    curves: dict[str, list[LoadPoint]] = {}
    for members in by_config.values():
        points = [
            LoadPoint(
                run.offered_per_s,
                run.offered_per_s * run.figures.all.attainment,
                run.figures.all.attainment,
            )
            for run in members
            if run.offered_per_s is not None and run.figures.all.attainment is not None
        ]
        name = (
            members[0].name
            if len(members) == 1
            else f"{members[0].name} and {len(members) - 1} more"
        )
        if points:
            curves[name] = points
    return curves


def _latencies(runs: Sequence[Facts]) -> Block:
    slos = {run.slo for run in runs}
    slo = runs[0].slo if len(slos) == 1 else None
    bounds = {
        "TTFT": slo.ttft_s if slo else None,
        "TPOT": slo.tpot_s if slo else None,
        "E2E": slo.deadline_s if slo else None,
    }
    return latency_chart([
        Latency(name=name, curves={run.name: run.cdfs[name] for run in runs}, bound_s=bounds[name])
        for name, _ in LATENCIES
    ])  # fmt: skip


def _refused(runs: Sequence[Facts]) -> list[Block]:
    return [
        Words(title=f"{request} was refused", lines=(f"{code}: {why}",), about=request)
        for run in runs
        for request, (code, why) in run.refusals.items()
        if request not in {told.request for told in run.asked}
    ]


def _subtitle(runs: Sequence[Facts]) -> str:
    if len(runs) > 1:
        return f"{sum(run.figures.all.num_offered for run in runs):,} answers asked for in {len(runs)} runs"
    run = runs[0]
    replicas = (
        f"{run.num_replicas} replica{'s' * (run.num_replicas != 1)}, " if run.num_replicas else ""
    )
    models = ", ".join(sorted(run.offered.models))
    return (
        f"{models + ': ' if models else ''}{replicas}{run.figures.all.num_offered:,} answers in "
        f"{run.figures.duration_s:,.1f} s, {run.figures.num_steps:,} steps"
    )


def _notes(runs: Sequence[Facts], context: Context) -> list[str]:
    notes = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        notes += [prefix + note for note in (*run.figures.notes, *run.notes)]
        if not run.figures.all.num_offered:
            notes.append(f"{prefix}Nothing was asked for in this log.")
        elif not run.figures.num_steps:
            notes.append(
                f"{prefix}No replica's steps are in this log, so nothing is known of the answers: "
                "replicas of a deployment write logs of their own; report their folder."
            )
    monies = [context.money.get(run.name) for run in runs]
    if any(money is None or money.price_h is None for money in monies):
        notes.append("Cost is left out: the log names no card with a known price.")
    if any(money is None or money.energy_j is None for money in monies):
        notes.append("Energy is left out: the log does not hold it.")
    notes.append(
        "Attainment counts refused, failed, cancelled and unfinished answers as misses. Percentiles are exact but for "
        "gaps between tokens (within 0.55%). The parts of an answer's life sum to its end-to-end time."
    )
    return notes
