"""A sweep for people: what it says in words, and its table for the terminal, from the rows of `lab.sweep`.

Rows that differ in their seed alone are one line: the mean, and behind ± half the range over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from penstock.report.capacity import carried, verdict
from penstock.report.summary import NO_PROMISE
from penstock.report.table import rate, seconds, share

Row = Mapping[str, object]
Show = Callable[[float | None], str]
COLUMNS: tuple[tuple[str, str, Show], ...] = (
    ("goodput/s", "goodput_per_s", rate),
    ("attained", "attainment", share),
    ("worst class", "worst_class", share),
    ("TTFT p50", "ttft_p50_s", seconds),
    ("TTFT p99", "ttft_p99_s", seconds),
    ("TPOT p50", "tpot_p50_s", seconds),
    ("TPOT p99", "tpot_p99_s", seconds),
    ("$/M tokens", "usd_per_million_tokens", rate),
)
SAME = ("rate", "poisson")  # loads that are what is offered


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure over seeds. None where it was not measured."""

    mean: float | None
    least: float | None = None
    most: float | None = None

    @property
    def is_spread(self) -> bool:
        return self.least is not None and self.least != self.most


@dataclass(frozen=True, slots=True)
class Line:
    """One point of the grid over its seeds."""

    variant: str
    load: float | None
    load_kind: str | None
    offered_per_s: float
    rows: tuple[Row, ...]

    def get(self, name: str) -> Measured:
        values = [
            float(row[name])  # type: ignore[arg-type]
            for row in self.rows
            if isinstance(row.get(name), int | float)
        ]
        if not values:
            return Measured(None)
        return Measured(sum(values) / len(values), min(values), max(values))

    @property
    def num_failed(self) -> int:
        return sum(row["error"] is not None for row in self.rows)


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """One line a variant and load, in the order of the rows."""
    found: dict[tuple[str, object], list[Row]] = {}
    for row in rows:
        found.setdefault((str(row["variant"]), row["load"]), []).append(row)
    return [
        Line(
            variant=variant,
            load=load if isinstance(load, float) else None,
            load_kind=None if load is None else str(same[0]["load_kind"]),
            offered_per_s=sum(float(str(row["offered_per_s"])) for row in same) / len(same),
            rows=tuple(same),
        )
        for (variant, load), same in found.items()
    ]


def is_drawn(rows: Sequence[Row]) -> bool:
    """Whether anything differs between seeds."""
    figures = ("duration_s", "ttft_mean_s", "e2e_mean_s", "e2e_p99_s", "num_steps")
    return any(each.get(name).is_spread for each in lines_of(rows) for name in figures)


def words(rows: Sequence[Row]) -> list[str]:
    """The answers in plain words: what each variant carries, who wins, and what to know before believing it."""
    told = []
    if len({row["load"] for row in rows}) > 1:
        found = carried(rows)
        told = [f"{each.variant} carries {each}" for each in found]
        told.append(verdict(found))
        if has_classes(rows):
            told += [
                f"{each.variant} carries {each}, counting the class that attains least"
                for each in carried(rows, "worst_class")
            ]
    else:
        told.append(_best(lines_of(rows)))
    return [text for text in (*told, *notes(rows)) if text]


def _best(lines: Sequence[Line]) -> str:
    """Who has the most goodput, where there is only one load."""
    known = [(each.get("goodput_per_s"), each) for each in lines]
    ordered = sorted((one for one in known if one[0].mean), key=lambda one: -(one[0].mean or 0.0))
    if len(ordered) < 2:
        return ""
    (first, best), (second, other) = ordered[:2]
    assert first.mean and second.mean and first.least is not None and second.most is not None
    if first.mean == second.mean:
        return f"{best.variant} and {other.variant} have equal goodput."
    told = (
        f"{best.variant} has the most goodput, {first.mean / second.mean:.3g}x of {other.variant}"
    )
    if len(best.rows) > 1 and first.least <= second.most:
        told += "; the seeds overlap, so this is no clear winner"
    return f"{told}."


def has_classes(rows: Sequence[Row]) -> bool:
    return any(int(str(row.get("num_classes", 0))) > 1 for row in rows)


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know."""
    told = []
    if all(NO_PROMISE in str(row.get("worst_class_name", NO_PROMISE)) for row in rows):
        told.append("No promise was stated (--slo-ttft, --slo-tpot): every answer counts as kept.")
    seeds = {row["seed"] for row in rows}
    if len(seeds) > 1 and is_drawn(rows):
        told.append(f"Means over {len(seeds)} seeds; ± is half the range, of attainment in points.")
    elif len(seeds) > 1:
        told.append(
            f"All {len(seeds)} seeds gave the same figures: nothing here is drawn by chance "
            "(a replayed trace, policies that use none), so there is no spread to see."
        )
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        first = str(failed[0]["error"]).splitlines()[0]
        told.append(f"{len(failed)} of {len(rows)} points failed; the first says: {first}")
    return told


def columns_of(rows: Sequence[Row]) -> list[tuple[str, str, Show]]:
    """The figures that are worth a column here."""
    left_out = set() if has_classes(rows) else {"worst_class"}
    if all(row.get("usd_per_million_tokens") is None for row in rows):
        left_out.add("usd_per_million_tokens")
    return [column for column in COLUMNS if column[1] not in left_out]


def table(rows: Sequence[Row]) -> Table:
    """For the terminal: a block a variant, a line a load."""
    lines, columns = lines_of(rows), columns_of(rows)
    kind = lines[0].load_kind
    found = Table(box=None, pad_edge=False)
    found.add_column(kind or "", justify="left", no_wrap=True)
    for name in (*([] if kind in SAME else ["offered/s"]), *(name for name, _, _ in columns)):
        found.add_column(name, justify="right")
    before = None
    for each in lines:
        if kind is not None and each.variant != before:
            found.add_row(Text(each.variant), style="bold")
        before = each.variant
        cells: list[str | Text] = [Text(each.variant if each.load is None else f"  {each.load:g}")]
        cells += [] if kind in SAME else [f"{each.offered_per_s:.3g}"]
        cells += [_told(each.get(figure), show) for _, figure, show in columns]
        found.add_row(*cells, style="red" if each.num_failed else None)
    return found


def _told(found: Measured, show: Show) -> str:
    """The mean and, over seeds, half of the range: as a share of the mean, or in points where it is a share itself."""
    told = show(found.mean)
    if not found.is_spread or not found.mean or found.least is None or found.most is None:
        return told
    half = (found.most - found.least) / 2
    return f"{told} ±{half * 100:.1f}" if show is share else f"{told} ±{half / found.mean:.0%}"
