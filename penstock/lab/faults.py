"""Runs of the whole fleet under faults, one a seed: deterministic simulation testing.

Fleet, router, links, hosts and replicas are the code that serves. A seed decides the fleet, its traffic and all that
goes wrong (lab.fault_case, sim.faults); what must hold is checked after every callback (lab.fault_world). A run that
breaks is the same run every time, so its seed is the bug report.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from penstock.lab.fault_callers import Broken
from penstock.lab.fault_case import Case, draw_case
from penstock.lab.fault_world import World
from penstock.sim.faults import KINDS
from penstock.sim.watched import WatchedLoop, run_watched

NO_ERRORS = frozenset({"answered", "left", "gone", "CallersOwn"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What came of a seed. `broken`: what must never happen and did (lost, doubled, wrong, leaked, owners, crashed)."""

    seed: int
    about: str
    kinds: tuple[str, ...]
    num_faults: int
    ends: dict[str, int]  # of requests: answered, left, gone, or the class of an error
    moves: dict[str, int]  # of requests between replicas, by outcome
    broken: str | None = None
    told: str = ""
    timeline: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @property
    def num_errors(self) -> int:
        return sum(count for end, count in self.ends.items() if end not in NO_ERRORS)

    def to_dict(self) -> dict[str, object]:
        """For JSON; what happened is for files."""
        told = asdict(self)
        del told["timeline"]
        return told


@dataclass(slots=True)
class Row:
    """A kind of fault, over all runs that were about it."""

    fault: str
    runs: int = 0
    tries: int = 0
    requests: int = 0
    answered: int = 0
    cancelled: int = 0
    errors: int = 0
    lost: int = 0
    doubled: int = 0
    broken: int = 0

    def add(self, ran: Ran) -> None:
        self.runs += 1
        self.tries += max(1, ran.num_faults)
        self.requests += sum(ran.ends.values())
        self.answered += ran.ends.get("answered", 0)
        self.cancelled += sum(ran.ends.get(end, 0) for end in ("left", "gone", "CallersOwn"))
        self.errors += ran.num_errors
        self.lost += ran.broken == "lost"
        self.doubled += ran.broken == "doubled"
        self.broken += ran.broken not in (None, "lost", "doubled")

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def run_seed(seed: int, kinds: Sequence[str] = KINDS, *, keeps_timeline: bool = False) -> Ran:
    """One run, to its end or to what breaks it."""
    return run_case(draw_case(seed, kinds), keeps_timeline=keeps_timeline)


class _Errors(logging.Handler):
    """What operators would be told of as an error: it is one here too. The rest is told to nobody."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []
        self._log = logging.getLogger("penstock.cluster")

    def __enter__(self) -> _Errors:
        self._log.addHandler(self)
        self._was, self._log.propagate = self._log.propagate, False
        return self

    def __exit__(self, *error: object) -> None:
        self._log.removeHandler(self)
        self._log.propagate = self._was

    def emit(self, record: logging.LogRecord) -> None:
        why = record.exc_info[1] if record.exc_info else None
        self.told.append(f"{record.getMessage()}: {why!r}" if why else record.getMessage())


def run_case(case: Case, *, keeps_timeline: bool = False) -> Ran:
    """`keeps_timeline`: all that happened, as JSON lines, in `Ran.timeline`."""
    worlds: list[World] = []
    loop = WatchedLoop(lambda: worlds[0].after() if worlds else None)
    unheard: list[str] = []
    loop.set_exception_handler(lambda _, context: unheard.append(str(context.get("exception"))))

    async def main() -> None:
        worlds.append(World(case))
        await worlds[0].run()
        _check_left(loop)

    broken, told = None, ""
    errors = _Errors()
    try:
        with errors:
            run_watched(main(), loop)
    except Broken as error:
        broken, told = error.what, str(error)
    except Exception as error:  # noqa: BLE001 - the outermost loop: whatever it is, its seed is told
        broken, told = "crashed", f"{type(error).__name__}: {error}"
    if broken is None and (unheard or errors.told):
        broken, told = "crashed", f"nobody heard of {'; '.join((*unheard, *errors.told))}"
    world = worlds[0]
    return Ran(
        seed=case.seed,
        about=case.about,
        kinds=case.kinds,
        num_faults=world.num_faults,
        ends=dict(Counter(caller.end or "open" for caller in world.callers)),
        moves=dict(world.notes.moves),
        broken=broken,
        told=told,
        timeline=world.notes.lines() if keeps_timeline else (),
    )


def _check_left(loop: WatchedLoop) -> None:
    """Nothing waits any more but whoever asks."""
    tasks = [
        task.get_name() for task in asyncio.all_tasks(loop) if task is not asyncio.current_task()
    ]
    left = [*tasks, *loop.timers_left()]
    if left:
        raise Broken("leaked", f"still there after the end: {'; '.join(left)}")


def run_seeds(
    seeds: Iterable[int],
    kinds: Sequence[str] = KINDS,
    *,
    keeps_timeline: bool = False,
    on_done: Callable[[Ran], None] = lambda ran: None,
) -> list[Ran]:
    """Many runs, one after the other."""
    found = []
    for seed in seeds:
        ran = run_seed(seed, kinds, keeps_timeline=keeps_timeline)
        found.append(ran)
        on_done(ran)
    gc.collect()
    return found


def table_of(runs: Iterable[Ran]) -> list[Row]:
    """A row for each kind of fault that a run was about."""
    rows: dict[str, Row] = {}
    for ran in runs:
        rows.setdefault(ran.about, Row(ran.about)).add(ran)
    return list(rows.values())
