"""What one decision costs: every policy, at 256 running and 2,000 waiting jobs.

A real replica is brought to that point by an executor that answers at once; the policies are then asked about its real
views (its job lists, columns, ledger and length history), a fresh policy each time, taught by the events so far. Two
situations: `roomy` (memory for a few more jobs) and `short` (not every running job can write its next token). Beside
them: orders that look everybody up, with as many waiting as they do that for (`128 wait`); parameters that take
another way (`pattern=markov`); routes over REPLICAS reports; limits at the end of a window of WINDOW prompts. Of each
the least, the median and the longest processor time of `--times` calls are told; a busy machine adds to it, so
`--repeat` measures all of it several times and tells the least of each figure.

    python -m benchmarks.decide [--running 256] [--waiting 2000] [--times 15] [--repeat 1] [--only NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.assemble.presets import policy_tables
from penstock.cluster.spec import policies_of
from penstock.core.config import Table
from penstock.core.events import Arrived, Event
from penstock.core.limits import Holder, Use
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Report, Request, RequestId, Sampling, Slo
from penstock.cost.hardware import card_of
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.lab.scheduling import InstantExecutor
from penstock.policy import TABLE, admit, batch, evict, find, limit, order, route

KINDS = ("order", "admit", "batch", "evict")
OTHER_WAYS: dict[str, dict[str, object]] = {
    "drawn-priority": {"pattern": "markov"},
    "fastswitch": {"pattern": "markov"},
    "cache-aware": {"kept": 0.5},
    "sjf": {"patience_s": None},
    "jit-density": {"patience_s": 10.0},
    "jit": {"rank_by": "bandwidth"},
    "split-fuse": {"splits_evenly": True},
    "vllm-v1": {"is_ahead": True},
}
LOOK_UP = ("lpm", "dfs-weight")
REPLICAS, WINDOW = 100, 500
PROMPT, ANSWER = (64, 900), 1200  # tokens; all may write ANSWER
LIMIT_MS = 1.0
Case = tuple[
    str, dict[str, object], Callable[[Any], object]
]  # about what, parameters, the question


@dataclass(kw_only=True)
class Probe:
    """Stands in for the batch policy; measures when its replica is where it is wanted."""

    args: argparse.Namespace
    inner: batch.Policy
    ordering: Ordering
    events: list[Event] = field(default_factory=list)
    found: dict[str, list[dict[str, object]]] = field(default_factory=dict)

    def observe(self, event: Event) -> None:
        self.events.append(event)

    def decide(self, view: batch.View) -> batch.Decision:
        if len(view.running) == self.args.running and len(view.waiting) >= self.args.waiting:
            fork = view.ledger.fork()
            is_short = sum(fork.need(job, job.known) for job in view.running) > fork.free
            situation = "short" if is_short else "roomy"
            is_settled = all(job.todo == 1 for job in view.running)
            if is_settled and situation not in self.found:
                self.found[situation] = list(self._measure(view, situation))
        return self.inner.decide(view)

    def _measure(self, view: batch.View, situation: str) -> Iterator[dict[str, object]]:
        for kind in KINDS:
            for name in TABLE[kind]:
                if self.args.only in (None, name):
                    for about, parameters, ask in list(self._cases(kind, name, view)):
                        policy = find(kind, name)(**parameters)
                        told = timed(policy, ask, self.events, self.args.times)
                        yield row(kind, name, about, situation, told)

    def _cases(self, kind: str, name: str, view: batch.View) -> Iterator[Case]:
        for about, ask in self._asks(kind, view):
            yield about, {}, ask
        about, ask = next(self._asks(kind, view))
        for parameter, value in OTHER_WAYS.get(name, {}).items():
            yield f"{parameter}={value}", {parameter: value}, ask
        if name in LOOK_UP:
            assert self.ordering.view is not None
            most = find(kind, name)().most_waiting
            few = dataclasses.replace(self.ordering.view, waiting=self.ordering.view.waiting[:most])
            yield f"{most} wait", {}, lambda policy: policy.decide(few)

    def _asks(self, kind: str, view: batch.View) -> Iterator[tuple[str, Callable[[Any], object]]]:
        """What a policy of this kind is asked, made anew for each call where a call uses it up."""
        if kind == "order":
            yield "", lambda policy: policy.decide(self.ordering.view)
        elif kind == "admit":
            yield "", lambda policy: policy.decide(self._admission(view))
        elif kind == "batch":
            yield "", lambda policy: policy.decide(view)
        else:
            jobs = self._victims(view)
            yield "jobs", lambda policy: policy.decide(jobs)
            blocks = [IdleBlock() for _ in range(2000)]
            idle = evict.View(view.now, view.rng, 8, None, blocks, lambda item: 1)
            yield "blocks", lambda policy: policy.decide(idle)

    @staticmethod
    def _admission(view: batch.View) -> admit.View:
        job, fork = view.waiting[0], view.ledger.fork()
        return admit.View(
            view.now, view.rng, job, min(64, job.known), fork, view.running, view.lengths
        )

    @staticmethod
    def _victims(view: batch.View) -> evict.View:
        fork = view.ledger.fork()
        freed: Callable[[Any], int] = fork.freeable
        return evict.View(view.now, view.rng, 40, view.running[-1], view.running, freed)


@dataclass(frozen=True)
class IdleBlock:
    num_blocks: int = 1


@dataclass
class Ordering:
    """First come, first served; remembers what the order policy was asked about."""

    inner: order.Policy = field(default_factory=lambda: find("order", "fcfs")())
    view: order.View | None = None

    def decide(self, view: order.View) -> order.Decision:
        self.view = view
        return self.inner.decide(view)


def timed(
    taught: Any, ask: Callable[[Any], object], events: Sequence[Event], times: int
) -> dict[str, object]:
    """Processor time of a decision of a policy that has heard these events, fresh each time."""
    if hasattr(taught, "observe"):
        for event in events:
            taught.observe(event)
    spent = []
    for _ in range(times):
        policy = copy.deepcopy(taught)
        began = time.thread_time()
        ask(policy)
        spent.append(1e3 * (time.thread_time() - began))
    return {"least_ms": min(spent), "median_ms": statistics.median(spent), "max_ms": max(spent)}


def row(
    kind: str, name: str, about: str, situation: str, told: dict[str, object]
) -> dict[str, object]:
    return {"situation": situation, "kind": kind, "policy": name, "about": about, **told}


def elsewhere(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Of the policies that are not asked about jobs."""
    chance = stream(2, "decide")
    asked = list(requests(WINDOW))
    reports = [
        Report(replica=f"r{n}", at=0.0, num_running=chance.randrange(256), block_size=16)
        for n in range(REPLICAS)
    ]
    outstanding = {report.replica: report.num_running for report in reports}
    routing = route.View(0.0, chance, asked[0], "prefill", reports, outstanding)
    arrived = [
        Arrived(
            at=0.0, who="", request=each.id, model="m", seq=seq, num_prompt=each.prompt.num_tokens,
            max_tokens=ANSWER, slo=asked[0].slo, n=1, tenant="", priority=0,
        )
        for seq, each in enumerate(asked)
    ]  # fmt: skip
    uses = {
        "prefill": [Use(0.6, chance.randrange(100, 8000), 0.2) for _ in range(50)],
        "decode": [Use(share, 256, 0.02, 10) for share in (0.4, 1.0) for _ in range(25)],
    }
    holders = [Holder(name, 0.1, 0.5, used) for name, used in uses.items()]
    sharing = limit.View(60.0, chance, holders, 2.0)
    for kind, view, events in (("route", routing, []), ("limit", sharing, arrived)):
        for name in TABLE[kind]:
            if args.only in (None, name):
                told = timed(
                    find(kind, name)(),
                    lambda policy, it=view: policy.decide(it),
                    events,
                    args.times,
                )
                yield row(kind, name, "", "", told)


