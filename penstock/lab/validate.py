"""Does the simulator foretell what a bench of this machine shows? `penstock bench validate`, in one go:

    1  a profile: the given one when it speaks for this machine and model, else a calibration
    2  a real `penstock serve` in a process, with a user's settings
    3  saturation: all requests at once; the rate is what was answered a second until 80 % had ended
    4  a real bench (open loop, HTTP, streamed) of the same requests at shares of that rate, the loads in turn in every
       repeat, so that a machine that drifts does so for all of them; prompts get other words each time
    5  the same requests with the same configuration in virtual time, on the profile
    6  predicted beside measured; see lab.verdict for the rule

Requests are the first rows of the trace: those whose prompt leaves no room in the model's context are left out, answers
are cut to what the context leaves; both are counted. Arrival times are the trace's, all divided by one number.
Nothing of the runs goes back into the profile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import penstock
from penstock.assemble import Config, load_config
from penstock.assemble.presets import policy_tables
from penstock.core.types import SCHEMA
from penstock.cost.profile import Profile, describe_machine, load_profile
from penstock.cost.schedulers import policies_name
from penstock.lab.calibrate import Engine, OnStage, calibrate, describe_serving, refuse_lanes
from penstock.lab.drive import Driven
from penstock.lab.foresee import foresee
from penstock.lab.local_server import LocalServer
from penstock.lab.repeats import BURST, Repeats, Run, answered_rate
from penstock.lab.slices import Slice, requests_of, slice_of
from penstock.lab.verdict import LEAST_ALLOWED, RULE, Row, rows_of, table_of
from penstock.report.made import MadeReplica
from penstock.report.summary import Figures
from penstock.traffic import Trace, open_trace

SIMULATIONS = 5  # of each load, each with its own scatter of steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What to validate. `neighbour_limit`: repeats while others took more of the machine than this are marked."""

    trace: Path
    engine: Engine = Engine()
    profile: Path | None = None
    loads: tuple[float, ...] = (0.3, 0.6, 0.9)
    repeats: int = 5
    num_requests: int = 60
    neighbour_limit: float = 0.1
    policy: str = "vllm-v1"
    out: Path | None = None
    is_quick: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """Requests a second, measured and foretold."""

    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """What came of it. `why` says where the profile comes from."""

    wanted: Validation
    profile: Profile
    why: str
    made: MadeReplica
    slice: Slice
    saturation: Saturation
    runs: tuple[Run, ...]
    predicted: dict[float, list[Figures]]
    rows: tuple[Row, ...]

    @property
    def num_passed(self) -> int:
        return sum(row.has_passed for row in self.rows)

    @property
    def has_passed(self) -> bool:
        return self.num_passed == len(self.rows)

    def to_dict(self) -> dict[str, object]:
        """For JSON: everything."""
        return {
            "schema": SCHEMA,
            "version": penstock.__version__,
            "packages": versions(),
            "machine": describe_machine(),
            "rule": RULE,
            "has_passed": self.has_passed,
            "num_passed": self.num_passed,
            "num_judged": len(self.rows),
            "wanted": dataclasses.asdict(self.wanted) | {"trace": str(self.wanted.trace)},
            "profile_digest": self.profile.digest,
            "profile_from": self.why,
            "profile": dataclasses.asdict(self.profile),
            "served": dataclasses.asdict(self.made),
            "slice": dataclasses.asdict(self.slice),
            "saturation": dataclasses.asdict(self.saturation),
            "rows": [row.to_dict() for row in self.rows],
            "runs": [run.to_dict() for run in self.runs],
            "predicted": {
                str(load): [one.to_dict() for one in found]
                for load, found in self.predicted.items()
            },
        }

    def __str__(self) -> str:
        marked = [run for run in self.runs if run.is_marked]
        lines = [
            f"profile {self.profile.digest} ({self.why}) of {self.profile.model}, made {self.profile.made_on}",
            *(describe_serving(self.profile.serving) if self.profile.serving else []),
            str(self.slice),
            f"saturation {self.saturation.measured:.2f} requests/s measured, {self.saturation.predicted:.2f} predicted "
            f"({self.saturation.error:+.1%})",
            "",
            *table_of(self.rows),
            "",
            f"{self.num_passed} of {len(self.rows)} pass: {RULE}",
        ]
        limit = self.wanted.neighbour_limit
        told = ", ".join(
            f"load {run.load:g} repeat {run.repeat + 1} ({run.neighbours:.0%})" for run in marked
        )
        near = sum(row.error is not None and abs(row.error) <= LEAST_ALLOWED for row in self.rows)
        lines.append(
            f"{near} of {len(self.rows)} are within {LEAST_ALLOWED:.0%}; the median spread between repeats is "
            f"{statistics.median(row.spread or 0.0 for row in self.rows):.1%}"
        )
        lines.append(
            f"{len(marked)} of {len(self.runs)} runs are marked: others took over {limit:.0%} of the machine"
            + (f": {told}" if marked else "")
        )
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "uvloop", "aiohttp", "pyzmq"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def profile_for(wanted: Validation, tell: OnStage) -> tuple[Profile, str]:
    """The profile to predict with, and why this one."""
    missing = "none was given"
    if wanted.profile is not None:
        profile = load_profile(wanted.profile)
        unfit = mismatch(profile, wanted.engine, wanted.policy)
        if unfit is None:
            return profile, str(wanted.profile)
        missing = f"{wanted.profile} {unfit}"
    found = calibrate(wanted.engine, policy=wanted.policy, is_quick=wanted.is_quick, on_stage=tell)
    return found.profile, f"calibrated now, {missing}; kept in {found.path}"


