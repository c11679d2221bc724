"""Figures for people: tables of the terminal. For scripts there is `Figures.to_dict()`."""

from __future__ import annotations

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from penstock.report.summary import NO_PROMISE, Figures, GroupFigures, Spread

LATENCIES = (
    ("TTFT", "ttft_s"),
    ("TPOT", "tpot_s"),
    ("ITL", "itl_s"),
    ("E2E", "e2e_s"),
    ("queue", "queue_s"),
)


def seconds(value: float | None) -> str:
    """A duration in the unit that suits it; "-" when it was not measured."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if value < 0.001:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.2f} s"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _latency_table(found: GroupFigures) -> Table:
    table = Table(title=None, box=None, pad_edge=False)
    table.add_column("")
    for name in ("mean", "p50", "p90", "p95", "p99", "max", "of"):
        table.add_column(name, justify="right")
    for label, field in LATENCIES:
        spread: Spread = getattr(found, field)
        if not spread.num:
            continue
        picked = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max)
        table.add_row(label, *map(seconds, picked), f"{spread.num:,}")
    return table


def _count_line(found: GroupFigures) -> Text:
    told = [f"{found.num_offered:,} offered", f"{found.num_finished:,} finished"]
    counts = (
        (found.num_refused, "refused"),
        (found.num_cancelled, "cancelled"),
        (found.num_failed, "failed"),
    )
    told += [f"{count:,} {name}" for count, name in counts if count]
    known = found.num_finished + found.num_refused + found.num_cancelled + found.num_failed
    if found.num_offered > known:
        told.append(f"{found.num_offered - known:,} unfinished")
    return Text(", ".join(told))


def _rate_lines(found: GroupFigures, has_promise: bool) -> list[Text]:
    kept = "kept their promise" if has_promise else "ended; no promise was stated"
    lines = [
        Text(
            f"throughput {rate(found.prompt_tokens_per_s)} prompt and "
            f"{rate(found.output_tokens_per_s)} output tokens/s "
            f"({found.prompt_tokens:,} and {found.output_tokens:,})"
        ),
        Text(
            f"goodput {rate(found.goodput_per_s)} answers/s, attainment {share(found.attainment)} "
            f"({found.num_met:,} of {found.num_offered:,} offered {kept})"
        ),
    ]
    if found.num_preemptions or found.cached_tokens:
        lines.append(
            Text(
                f"{found.num_preemptions:,} preemptions ({found.recomputed_tokens:,} tokens computed again), "
                f"prefix cache hit {share(found.prefix_hit_rate)} of prompt tokens"
            )
        )
    return lines


def _group_table(title: str, groups: dict[str, GroupFigures]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(title.removeprefix("by "))
    for name in ("offered", "finished", "attained", "goodput/s"):
        table.add_column(name, justify="right")
    for name in ("TTFT p50", "p99", "TPOT p50", "p99", "E2E p50", "p99"):
        table.add_column(name, justify="right")
    for name, found in groups.items():
        table.add_row(
            Text(name),  # a tenant's name is no markup
            f"{found.num_offered:,}",
            f"{found.num_finished:,}",
            share(found.attainment),
            rate(found.goodput_per_s),
            *(
                seconds(value)
                for spread in (found.ttft_s, found.tpot_s, found.e2e_s)
                for value in (spread.p50, spread.p99)
            ),
        )
    return table


def figures_view(found: Figures, title: str = "") -> Group:
    """All there is to see of a run, as one thing that rich prints."""
    steps = f", {found.num_steps:,} steps" if found.num_steps else ""
    parts: list[Text | Table] = [Text(f"{title}  {found.duration_s:,.1f} s{steps}".strip())]
    has_promise = not found.classes or any(NO_PROMISE not in name for name in found.classes)
    parts += [_count_line(found.all), *_rate_lines(found.all, has_promise)]
    parts.append(_latency_table(found.all))
    if len(found.tenants) > 1:
        parts.append(_group_table("by tenant", found.tenants))
    if len(found.classes) > 1:
        parts.append(_group_table("by class", found.classes))
    if found.errors:
        told = ", ".join(f"{count:,} {name}" for name, count in sorted(found.errors.items()))
        parts.append(Text(f"errors: {told}", style="red"))
    parts += [Text(f"note: {note}", style="yellow") for note in found.notes]
    return Group(*parts)


def print_figures(found: Figures, title: str = "", *, console: Console | None = None) -> None:
    """Print to the console, stdout unless told."""
    (console or Console()).print(figures_view(found, title))


def render(found: Figures, title: str = "", width: int = 100) -> str:
    """The same as plain text, for files and tests."""
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(figures_view(found, title))
    return capture.get()
