"""Which scheduler carries the most load within a promise: sets of policies from the whole table on four workloads.

    python -m benchmarks.schedulers [--only chat,agents] [--sets sglang,lpm] [--seeds 2] [--processes 2]
                                    [--json FILE] [--page PAGE] [--from-json FILE ...]

One modelled A100-80G with an 8B model serves the arrivals of examples/workloads (chat, code, long_context, agents; cut
to the spans below). For each of four promises (prompt: an early first token; smooth: short gaps; relaxed; mixed: half
the tenants want an answer at once, the others within half a minute) the highest rate is sought at which 90 % of all
requests keep it: on a grid of rates STEP apart, from a guess up (or down) until one fails (or holds), then between the
two. So a capacity is the highest rate of the grid that holds, and two within one step of each other count as equal. In
`mixed` 90 % of either class must hold. A scheduler that reads promises or priorities is told each of them and run
again; the others are run once a rate and judged by all four. A run in which no promise can be kept any more is ended
early.

All sets are run with one seed; the best of each promise, and the default, once more with another, around the place that
the first found. A second table compares admissions and victims where memory is short (an eighth of it).
Scheduler time is not charged. --json goes on with what the file holds. --page writes the tables between the marks of
docs/schedulers.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.schedulers_sets import (
    GUESSES,
    HOST_BLOCKS,
    LATER,
    MIXED,
    PROMISES,
    READS,
    SCHEDULERS,
    SHORT,
    SHORT_BLOCKS,
    SHORT_WORKLOADS,
    SPANS,
    SWAPPED,
    V1,
)
from benchmarks.schedulers_tables import Found, Key, page_with, tables
from penstock.assemble import load_config
from penstock.core.events import Event, Finished, Refused
from penstock.core.types import Slo
from penstock.lab.play import Played
from penstock.lab.simulate import simulate
from penstock.traffic import Trace, open_trace
from penstock.traffic.promises import Promise

ROOT = Path(__file__).parents[1]
WANTED, STEP = 0.9, 1.15
LOWEST, HIGHEST = -25, 40  # places of the grid: 0.03 to 270 a second


@dataclasses.dataclass(frozen=True)
class Search:
    """What one scheduler carries of one workload. `promise` None: told to nobody, judged by all."""

    workload: str
    scheduler: str
    promise: str | None
    seed: int = 0
    is_short: bool = False
    starts: tuple[tuple[str, int], ...] = ()  # places found with another seed

    @property
    def promises(self) -> list[str]:
        every = [*PROMISES[self.workload], MIXED]
        return every if self.promise is None else [self.promise]


class Enough(Exception):
    """No promise can be kept any more."""


class Kept:
    """Counts by promise and class who kept it. What was refused kept none."""

    def __init__(self, search: Search, expected: int) -> None:
        self._bounds = PROMISES[search.workload]
        self._names, self._expected = search.promises, expected
        self.kept = {name: [0, 0] for name in self._names}
        self.num = [0, 0]

    def emit(self, event: Event) -> None:
        if isinstance(event, Refused):
            self.num[0] += 1
        if not isinstance(event, Finished):
            return
        later_class = is_later(event.tenant)
        self.num[later_class] += 1
        if event.first_token_at is None or event.last_token_at is None:
            return
        ttft_s, more = event.first_token_at - event.arrived_at, event.num_output - 1
        tpot_s = (event.last_token_at - event.first_token_at) / more if more > 0 else 0.0
        for name in self._names:
            most_ttft_s, most_tpot_s = bounds_of(self._bounds, name, later_class)
            self.kept[name][later_class] += ttft_s <= most_ttft_s and tpot_s <= most_tpot_s

    def look(self, played: Played) -> None:
        """Called whenever a request was sent."""
        most = (1 - WANTED) * self._expected
        if all(sum(self.num) - sum(kept) > most for kept in self.kept.values()):
            raise Enough

    def shares(self) -> dict[str, float]:
        """Over those who ended; with `Enough`, an upper bound that is low enough."""
        found = {}
        for name, (now, later) in self.kept.items():
            if name == MIXED:
                found[name] = min(now / max(1, self.num[0]), later / max(1, self.num[1]))
            else:
                found[name] = (now + later) / max(1, sum(self.num))
        return found


def is_later(tenant: str) -> bool:
    """Whose promise in `mixed` is the loose one."""
    return int(tenant.rpartition("-")[2]) % 2 == 0


def bounds_of(
    promises: Mapping[str, tuple[float, float]], name: str, later_class: bool
) -> tuple[float, float]:
    if name != MIXED:
        return promises[name]
    return LATER if later_class else promises["prompt"]


def told(search: Search) -> tuple[Slo, tuple[Promise, ...]]:
    """What requests carry: one promise for all, or one for each class of tenants."""
    promises, name = PROMISES[search.workload], search.promise
    if name is None:
        return Slo(), ()
    if name != MIXED:
        return slo_of(promises[name]), ()
    later = Promise(pattern="*[02468]", slo=slo_of(LATER), priority=1)
    return Slo(), (later, Promise(pattern="*", slo=slo_of(promises["prompt"])))


def slo_of(bounds: tuple[float, float]) -> Slo:
    return Slo(ttft_s=bounds[0], tpot_s=bounds[1])


def trace_of(search: Search, rate: float) -> Trace:
    """Of the workload's file with another span."""
    text = (ROOT / "examples" / "workloads" / f"{search.workload}.toml").read_text(encoding="utf-8")
    with tempfile.NamedTemporaryFile("w", suffix=".toml", delete=False) as file:
        file.write(text.replace("duration_s = 240", SPANS[search.workload]))
    slo, promises = told(search)
    return open_trace(
        Path(file.name),
        rate_per_s=rate,
        seed=search.seed,
        model="default",
        slo=slo,
        promises=promises,
    )


