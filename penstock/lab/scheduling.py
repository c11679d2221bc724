"""Measures what deciding a step costs: a replica with its policies, on an executor that answers at once.

So many jobs run and so many wait; the processor time from a completion to the next launch is all the replica's and its
policies' own. Processor time is counted and not the clock's, since what others take on a busy machine is no decision.
Each point is the median of a few stretches of steps, and a line through the points is what is kept:

    seconds = fixed_s + per_running_s * num_running + per_waiting_s * num_waiting
"""

from __future__ import annotations

import asyncio
import datetime
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

import penstock
from penstock.assemble.presets import PRESETS, policy_tables
from penstock.cluster.spec import policies_of
from penstock.core.clock import now, wall_anchor
from penstock.core.config import Table
from penstock.core.events import Event
from penstock.core.plans import Done, Plan, Sampled
from penstock.core.ports import Completion, Grain
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, PlanId, Request, RequestId, Sampling
from penstock.cost.fitted import Fitted, solve_nonnegative
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.cost.profile import SchedulerCost, describe_machine
from penstock.cost.schedulers import SLOTS, Schedulers, policies_name
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors
from penstock.policy import TABLE

BLOCKS = ("lru", "leaves")  # of the table's evict policies, those for the slot `blocks`
RUNNING = (1, 8, 32, 128)
WAITING = (0, 32, 256)
STRETCHES = 5
Point = tuple[int, int, float]  # running, waiting, seconds
OnProgress = Callable[[int, int], None]


class InstantExecutor:
    """Answers every plan on the next turn of the loop: what is left of a step is its replica's own time."""

    def __init__(self) -> None:
        self.caps = Caps(num_layers=1, max_context=1 << 20)
        self.num_steps = 0
        self._tell: Callable[[Completion], None] | None = None

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._tell = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        outputs = tuple(Sampled(work.seq, 1) for work in plan.work if work.samples)
        asyncio.get_running_loop().call_soon(self._finish, plan.id, outputs)
        return plan.id

    def _finish(self, plan: PlanId, outputs: tuple[Sampled, ...]) -> None:
        self.num_steps += 1
        assert self._tell is not None
        self._tell(Done(plan, 1, outputs, (now(),)))

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> None:
        """Nothing runs long enough to be interrupted."""

    def resume(self, plan: PlanId) -> None:
        raise AssertionError("nothing yields here")

    def abort(self, plan: PlanId) -> None:
        self._tell = lambda completion: None

    def close_jobs(self, seqs: Sequence[int]) -> None:
        """Nothing is kept of jobs."""

    async def stop(self) -> None:
        self._tell = lambda completion: None


class _Unheard:
    def emit(self, event: Event) -> None:
        pass


async def schedule_cost(policy: Mapping[str, object], *, steps: int = 40) -> SchedulerCost:
    """What these policies (as in a fleet's table) and the replica around them take for a step."""
    tables = policy_tables(policy, has_prefix_cache=True)
    tables.pop("route")
    points = [
        (running, waiting, await _seconds_a_step(tables, (running, waiting), steps))
        for running in RUNNING
        for waiting in WAITING
    ]
    return fit_points(points, policies_name(tables), len(points) * steps)


def fit_points(points: Sequence[Point], policies: str, num_steps: int) -> SchedulerCost:
    """The line of least relative squared error with coefficients of 0 or more."""
    table = np.array([(1.0, running, waiting) for running, waiting, _ in points])
    weights = 1.0 / np.array([seconds for *_, seconds in points])
    solution = solve_nonnegative(table * weights[:, None], np.ones(len(points)))
    fixed_s, per_running_s, per_waiting_s = solution.tolist()
    return SchedulerCost(
        fixed_s=fixed_s,
        per_running_s=per_running_s,
        per_waiting_s=per_waiting_s,
        num_steps=num_steps,
        mape=float(np.abs(table @ solution * weights - 1).mean()),
        policies=policies,
    )


async def _seconds_a_step(tables: Mapping[str, Table], jobs: tuple[int, int], steps: int) -> float:
    """The median of a few stretches of steps with so many (running, waiting) jobs."""
    num_running, num_waiting = jobs
    executor = InstantExecutor()
    batch = Table({**tables["batch"], "max_jobs": num_running})
    predictor = StepPredictor(Fitted({"token": 1e-3}, name="", digest="", num_layers=1), 1)
    replica = Replica(
        ReplicaConfig(num_blocks=1 << 16, block_size=16),
        executor,
        policies_of({**tables, "batch": batch}),
        Predictors(cost=predictor, lengths=RecentLengths()),
        log=_Unheard(),
    )
    for number in range(num_running + num_waiting):
        request = Request(
            id=RequestId(f"{number}"),
            model="measured",
            prompt=TracedPrompt(16),
            sampling=Sampling(max_tokens=1 << 16),
        )
        replica.submit(request, every_token=True)
    each = max(1, steps // STRETCHES)
    stretches = []
    for stretch in range(STRETCHES + 1):
        began_s, until = processor_s(), executor.num_steps + each
        while executor.num_steps < until:
            await asyncio.sleep(0)
        if stretch:  # the first admits and prefills
            stretches.append((processor_s() - began_s) / each)
    await replica.stop()
    return float(np.median(stretches))


def processor_s() -> float:
    """Processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def policy_sets() -> Iterator[dict[str, object]]:
    """What a table of scheduler times covers: every preset, and every preset with one slot changed."""
    seen = set()
    for preset in PRESETS:
        changes: list[dict[str, object]] = [{}]
        changes += [{slot: name} for slot in SLOTS for name in TABLE[slot] if name not in BLOCKS]
        for change in changes:
            policy = {"preset": preset, **change}
            name = policies_name(policy_tables(policy, has_prefix_cache=True))
            if name not in seen:
                seen.add(name)
                yield policy


async def measure_schedulers(
    sets: Sequence[Mapping[str, object]],
    *,
    steps: int = 100,
    on_progress: OnProgress | None = None,
) -> Schedulers:
    """Time the replica with each of these sets of policies, on the running wall-clock loop."""
    entries = []
    for number, policy in enumerate(sets):
        entries.append(await schedule_cost(policy, steps=steps))
        if on_progress is not None:
            on_progress(number + 1, len(sets))
    return Schedulers(
        machine=describe_machine(),
        made_on=await today(),
        version=penstock.__version__,
        error=float(np.mean([entry.mape for entry in entries])),
        entries=tuple(entries),
    )


async def today() -> str:
    """The date in UTC, on a wall-clock loop."""
    return datetime.datetime.fromtimestamp(wall_anchor()[1], datetime.UTC).date().isoformat()
