"""Does the simulator say what real vLLM did? Logged runs replayed under our vLLM-v1 policies, errors beside others'.

Each run is simulated with its own limits (jobs, tokens a step, KV blocks where it tells) on operator tables of its card
and model, arrivals as logged. No number comes from the run that is scored:

    kernels        from the tables, whose digest is told
    all-reduce     alpha and bandwidth of the card catalogue
    prefill_s,     what vLLM adds to the kernels: fitted on the other runs on the same card, which is taken for the same
    first_step_s   host; where there are none, on all the others

`first_step_s` is what the very first request's TTFT lacks. `prefill_s` is where the mean end-to-end error of a run
would be 0, by two secants from the errors at 0 and at TRIAL_S. Both are means over the runs that may be used. The
structure (admissions one step late, one alpha a table) was chosen with all runs in sight.

Beside it, on the same run: the same with both constants 0, and the roofline, which says what tables are worth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.assemble import Config, FleetConfig
from penstock.assemble.cache_config import CacheConfig
from penstock.cluster.spec import ExecutorSpec
from penstock.core.config import Table
from penstock.core.errors import BadConfig
from penstock.core.events import Event, Finished
from penstock.cost.op_tables import read_op_tables
from penstock.lab.gate_scores import GOAL, Scores, scores_of
from penstock.lab.simulate import simulate
from penstock.lab.vllm_logs import BLOCK_SIZE, Latency, Replay, VllmLog, find_logs, latency_of

TRIAL_S = 0.006
MOST_S = 0.02  # of prefill_s: beyond it is not launching that is missing
OnDone = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Of the engine's host. `fitted_on`: the runs they come from."""

    prefill_s: float = 0.0
    first_step_s: float = 0.0
    fitted_on: tuple[str, ...] = ()

    def costs(self) -> dict[str, float]:
        return {"prefill_s": self.prefill_s, "first_step_s": self.first_step_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """One run beside its simulation. `real` and `simulated` are in the order of the requests."""

    log: VllmLog
    tables: str
    constants: Constants
    scores: Scores
    unfitted: Scores
    roofline: Scores
    real: tuple[Latency, ...]
    simulated: tuple[Latency, ...]

    @property
    def has_goal(self) -> bool:
        """The goal is stated for these cards."""
        return self.log.hardware == "RTXPRO6000"

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "run": self.log.name,
            "engine": self.log.engine,
            "card": self.log.card,
            "tp": self.log.tp,
            "model": self.log.model,
            "num_requests": len(self.real),
            "num_blocks_logged": self.log.num_blocks,
            "tables": self.tables,
            "constants": dataclasses.asdict(self.constants),
            "errors_percent": self.scores.errors,
            "num_not_queued": self.scores.num_not_queued,
            "unfitted_errors_percent": self.unfitted.errors,
            "roofline_errors_percent": self.roofline.errors,
            "is_through": self.scores.is_through,
            "beyond_goal": self.scores.beyond(GOAL) if self.has_goal else None,
        }


class Answers:
    """Hears when each answer ended."""

    def __init__(self) -> None:
        self.ended: dict[str, Finished] = {}

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.ended[event.request] = event


def gate(logs: Path, op_tables: Path, *, on_done: OnDone | None = None) -> list[Gated]:
    """Score every run of a folder. Raises BadTrace, BadConfig."""
    runs = find_logs(logs)
    folders = {run.name: tables_for(run, op_tables) for run in runs}
    donors = {run.name: _donors(run, runs) for run in runs}
    needed = {donor.name for each in donors.values() for donor in each}
    fitted: dict[str, Constants] = {}
    total = len(needed) + len(runs)
    found: list[Gated] = []
    for run in runs:
        if run.name in needed:
            _tell(on_done, len(fitted), total, f"fitting on {run.name}")
            fitted[run.name] = fit(run, folders[run.name])
    for run in runs:
        _tell(on_done, len(fitted) + len(found), total, f"scoring {run.name}")
        constants = _mean([fitted[donor.name] for donor in donors[run.name]])
        found.append(score(run, folders[run.name], constants))
    return found


def _tell(on_done: OnDone | None, done: int, total: int, told: str) -> None:
    if on_done is not None:
        on_done(done, total, told)


def _donors(run: VllmLog, runs: Sequence[VllmLog]) -> list[VllmLog]:
    """The runs whose constants this one may use: never itself."""
    others = [one for one in runs if one.name != run.name and one.engine == run.engine]
    return [one for one in others if one.hardware == run.hardware] or others


