"""Scheduler time kept with the package: what deciding one step takes, by policies, running and waiting jobs.

    [fleet.executor]
    scheduler = "stored"        # the table that comes along: schedulers.json, dated, its machine named
    scheduler = "mine.json"     # a table of `penstock bench calibrate --scheduler-only`, or a profile of a machine
                                # left out: the profile's own scheduler time when there is a profile, else nothing

Simulations of hardware that is not here charge it for every step, so that a policy that thinks long pays for it. The
seconds are those of the machine that was measured, not of the modelled one; its name and the digest of the entry are
told with every result.

An entry speaks for four policies (order/admit/batch/evict). Where the very four are not stored, the nearest entry is
charged: the same batch policy, which takes most of the time, and then most of the others. Its name says so.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import build
from penstock.core.errors import BadConfig
from penstock.core.schema import check_schema
from penstock.core.types import SCHEMA
from penstock.cost.profile import SchedulerCost, load_profile, read_json

STORED = Path(__file__).with_name("schedulers.json")
STORED_NAME = "stored"
SLOTS = ("order", "admit", "batch", "evict")
HINT = "`penstock bench calibrate --scheduler-only --out FILE` measures; give FILE as `scheduler`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedulers:
    """Entries measured on one machine on one day. `error`: the mean one of the linear fits, over all their points."""

    schema: int = SCHEMA
    machine: dict[str, str]
    made_on: str
    version: str
    error: float
    entries: tuple[SchedulerCost, ...]

    def nearest(self, policies: str) -> SchedulerCost:
        """Raises BadConfig where no entry has the batch policy."""
        wanted = policies.split("/")
        batch = SLOTS.index("batch")
        best, most = None, -1
        for entry in self.entries:
            names = entry.policies.split("/")
            same = sum(one == other for one, other in zip(names, wanted, strict=True))
            if names[batch] == wanted[batch] and same > most:
                best, most = entry, same
        if best is None:
            known = ", ".join(sorted({entry.policies.split("/")[batch] for entry in self.entries}))
            raise BadConfig(
                f"no scheduler time is stored for the batch policy {wanted[batch]!r} (stored: {known})",
                hint=HINT,
            )
        return best

    def save(self, path: Path) -> None:
        """A line for each entry, so that two tables can be compared by eye."""
        table = dataclasses.asdict(self)
        entries = table.pop("entries")
        head = json.dumps(table, indent=1).removesuffix("\n}")
        rows = ",\n  ".join(json.dumps(entry) for entry in entries)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head},\n "entries": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Charged:
    """The scheduler time a modelled replica is charged, and where it comes from."""

    cost: SchedulerCost
    source: str

    @property
    def digest(self) -> str:
        told = json.dumps(dataclasses.asdict(self.cost), sort_keys=True)
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    def __str__(self) -> str:
        return f"{self.source} [{self.digest}]"


def policies_name(tables: Mapping[str, Mapping[str, object]]) -> str:
    """How the policies of a replica are called here; one that wraps another counts as that one."""
    return "/".join(_name(tables[slot]) for slot in SLOTS)


def _name(table: Mapping[str, object]) -> str:
    inner = table.get("inner")
    return _name(inner) if isinstance(inner, Mapping) else str(table["name"])


def scheduler_of(scheduler: str, policies: str) -> Charged:
    """What `scheduler` of an executor's table means for these policies. Raises BadConfig and SchemaMismatch."""
    path = STORED if scheduler == STORED_NAME else Path(scheduler)
    table = read_json(path, "scheduler times", HINT)
    if "entries" not in table:
        cost = load_profile(path).scheduler
        if cost is None:
            raise BadConfig(f"the profile {path} holds no scheduler time", hint=HINT)
        return Charged(cost=cost, source=f"{path} ({cost.policies})")
    found = load_schedulers(path)
    cost = found.nearest(policies)
    near = "" if cost.policies == policies else f", nearest stored to {policies}"
    machine = found.machine.get("processor", "a machine not named")
    return Charged(
        cost=cost,
        source=f"{scheduler} ({cost.policies}{near}; measured {found.made_on} on {machine})",
    )


@functools.cache
def load_schedulers(path: Path = STORED) -> Schedulers:
    table = read_json(path, "scheduler times", HINT)
    schema = table.get("schema")
    check_schema(f"the scheduler times {path}", schema if isinstance(schema, int) else 0)
    return build(Schedulers, table, where=str(path))