def mismatch(profile: Profile, engine: Engine, policy: str = "vllm-v1") -> str | None:
    """Why a profile does not speak for this machine and model; None = it does."""
    here = describe_machine()
    for fact in ("system", "processor", "python"):
        if profile.machine.get(fact) != here[fact]:
            return (
                f"is of another machine ({fact} {profile.machine.get(fact)!r}, here {here[fact]!r})"
            )
    if profile.model != engine.model:
        return f"is of the model {profile.model!r}"
    if profile.serving is None or profile.scheduler is None:
        return "does not say what serving costs"
    policies = policies_name(policy_tables({"preset": policy}, has_prefix_cache=True))
    if profile.scheduler.policies != policies:
        return f"is of the policies {profile.scheduler.policies}"
    return None


def validate(wanted: Validation, on_stage: OnStage | None = None) -> Validated:
    """Do all of it. Raises PenstockError when something cannot be opened, measured or read."""
    tell = on_stage or (lambda stage, done, of: None)
    refuse_lanes(wanted.policy)
    slice_of(_trace(wanted, 1 << 30, 1.0))  # told before anything is measured, if it cannot be read
    profile, why = profile_for(wanted, tell)
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        kept = Path(folder) / "profile.json"
        profile.save(kept)
        with LocalServer(wanted.engine.arguments(wanted.policy), Path(folder)) as server:
            repeats = Repeats(
                server=server,
                trace=wanted.trace,
                num_requests=wanted.num_requests,
                neighbour_limit=wanted.neighbour_limit,
                tell=tell,
            )
            rate, max_context = repeats.saturation()
            told = slice_of(_trace(wanted, max_context, 1.0))
            speeds = {load: load * rate / told.rate_per_s for load in wanted.loads}
            runs = repeats.runs(speeds, wanted.repeats)
        made = server.made()
        tell("simulation", 0, 1)
        seer = _Seer(wanted, config_of(wanted, made, kept), max_context, profile)
        predicted = {
            load: [seer.foretell(speed, seed).figures() for seed in range(SIMULATIONS)]
            for load, speed in speeds.items()
        }
        burst = answered_rate(seer.foretell(BURST, 0))
    return Validated(
        wanted=wanted,
        profile=profile,
        why=why,
        made=made,
        slice=told,
        saturation=Saturation(measured=rate, predicted=burst),
        runs=tuple(runs),
        predicted=predicted,
        rows=tuple(_rows(predicted, runs)),
    )


@dataclass(frozen=True, slots=True)
class _Seer:
    """Foretells the slice at any speed."""

    wanted: Validation
    config: Config
    max_context: int
    profile: Profile

    def foretell(self, speed: float, seed: int) -> Driven:
        assert self.profile.serving is not None
        requests = requests_of(_trace(self.wanted, self.max_context, speed))
        return foresee(self.config, requests, self.profile.serving, seed=seed)


def config_of(wanted: Validation, made: MadeReplica, profile: Path) -> Config:
    """The configuration that was served, its executor modelled on the profile."""
    return load_config(
        model=wanted.engine.model,
        flags={
            "fleet.0.policy.preset": wanted.policy,
            "fleet.0.executor.kind": "modelled",
            "fleet.0.executor.profile": str(profile),
            "fleet.0.executor.max_context": made.caps.max_context,
            "fleet.0.cache.num_blocks": made.num_blocks,
        },
    )


def _trace(wanted: Validation, max_context: int, speed: float) -> Trace:
    served = load_config(model=wanted.engine.model).fleet[0].served_name
    return open_trace(
        wanted.trace,
        limit=wanted.num_requests,
        speed=speed,
        max_tokens="trace",
        max_context=max_context,
        model=served,
    )


def _rows(predicted: dict[float, list[Figures]], runs: Sequence[Run]) -> list[Row]:
    return [
        row
        for load, figures in predicted.items()
        for row in rows_of(load, figures, [run.figures for run in runs if run.load == load])
    ]
