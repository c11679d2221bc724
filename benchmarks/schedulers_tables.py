"""The tables of benchmarks/schedulers.py: from places on a grid of rates to Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BEGIN, END = "<!-- tables of benchmarks/schedulers.py -->", "<!-- end of the tables -->"
Promises = Mapping[str, Mapping[str, tuple[float, float]]]


@dataclass(frozen=True)
class Key:
    workload: str
    promise: str
    scheduler: str
    is_short: bool = False


Found = dict[Key, dict[int, int | None]]  # by seed: the highest place of the grid that holds


@dataclass(frozen=True)
class Column:
    """One promise of one workload: a mean place of each scheduler; None where the lowest rate failed."""

    workload: str
    promise: str
    places: Mapping[str, float | None]

    @property
    def ranked(self) -> list[str]:
        known = [name for name, place in self.places.items() if place is not None]
        return sorted(known, key=lambda name: -(self.places[name] or 0.0))

    def equals(self) -> list[str]:
        """The best, and all within a step of it."""
        best = self.places[self.ranked[0]]
        assert best is not None
        return [name for name in self.ranked if best - (self.places[name] or 0.0) <= 1.0]


def columns(found: Found, promises: Promises, *, is_short: bool) -> list[Column]:
    names = [(workload, name) for workload in promises for name in (*promises[workload], "mixed")]
    made = []
    for workload, promise in names:
        places: dict[str, float | None] = {}
        for key, by_seed in found.items():
            if (key.workload, key.promise, key.is_short) == (workload, promise, is_short):
                known = [place for place in by_seed.values() if place is not None]
                places[key.scheduler] = sum(known) / len(known) if known else None
        if any(place is not None for place in places.values()):
            made.append(Column(workload, promise, places))
    return made


def tables(found: Found, promises: Promises, step: float) -> str:
    every = columns(found, promises, is_short=False)
    short = columns(found, promises, is_short=True)
    parts = [winners(every, promises, step), shares(every, step)]
    if short:
        parts += ["With an eighth of the memory (3,500 blocks of 16 tokens):", shares(short, step)]
    return "\n\n".join(parts)


def winners(every: Sequence[Column], promises: Promises, step: float) -> str:
    lines = [
        "| workload | promise (TTFT, TPOT) | most load, a second | within a step of it | vllm-v1 (2048) | least |",
        "|---|---|---|---|---|---|",
    ]
    for column in every:
        best, *equal = column.equals()
        rate = step ** (column.places[best] or 0.0)
        default, last = column.places.get("vllm-v1 (2048)"), column.ranked[-1]
        lines.append(
            f"| {column.workload.replace('_', ' ')} | {told(column, promises)} | {best} {rate:.2g} | "
            f"{listed(equal)} | {'0' if default is None else f'{step**default:.2g}'} | "
            f"{last} {step ** (column.places[last] or 0.0):.2g} |"
        )
    return "\n".join(lines)


def listed(names: Sequence[str], most: int = 4) -> str:
    if not names:
        return "nobody"
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return ", ".join(names)


def told(column: Column, promises: Promises) -> str:
    if column.promise == "mixed":
        return "mixed"
    ttft_s, tpot_s = promises[column.workload][column.promise]
    return f"{column.promise} ({ttft_s:g} s, {1000 * tpot_s:g} ms)"


def shares(every: Sequence[Column], step: float) -> str:
    """Percent of the best of each column, the best rows first."""
    names = {name for column in every for name in column.places}
    cells = {name: [cell(column, name, step) for column in every] for name in names}
    totals = {name: [each for each in row if each is not None] for name, row in cells.items()}
    ranked = sorted(names, key=lambda name: (-sum(totals[name]) / max(1, len(totals[name])), name))
    heads = [f"{column.workload.replace('_', ' ')} {column.promise}" for column in every]
    lines = [
        "| % of the best | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    for name in ranked:
        row = ["" if each is None else f"{each:.0f}" for each in cells[name]]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def cell(column: Column, name: str, step: float) -> float | None:
    if name not in column.places:
        return None
    place, best = column.places[name], column.places[column.ranked[0]]
    assert best is not None
    return 0.0 if place is None else 100 * step ** (place - best)


def page_with(text: str, shown: str) -> str:
    """The page with the tables between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{shown}\n{END}{tail}"