def _mean(each: Sequence[Constants]) -> Constants:
    if not each:
        return Constants()
    return Constants(
        prefill_s=sum(one.prefill_s for one in each) / len(each),
        first_step_s=sum(one.first_step_s for one in each) / len(each),
        fitted_on=tuple(name for one in each for name in one.fitted_on),
    )


def tables_for(run: VllmLog, op_tables: Path) -> Path:
    """The folder of tables of the run's card, model and degree of parallelism. Raises BadConfig."""
    wanted = f"{run.hardware}_{run.model.replace('/', '_')}_*_tp{run.tp}"
    found = sorted(op_tables.glob(wanted))
    if not found:
        raise BadConfig(
            f"{op_tables} has no tables for the run {run.name}",
            hint=f"a folder is named {wanted}, the * being the number format",
        )
    return found[0]


def config_of(run: VllmLog, tables: Path | None, constants: Constants) -> Config:
    """The deployment that the run was of; `tables` None = the roofline, on which constants do not bear."""
    batch = {
        "name": "vllm-v1",
        "max_jobs": run.max_jobs,
        "max_tokens": run.max_tokens,
        "is_ahead": True,
    }
    return Config(
        fleet=(
            FleetConfig(
                model=run.shape,
                executor=ExecutorSpec(
                    kind="modelled",
                    gpu=run.card,
                    tensor_parallel=run.tp,
                    op_tables=tables,
                    engine=None if tables is None else run.engine,
                    engine_costs={} if tables is None else constants.costs(),
                ),
                cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=run.num_blocks),
                policy=Table(preset="vllm-v1", batch=batch),
            ),
        )
    )


def replay(
    run: VllmLog, tables: Path | None, constants: Constants, limit: int | None = None
) -> tuple[Latency, ...]:
    """What the simulator makes of the run's requests, or the first so many, in their order."""
    answers = Answers()
    config = config_of(run, tables, constants)
    simulate(config, Replay(run, limit), has_gaps=False, listeners=(answers,))
    found = []
    for one in run.requests[:limit]:
        ended = answers.ended[one.id]
        assert ended.first_token_at is not None and ended.last_token_at is not None
        times = (ended.arrived_at, ended.first_token_at, ended.last_token_at)
        found.append(latency_of(*times, ended.num_output))
    return tuple(found)


def fit(run: VllmLog, tables: Path) -> Constants:
    """The constants that this run would like best."""
    first = run.requests[0]
    alone = replay(run, tables, Constants(), limit=1)[0]
    gap_s = max(0.0, first.real.ttft_s - alone.ttft_s)
    real = sum(one.real.e2e_s for one in run.requests)

    def error(prefill_s: float) -> float:
        """Of the mean end-to-end latency."""
        found = replay(run, tables, _of_gap(run, prefill_s, gap_s))
        return sum(one.e2e_s for one in found) / real - 1

    low, high = (0.0, error(0.0)), (TRIAL_S, error(TRIAL_S))
    middle = _root(low, high)
    prefill_s = _root((middle, error(middle)), low if middle > TRIAL_S / 2 else high)
    return _of_gap(run, prefill_s, gap_s)


def _of_gap(run: VllmLog, prefill_s: float, gap_s: float) -> Constants:
    """The first request's TTFT lacks `gap_s`: its steps with a prefill, the rest is the first step's."""
    steps = math.ceil(run.requests[0].num_prompt / run.max_tokens)
    first_step_s = max(0.0, gap_s - steps * prefill_s)
    return Constants(prefill_s=prefill_s, first_step_s=first_step_s, fitted_on=(run.name,))


def _root(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Where the line through two (seconds, error) is 0, within [0, MOST_S]."""
    (x0, y0), (x1, y1) = one, other
    if y1 == y0:
        return x0
    return min(MOST_S, max(0.0, x0 - y0 * (x1 - x0) / (y1 - y0)))


def score(run: VllmLog, tables: Path, constants: Constants) -> Gated:
    real = tuple(one.real for one in run.requests)
    is_queued = [one.is_queued for one in run.requests]
    simulated = replay(run, tables, constants)
    read = read_op_tables(tables)
    return Gated(
        log=run,
        tables=f"{read.name} [{read.digest}]",
        constants=constants,
        scores=scores_of(real, simulated, is_queued),
        unfitted=scores_of(real, replay(run, tables, Constants()), is_queued),
        roofline=scores_of(real, replay(run, None, Constants()), is_queued),
        real=real,
        simulated=simulated,
    )
