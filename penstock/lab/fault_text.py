"""What came of runs with faults, in words: a row for each kind of fault, and how to see again what broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from penstock.lab.faults import Ran, Row, table_of
from penstock.sim.faults import KINDS

COLUMNS = (
    ("runs", "runs"),
    ("faults", "tries"),
    ("requests", "requests"),
    ("answered", "answered"),
    ("cancelled", "cancelled"),
    ("with error", "errors"),
    ("lost", "lost"),
    ("doubled", "doubled"),
    ("else", "broken"),
)
Counted = Literal["ends", "moves"]
MOST = 20  # broken runs that are told


def text_of(found: Sequence[Ran], kinds: Sequence[str] = KINDS) -> str:
    """All of it, ready to print."""
    rows = table_of(found)
    lines = [f"{'fault':12}" + "".join(f"{name:>11}" for name, _ in COLUMNS)]
    lines += [_line(row.fault, row) for row in rows]
    if len(rows) > 1:
        lines.append(_line("all", _sum(rows)))
    lines.append("")
    counted: tuple[tuple[str, Counted], ...] = (
        ("requests ended as", "ends"),
        ("movements between replicas", "moves"),
    )
    for what, key in counted:
        told = ", ".join(f"{count:,} {name}" for name, count in sums(found, key).items())
        lines.append(f"{what}: {told or 'none'}")
    broken = [ran for ran in found if ran.broken]
    for ran in broken[:MOST]:
        lines.append(f"seed {ran.seed} ({', '.join(ran.kinds)}): {ran.broken}: {ran.told}")
        lines.append(f"  again with: {command_of(ran, kinds)}")
    if len(broken) > MOST:
        lines.append(f"and {len(broken) - MOST} more")
    return "\n".join(lines)


def sums(found: Sequence[Ran], key: Counted) -> dict[str, int]:
    """How often each of them, most often first."""
    total = Counter[str]()
    for ran in found:
        total.update(getattr(ran, key))
    return dict(total.most_common())


def command_of(ran: Ran, kinds: Sequence[str] = KINDS) -> str:
    """The command that runs this seed again and writes down what happened."""
    chosen = "" if tuple(kinds) == KINDS else "".join(f" --fault {kind}" for kind in kinds)
    return (
        f"penstock bench faults --first {ran.seed} --seeds 1{chosen} --log faults-{ran.seed}.jsonl"
    )


def _line(name: str, row: Row) -> str:
    told = row.to_dict()
    return f"{name:12}" + "".join(f"{told[key]:>11}" for _, key in COLUMNS)


def _sum(rows: Sequence[Row]) -> Row:
    total = Row("all")
    for _, key in COLUMNS:
        setattr(total, key, sum(getattr(row, key) for row in rows))
    return total
