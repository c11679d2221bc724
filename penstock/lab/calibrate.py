"""Calibrates this machine: measures, fits, and writes the profile that simulations and predictions read.

    penstock bench calibrate MODEL      runs the real engine over a grid of steps, a replica over queue lengths, and
                                        a real server under a few callers (what HTTP and shared cores add)
    penstock bench calibrate --log L    refits step times from the log of a replica that served real requests

The profile states what it was measured on, how many steps, and its error on steps it had not seen. A measured step
of the engine alone lasts from launch to completion, hand-over to its thread included; scheduling is charged apart.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from penstock.assemble.presets import policy_tables
from penstock.cluster.predictors import shape_of_model
from penstock.cluster.spec import ExecutorSpec, lanes_of
from penstock.core.cache_folder import cache_folder
from penstock.core.errors import BadConfig, BadTrace, StepFailed
from penstock.core.types import SCHEMA
from penstock.cost.fitted import TERMS, Fit, fit_steps
from penstock.cost.profile import Profile, SchedulerCost, describe_machine
from penstock.cost.schedulers import Schedulers
from penstock.cost.serving import ServingCost
from penstock.lab.local_server import LocalServer
from penstock.lab.measure import Grid, MeasuredStep, measure_steps
from penstock.lab.neighbours import Watch
from penstock.lab.refit import steps_of_log
from penstock.lab.scheduling import measure_schedulers, policy_sets, schedule_cost, today
from penstock.lab.serving import Ladder, ask_in_rounds
from penstock.lab.serving_cost import serving_cost
from penstock.report.files import check_writable
from penstock.report.log import LogReader

QUICK = Grid(batches=(1, 4, 16), contexts=(16, 256), chunks=(32, 128), rounds=2)
QUICK_LADDER = Ladder(callers=(1, 4, 16), seconds=4.0, pausing_s=4.0)
OnProgress = Callable[[int, int], None]
OnStage = Callable[[str, int, int], None]  # stage, done, of


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How to open the real engine, with the words of an executor's table; see cluster.spec.ExecutorSpec."""

    model: str = "default"
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "stored"
    threads: int | None = None

    def arguments(self, policy: str) -> list[str]:
        """What `penstock serve` is told to open the same."""
        told = [self.model, "--device", self.device, "--dtype", self.dtype]
        told += ["--weights", self.weights, "--policy", policy]
        return told + (
            [] if self.threads is None else ["--set", f"fleet.0.executor.threads={self.threads}"]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A profile and how well it fits. Errors are shares of the measured time."""

    profile: Profile
    fit: Fit
    path: Path

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "path": str(self.path),
            "digest": self.profile.digest,
            "profile": dataclasses.asdict(self.profile),
            "worst": self.fit.worst,
        }

    def __str__(self) -> str:
        fit, scheduler = self.fit, self.profile.scheduler
        lines = [
            f"{fit.num_steps} steps of {self.profile.model} on {self.profile.machine.get('device', 'this machine')}",
            f"mean error {fit.mape:.1%}, on steps it had not seen {fit.left_out:.1%}, worst {fit.worst:.1%}",
        ]
        lines += [
            f"  {name:16} {value:.3e} s" for name, value in self.profile.steps.items() if value
        ]
        if scheduler is not None:
            lines.append(
                f"scheduling ({scheduler.policies}): {scheduler.fixed_s * 1e6:.0f} us a step, "
                f"{scheduler.per_running_s * 1e6:.2f} us a running and "
                f"{scheduler.per_waiting_s * 1e6:.3f} us a waiting job"
            )
        if self.profile.serving is not None:
            lines += describe_serving(self.profile.serving)
        lines.append(f"profile {self.profile.digest} in {self.path}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A table of scheduler times and where it was written."""

    table: Schedulers
    path: Path

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**dataclasses.asdict(self.table), "path": str(self.path)}

    def __str__(self) -> str:
        lines = [
            f"{one.policies:48} {one.fixed_s * 1e6:5.0f} us a step, {one.per_running_s * 1e6:6.2f} us a running and "
            f"{one.per_waiting_s * 1e6:6.3f} us a waiting job"
            for one in self.table.entries
        ]
        return "\n".join([*lines, f"mean error {self.table.error:.1%}, in {self.path}"])


def describe_serving(cost: ServingCost) -> list[str]:
    """The constants of serving, each with its name."""
    lines = [
        f"served ({cost.measured}; {cost.num_answers} answers, {cost.num_steps} steps, "
        f"mean error of a step {cost.mape:.1%}):",
        f"  request on its way in {cost.request_s * 1e3:.2f} ms + {cost.request_token_s * 1e6:.2f} us a prompt token "
        f"+ {cost.request_other_s * 1e3:.3f} ms for each other under way",
        f"  first step of an idle engine {cost.cold_s * 1e3:+.2f} ms",
        f"  token on its way out  {cost.reply_s * 1e3:.2f} ms + {cost.reply_token_s * 1e3:.3f} ms for each of its step",
    ]
    lines += [f"  {name:16} {value:.3e} s" for name, value in cost.steps.items() if value]
    if cost.neighbours is not None:
        lines.append(f"others took {cost.neighbours:.0%} of this machine meanwhile")
    return lines


def default_path(engine: Engine) -> Path:
    """Where a profile goes when nobody says so."""
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in Path(engine.model).name)
    return cache_folder("profiles") / f"{name}-{engine.device}.json"