class Unheard:
    def emit(self, event: Event) -> None: ...


def requests(num: int) -> Iterator[Request]:
    """Four tenants, three classes, a shared beginning for some."""
    chance = stream(0, "decide")
    slos = (Slo(ttft_s=2.0, tpot_s=0.1), Slo(deadline_s=30.0), Slo())
    for place in range(num):
        tokens = chance.randint(*PROMPT)
        shared = (chance.randrange(5),) if tokens >= 256 and place % 3 == 0 else ()
        yield Request(
            id=RequestId(f"r{place}"),
            model="m",
            prompt=TracedPrompt(tokens, shared, 256),
            sampling=Sampling(max_tokens=ANSWER),
            slo=slos[place % 3],
            tenant=f"t{place % 4}",
            priority=place % 2,
        )


def replica_of(args: argparse.Namespace) -> tuple[Replica, Probe]:
    tables = policy_tables({"preset": "vllm-v1"}, has_prefix_cache=True)
    tables.pop("route")
    tables["batch"] = Table({**tables["batch"], "max_jobs": args.running, "max_tokens": 16384})
    usual = policies_of(tables)
    ordering = Ordering()
    probe = Probe(args=args, inner=usual.batch, ordering=ordering)
    policies = ReplicaPolicies(
        order=ordering, admit=usual.admit, batch=probe, evict=usual.evict, blocks=usual.blocks
    )
    shape = shape_of("llama-3.1-8b")
    cost = StepPredictor(Roofline(shape, card_of("a100-80g")), shape.layers)
    lengths = RecentLengths()
    chance = stream(1, "decide")
    for _ in range(1000):
        lengths.add(1 + int(chance.lognormvariate(5.5, 0.8)))
    mean = sum(PROMPT) / 2 + ANSWER / 8
    config = ReplicaConfig(num_blocks=int(args.running * mean / 16))
    replica = Replica(
        config,
        InstantExecutor(),
        policies,
        Predictors(cost=cost, lengths=lengths),
        log=Unheard(),
    )
    return replica, probe


async def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    replica, probe = replica_of(args)
    for request in requests(args.running + args.waiting + args.running // 2):
        replica.submit(request)
    while len(probe.found) < 2:
        await asyncio.sleep(0)
    await replica.stop()
    return [*(each for rows in probe.found.values() for each in rows), *elsewhere(args)]


def least(runs: Sequence[list[dict[str, object]]]) -> list[dict[str, object]]:
    """Of several runs the least of each figure."""
    return [
        {
            name: min(each[name] for each in rows) if name.endswith("_ms") else value  # type: ignore[type-var]
            for name, value in rows[0].items()
        }
        for rows in zip(*runs, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=2000)
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", help="this policy")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = least([asyncio.run(measure(args)) for _ in range(args.repeat)])
    print(f"{args.running} running, {args.waiting} waiting; processor time of one decision, ms")
    print(f"{'kind':7}{'policy':22}{'about':20}{'situation':10}{'least':>8}{'median':>8}{'max':>8}")
    for told in sorted(rows, key=lambda told: (str(told["kind"]), str(told["policy"]))):
        mark = "" if float(str(told["median_ms"])) < LIMIT_MS else f"  over {LIMIT_MS:g} ms"
        print(
            f"{told['kind']:7}{told['policy']:22}{told['about']:20}{told['situation']:10}"
            f"{told['least_ms']:8.3f}{told['median_ms']:8.3f}{told['max_ms']:8.3f}{mark}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"running": args.running, "waiting": args.waiting, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
