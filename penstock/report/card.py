"""A trace's card for people: a page of the terminal with small pictures, a line for the end of a run, or a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from penstock.report.files import new_figure, save_figure
from penstock.traffic.card import Card, Lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """One character a value, from nothing to the greatest of them. A value above zero is never blank."""
    most = max(values, default=0.0)
    if most <= 0:
        return " " * len(values)
    tallest = len(BLOCKS) - 1
    return "".join(
        " " if value <= 0 else BLOCKS[min(tallest, int(value / most * len(BLOCKS)))]
        for value in values
    )


def _number(value: float | None, digits: str = ",.2f") -> str:
    return "not known" if value is None else format(value, digits)


def _share(value: float | None) -> str:
    return "not told by the trace" if value is None else f"{value:.1%}"


def _tokens(edge: int) -> str:
    return f"{edge >> 10}k" if edge >= 1024 else str(edge)


def short(card: Card) -> str:
    """One line: what stands under the figures of a run."""
    told = [f"{card.rows_kept:,} of {card.rows_read:,} rows"]
    told += [f"{_number(card.rate_per_s)} req/s over {card.span_s:,.0f} s"]
    iod = f"{_number(card.dispersion_1s)} and {_number(card.dispersion_60s)}"
    told.append(f"dispersion {iod} at 1 and 60 s")
    for name, found in (("prompt", card.prompt), ("output", card.output)):
        told.append(f"{name} p50 {found.p50:,.0f} p99 {found.p99:,.0f}")
    if card.hit_ceiling_tokens is not None:
        told.append(f"prefix-hit ceiling {card.hit_ceiling_tokens:.1%} of tokens")
    if card.num_with_images:
        told.append(f"{card.num_with_images:,} with images")
    if card.num_tenants > 1:
        told.append(f"{card.num_tenants:,} tenants")
    return ", ".join(told)


def _facts(card: Card) -> list[tuple[str, str]]:
    rows = [
        ("requests", f"{card.rows_kept:,} of {card.rows_read:,} rows"),
        *((f"  dropped {count:,}", why) for why, count in card.drops.items()),
    ]
    if card.num_late:
        rows.append((f"  moved {card.num_late:,}", "out of order, to their predecessor's instant"))
    rows += [
        ("span", f"{card.span_s:,.1f} s"),
        ("rate", f"{_number(card.rate_per_s)} requests/s"),
        (
            "dispersion",
            f"{_number(card.dispersion_1s)} at 1 s, {_number(card.dispersion_60s)} at 60 s "
            "(Poisson 1)",
        ),
        ("CV of gaps", f"{_number(card.gap_cv)} (Poisson 1)"),
        ("prefix-hit ceiling", _ceiling(card)),
    ]
    if card.num_sessions:
        each = card.num_in_sessions / card.num_sessions
        rows.append(("sessions", f"{card.num_sessions:,} (programs too), {each:.2f} requests each"))
    if card.num_with_images:
        rows.append(("with images", f"{card.num_with_images:,} requests"))
    for kind, count in card.num_workflows.items():
        rows.append((f"  {kind}s", f"{count:,} that wait for answers or give up"))
    rows.append(("tenants", f"{card.num_tenants:,}; {card.top_tenant} {card.top_tenant_share:.1%}"))
    if card.sha256 is not None:
        rows.append(("sha256", card.sha256))
    return rows


def _ceiling(card: Card) -> str:
    if card.hit_ceiling_tokens is None:
        return _share(None)
    return f"{card.hit_ceiling_tokens:.1%} of tokens, {_share(card.hit_ceiling_blocks)} of blocks"


def _length_table(card: Card) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens")
    for name in ("total", "mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    table.add_column("by powers of two")
    told = [("prompt", card.prompt), ("output", card.output)]
    if card.images is not None:
        told.append(("an image", card.images))
    for name, found in told:
        values = (found.total, found.mean, found.p50, found.p90, found.p99, found.max)
        table.add_row(name, *(f"{value:,.0f}" for value in values), _histogram(found))
    return table


def _histogram(found: Lengths) -> str:
    if not found.counts:
        return ""
    first = next(place for place, count in enumerate(found.counts) if count)
    line = sparkline(found.counts[first:])
    return f"{_tokens(1 << first)} {line} {_tokens(1 << len(found.counts))}"


def card_view(card: Card) -> Group:
    """All there is to see of a trace, as one thing that rich prints."""
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    for name, told in _facts(card):
        facts.add_row(Text(name), Text(told))  # names of tenants are no markup
    title = Text(f"{card.path} ({card.format})")
    parts: list[Text | Table] = [title, facts, _length_table(card)]
    if card.rates:
        parts.append(Text(f"requests/s over time, most {max(card.rates):,.2f}"))
        parts.append(Text(sparkline(card.rates)))
    if not card.is_whole:
        parts.append(Text("note: the trace was not read to its end", style="yellow"))
    parts += [Text(f"note: {note}", style="yellow") for note in card.notes]
    return Group(*parts)


def print_card(card: Card, console: Console | None = None) -> None:
    (console or Console()).print(card_view(card), highlight=False)


def _plot_rate(axes: Axes, card: Card) -> None:
    width = card.span_s / max(1, len(card.rates))
    axes.stairs(card.rates, [place * width for place in range(len(card.rates) + 1)])
    if card.rate_per_s is not None:
        axes.axhline(card.rate_per_s, linestyle="--", color="grey", label="mean")
        axes.legend()
    axes.set_xlabel("time, s")
    axes.set_ylabel("requests/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _plot_lengths(axes: Axes, name: str, found: Lengths) -> None:
    first = next((place for place, count in enumerate(found.counts) if count), 0)
    edges = [1 << place for place in range(first, len(found.counts))]
    axes.bar(edges, found.counts[first:], width=edges, align="edge", edgecolor="white")
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"{name} tokens")
    axes.set_ylabel("requests")
    axes.grid(alpha=0.3, axis="y")


def plot_card(card: Card, path: Path) -> None:
    """Write a PNG (or what the suffix says). Raises MissingExtra without matplotlib."""
    figure = new_figure(10, 7)
    grid = figure.subplot_mosaic([["rate", "rate"], ["prompt", "output"]])
    _plot_rate(grid["rate"], card)
    _plot_lengths(grid["prompt"], "prompt", card.prompt)
    _plot_lengths(grid["output"], "output", card.output)
    figure.suptitle(f"{card.path}\n{short(card)}", fontsize=9, wrap=True)
    save_figure(figure, path)