def calibrate(
    engine: Engine,
    *,
    policy: str = "vllm-v1",
    out: Path | None = None,
    is_quick: bool = False,
    on_stage: OnStage | None = None,
) -> Calibrated:
    """Measure the engine alone, the scheduler, and the engine as it serves. `policy`: a preset's name.

    Raises BadModel, BadConfig and MissingExtra when the engine cannot be opened, StepFailed when it fails a step.
    """
    refuse_lanes(policy)
    path = out or default_path(engine)
    check_writable(path, "the profile")
    tell = on_stage or (lambda stage, done, of: None)
    steps, notes, num_layers = _alone(engine, QUICK if is_quick else Grid(), tell)
    tell("scheduler", 0, 1)
    scheduler = asyncio.run(schedule_cost({"preset": policy}))
    ladder = QUICK_LADDER if is_quick else Ladder()
    serving = measure_serving(engine, policy, ladder, scheduler, tell)
    machine = describe_machine({"device": _device_of(notes, engine)})
    return _written(steps, engine, machine, num_layers, scheduler, serving, path)


def refuse_lanes(policy: str) -> None:
    """Raises BadConfig for a preset whose steps run side by side: what one takes depends on the other."""
    tables = policy_tables({"preset": policy}, has_prefix_cache=True)
    if lanes_of(ExecutorSpec(), tables) > 1:
        raise BadConfig(
            f"{policy} runs two steps side by side, so what a step takes depends on what runs in the other lane; a "
            "profile says what it takes alone",
            hint="calibrate with --policy vllm-v1, or refit a log of it with --log: steps that ran alone are used",
        )


def _alone(
    engine: Engine, grid: Grid, tell: OnStage
) -> tuple[list[MeasuredStep], Mapping[str, str], int]:
    """Steps of the engine in this process, what it says of itself, and its layers."""
    from penstock.engine.torch.open import (  # torch is needed for this only
        EngineConfig,
        open_executor,
    )

    executor = open_executor(
        engine.model,
        EngineConfig(
            device=engine.device,
            dtype=engine.dtype,  # type: ignore[arg-type]
            weights=engine.weights,  # type: ignore[arg-type]
            threads=engine.threads,
        ),
    )
    facts = executor.facts

    async def main() -> list[MeasuredStep]:
        try:
            return await measure_steps(
                executor, facts.vocab_size, grid, lambda done, of: tell("steps", done, of)
            )
        finally:
            await executor.stop()

    return asyncio.run(main()), executor.notes, facts.num_layers


def measure_serving(
    engine: Engine, policy: str, ladder: Ladder, scheduler: SchedulerCost, tell: OnStage
) -> ServingCost:
    """Start a real server, climb the ladder, and fit what came of it."""
    tell("serving", 0, len(ladder.callers))
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        with LocalServer(engine.arguments(policy), Path(folder)) as server:
            watch = Watch(server.pids)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                answers = runner.run(
                    ask_in_rounds(
                        server.url, ladder, on_progress=lambda done, of: tell("serving", done, of)
                    )
                )
            neighbours = watch.share()
            (log,) = server.engine_logs()
        return serving_cost(
            answers,
            list(LogReader(log)),
            scheduler,
            measured=str(ladder),
            neighbours=neighbours,
        )


def time_schedulers(out: Path | None = None, on_progress: OnProgress | None = None) -> Timed:
    """Time the scheduler with every set of policies there is, and write the table."""
    sets = list(policy_sets())
    path = out or cache_folder("profiles") / "schedulers.json"
    check_writable(path, "the table")
    table = asyncio.run(measure_schedulers(sets, on_progress=on_progress))
    table.save(path)
    return Timed(table=table, path=path)


def refit(log: Path, engine: Engine, *, out: Path | None = None) -> Calibrated:
    """Fit the steps of a served log. Raises BadTrace when it holds too few that can be placed."""
    path = out or default_path(engine)
    check_writable(path, "the profile")
    found = steps_of_log(LogReader(log))
    steps = [step for one in found.values() for step in one]
    if len(steps) < 2 * len(TERMS):
        raise BadTrace(
            f"the log {log} holds {len(steps)} measurable steps; a fit needs {2 * len(TERMS)}",
            hint="serve more requests with --log, of various lengths and at various loads; steps that ran beside "
            "another lane's do not count",
        )
    machine = describe_machine({"device": engine.device})
    num_layers = shape_of_model(engine.model).layers
    return _written(steps, engine, machine, num_layers, None, None, path)


def _written(
    steps: Sequence[MeasuredStep],
    engine: Engine,
    machine: dict[str, str],
    num_layers: int,
    scheduler: SchedulerCost | None,
    serving: ServingCost | None,
    path: Path,
) -> Calibrated:
    if len(steps) < 2 * len(TERMS):
        raise StepFailed(
            f"only {len(steps)} steps could be measured; a fit needs {2 * len(TERMS)}",
            hint="give the engine more KV memory or a model with a longer context",
        )
    fit = fit_steps([step.features for step in steps], [step.seconds for step in steps])
    profile = Profile(
        machine=machine,
        model=engine.model,
        num_layers=num_layers,
        made_on=asyncio.run(today()),
        steps=fit.coefficients,
        num_steps=fit.num_steps,
        mape=fit.mape,
        left_out=fit.left_out,
        scheduler=scheduler,
        serving=serving,
    )
    profile.save(path)
    return Calibrated(profile=profile, fit=fit, path=path)


def _device_of(notes: Mapping[str, str], engine: Engine) -> str:
    """What the engine says it runs on: device, type of numbers, kernels."""
    told = [notes[name] for name in ("device", "dtype", "attention", "linear") if name in notes]
    return ", ".join(told) or engine.device
