"""The head of a report: key figures as tiles, a run in a few sentences, and the life of a request asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from penstock.report.causes import CAUSES, WORK, Explanation
from penstock.report.charts import GOAL
from penstock.report.collect import Facts
from penstock.report.money import Money
from penstock.report.page import Tile, Words, kept
from penstock.report.summary import NO_PROMISE, GroupFigures
from penstock.report.table import rate, seconds, share


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the log does not hold itself. `sources`: where step times come from; `card`: lines about the trace."""

    title: str = ""
    banner: str = ""
    sources: tuple[str, ...] = ()
    card: tuple[str, ...] = ()
    money: Mapping[str, Money] = field(default_factory=dict)  # by name of the run
    footer: str = ""


def worst_groups(run: Facts) -> dict[str, GroupFigures]:
    """Classes and tenants, where there is more than one of them."""
    figures = run.figures
    classes = figures.classes if len(figures.classes) > 1 else {}
    tenants = figures.tenants if len(figures.tenants) > 1 else {}
    return {**classes, **{f"tenant {name}": found for name, found in tenants.items()}}


def has_promise(run: Facts) -> bool:
    return any(NO_PROMISE not in name for name in run.figures.classes)


def tiles(run: Facts, context: Context) -> tuple[Tile, ...]:
    found = run.figures.all
    told = [_attainment_tile(run)]
    groups = worst_groups(run)
    if groups and has_promise(run):
        name, worst = min(groups.items(), key=lambda item: item[1].attainment or 0.0)
        told.append(
            Tile(
                label="worst class or tenant",
                value=kept(worst.attainment),
                note=name,
                mood=_mood(worst.attainment),
            )
        )
    if has_promise(run):
        told.append(
            Tile(
                label="goodput",
                value=f"{rate(found.goodput_per_s)}/s",
                note=f"of {rate(run.offered_per_s)}/s offered",
            )
        )
    for label, spread in (("TTFT", found.ttft_s), ("TPOT", found.tpot_s), ("E2E", found.e2e_s)):
        if spread.num:
            told.append(
                Tile(
                    label=f"{label}, median",
                    value=seconds(spread.p50),
                    note=f"p99 {seconds(spread.p99)}",
                )
            )
    told.append(
        Tile(
            label="output tokens",
            value=f"{rate(found.output_tokens_per_s)}/s",
            note=f"{found.output_tokens:,} in all",
        )
    )
    money = context.money.get(run.name)
    price = None if money is None else money.per_million_output(run.figures)
    energy = None if money is None else money.energy_per_million_output(run.figures)
    values = [f"${price:,.2f}"] if price is not None else []
    values += [f"{energy:.3g} kWh"] if energy is not None else []
    if values:
        told.append(
            Tile(label="a million output tokens", value=values[0], note=" ".join(values[1:]))
        )
    return tuple(told)


def _attainment_tile(run: Facts) -> Tile:
    found = run.figures.all
    if not has_promise(run):
        return Tile(
            label="finished",
            value=f"{found.num_finished:,}",
            note=f"of {found.num_offered:,}; no promise was stated",
        )
    return Tile(
        label="kept their promise",
        value=kept(found.attainment),
        note=f"{found.num_met:,} of {found.num_offered:,} answers",
        mood=_mood(found.attainment),
    )


def _mood(attainment: float | None) -> Literal["good", "bad", ""]:
    return "" if attainment is None else "good" if attainment >= GOAL else "bad"


def run_tiles(runs: Sequence[Facts]) -> tuple[Tile, ...]:
    return tuple(
        Tile(
            label=run.name,
            value=kept(run.figures.all.attainment),
            note=f"{rate(run.figures.all.goodput_per_s)}/s of {rate(run.offered_per_s)}/s offered",
            mood=_mood(run.figures.all.attainment),
        )
        for run in runs[:8]
    )


def in_short(run: Facts) -> list[str]:
    """What a reader in a hurry should know: a line each."""
    found = run.figures.all
    lines = []
    if has_promise(run):
        lines.append(
            f"{found.num_met:,} of {found.num_offered:,} answers ({kept(found.attainment)}) kept all their promises."
        )
    else:
        lines.append(
            f"{found.num_finished:,} of {found.num_offered:,} answers finished; no promise was stated."
        )
    totals: dict[str, float] = {}
    for band in run.bands:
        for cause, value in band.parts.items():
            totals[cause] = totals.get(cause, 0.0) + value * band.num
    whole = sum(totals.values())
    delays = sorted(
        ((value, cause) for cause, value in totals.items() if cause not in WORK), reverse=True
    )
    if whole and delays:
        told = ", ".join(
            f"{CAUSES[cause]} {value / whole:.1%}"
            for value, cause in delays[:3]
            if value >= whole / 1000
        )
        own = sum(totals.get(cause, 0.0) for cause in WORK)
        lines.append(
            f"{own / whole:.1%} of all seconds were the answers' own work"
            + (f"; then {told}." if told else ".")
        )
    peaks = [max(curve.memory) for curve in run.curves if curve.memory]
    if peaks:
        lines.append(
            f"KV memory was at most {max(peaks):.0%} full; {found.num_preemptions:,} preemptions."
        )
    if found.cached_tokens:
        lines.append(
            f"{share(found.prefix_hit_rate)} of the prompt tokens were found in the prefix cache."
        )
    moved = [each for (_, outcome), each in run.movements.moved.items() if outcome == "committed"]
    if moved:
        pauses = [each.pauses_s.most for each in moved if each.pauses_s.num]
        still = f", standing still for {seconds(max(pauses))} at most" if pauses else ""
        lines.append(f"{sum(each.num for each in moved):,} movements between replicas{still}.")
    lost = found.num_refused + found.num_failed + found.num_cancelled
    if lost:
        lines.append(
            f"{found.num_refused:,} refused, {found.num_failed:,} failed, {found.num_cancelled:,} cancelled."
        )
    return lines


def asked_words(told: Explanation) -> Words:
    """Why one request was slow, or was not."""
    head = (
        f"Answer {told.answer} for tenant {told.tenant} on {told.who}: {told.reason}; TTFT {seconds(told.ttft_s)}, "
        f"TPOT {seconds(told.tpot_s)}; {told.num_prompt:,} prompt tokens ({told.num_cached:,} cached), "
        f"{told.num_output:,} output tokens."
    )
    lines = [head, *told.sentences()]
    if told.why_routed:
        lines.append(f"Routed to {told.who}: {told.why_routed}.")
    if told.why_started:
        lines.append(f"Started by: {told.why_started}.")
    lines += [f"Preempted {each}." for each in told.evictions]
    lines += [f"Moved {each}." for each in told.moves]
    return Words(
        title=f"Why did {told.request} take {seconds(told.e2e_s)}?",
        lines=tuple(lines),
        is_list=True,
        about=told.request,
    )