def settings_of(search: Search) -> dict[str, object]:
    name = search.scheduler
    flags: dict[str, object] = {
        "seed": search.seed,
        "fleet.0.name": "default",
        "fleet.0.executor": {"kind": "modelled", "gpu": "a100-80g"},
        "fleet.0.policy": (SHORT if search.is_short else SCHEDULERS)[name],
    }
    if search.is_short:
        flags["fleet.0.cache.num_blocks"] = SHORT_BLOCKS
    if name in SWAPPED:
        flags["fleet.0.cache.swap"] = {"host_blocks": HOST_BLOCKS}
    return flags


def run(search: Search, place: int) -> dict[str, float]:
    """The share that kept each promise at a place of the grid."""
    trace = trace_of(search, STEP**place)
    num = sum(1 for _ in trace.timed()) and trace.meta.rows_kept
    kept = Kept(search, num)
    config = load_config(model="llama-3.1-8b", flags=settings_of(search))
    try:
        simulate(config, trace, has_gaps=False, listeners=(kept,), on_progress=kept.look)
    except Enough:
        return {name: min(share, WANTED - 0.01) for name, share in kept.shares().items()}
    finally:
        trace.path.unlink()
    return kept.shares()


def highest(holds: Callable[[int], bool], known: Iterable[int], start: int) -> int | None:
    """The last place that holds, from a guess in steps that double, then halving. None: not even the lowest.

    `known`: places whose answer costs nothing.
    """
    low = high = None
    for place in sorted(known):
        if high is not None:
            break
        low, high = (place, None) if holds(place) else (low, place)
    place, width = start, 1
    while low is None or high is None:
        if low is not None:
            place, width = low + width, 2 * width
        elif high is not None:
            place, width = high - width, 2 * width
        if not LOWEST <= place <= HIGHEST:
            return low
        low, high = (place, high) if holds(place) else (low, place)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def seek(search: Search) -> tuple[Search, dict[str, int | None], int]:
    """By promise the highest place of the grid that holds, and how many simulations it took."""
    shares: dict[int, dict[str, float]] = {}
    every = (*PROMISES[search.workload], MIXED)
    starts = dict(zip(every, GUESSES[search.workload], strict=True)) | dict(search.starts)
    found: dict[str, int | None] = {}
    for name in search.promises:

        def holds(place: int, name: str = name) -> bool:
            if place not in shares:
                shares[place] = run(search, place)
            return shares[place][name] >= WANTED

        found[name] = highest(holds, list(shares), starts[name])
    return search, found, len(shares)


def searches(workloads: Sequence[str], sets: Sequence[str]) -> Iterator[Search]:
    for workload in workloads:
        for scheduler in [name for name in SCHEDULERS if name in sets]:
            for promise in READS.get(scheduler, (None,)):
                yield Search(workload, scheduler, promise)
    for workload in SHORT_WORKLOADS:
        if workload in workloads:
            yield from (
                Search(workload, name, None, is_short=True) for name in SHORT if name in sets
            )


def again(found: Found, seed: int) -> Iterator[Search]:
    """The three best of each promise and the default once more, from where they were found."""
    for (workload, promise, is_short), ladder in places(found).items():
        default = "admit full-fit" if is_short else V1
        best = sorted(ladder, key=lambda name: -ladder[name])[:3]
        for name in {*best, default} & ladder.keys():
            yield Search(workload, name, promise, seed, is_short, ((promise, ladder[name]),))


def places(found: Found) -> dict[tuple[str, str, bool], dict[str, int]]:
    """(workload, promise, is_short) -> scheduler -> place with the first seed."""
    table: dict[tuple[str, str, bool], dict[str, int]] = {}
    for key, by_seed in found.items():
        place = by_seed[0]
        ladder = table.setdefault((key.workload, key.promise, key.is_short), {})
        if place is not None:
            ladder[key.scheduler] = place
    return table


def keep(path: Path, found: Found) -> None:
    rows = [
        {"key": dataclasses.asdict(key), "seed": seed, "place": place}
        for key, by_seed in found.items()
        for seed, place in by_seed.items()
    ]
    told = {"schema": 1, "is_simulation": True, "step": STEP, "rows": rows}
    path.write_text(json.dumps(told) + "\n", encoding="utf-8")


def read(path: Path, found: Found) -> None:
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        found.setdefault(Key(**row["key"]), {})[row["seed"]] = row["place"]


def missing(todo: Sequence[Search], found: Found) -> list[Search]:
    return [
        search
        for search in todo
        if any(search.seed not in found.get(key, {}) for key in keys_of(search))
    ]


def keys_of(search: Search) -> list[Key]:
    return [
        Key(search.workload, promise, search.scheduler, search.is_short)
        for promise in search.promises
    ]


def measure(
    todo: Sequence[Search], found: Found, pool: ProcessPoolExecutor, path: Path | None
) -> int:
    """Into `found`, and after each search all of it to a file."""
    num = 0
    for done, (search, by_promise, runs) in enumerate(pool.map(seek, todo), 1):
        num += runs
        for promise, place in by_promise.items():
            key = Key(search.workload, promise, search.scheduler, search.is_short)
            found.setdefault(key, {})[search.seed] = place
        if path is not None:
            keep(path, found)
        if sys.stderr.isatty():
            print(f"\r{done} of {len(todo)} searches, {num} runs ", end="", file=sys.stderr)
    return num


def main() -> None:
    parser = argparse.ArgumentParser(description="Which scheduler carries the most load.")
    parser.add_argument("--only", default=",".join(PROMISES), help="workloads, by comma")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="all capacities, to this file")
    parser.add_argument("--sets", default=",".join([*SCHEDULERS, *SHORT]), help="sets of policies")
    parser.add_argument("--seeds", type=int, default=2, help="the best are run with all of them")
    parser.add_argument(
        "--from-json", type=Path, nargs="+", default=[], help="tables of earlier runs, no new one"
    )
    parser.add_argument("--page", type=Path, help="a page with the two marks")
    args = parser.parse_args()
    found: Found = {}
    for path in [*args.from_json, *([args.json] if args.json else [])]:
        if path.exists():
            read(path, found)
    if not args.from_json:
        with ProcessPoolExecutor(args.processes) as pool:
            todo = list(searches(args.only.split(","), args.sets.split(",")))
            num = measure(missing(todo, found), found, pool, args.json)
            for seed in range(1, args.seeds):
                num += measure(missing(list(again(found, seed)), found), found, pool, args.json)
        print(f"{num} simulations", file=sys.stderr)
    shown = tables(found, PROMISES, STEP)
    print(shown)
    if args.page:
        args.page.write_text(
            page_with(args.page.read_text(encoding="utf-8"), shown), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
