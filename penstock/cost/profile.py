"""The profile of a machine: fitted step times, scheduler time, and what they were measured on. One JSON file.

`penstock bench calibrate` writes it; `simulate` and a replica's predictions read it. The digest covers all that was
measured, so a log that carries it names the numbers its predictions came from. Scheduler time is linear:

    seconds of one step's decisions = fixed_s + per_running_s * num_running + per_waiting_s * num_waiting
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from penstock.core.config import build
from penstock.core.errors import BadConfig
from penstock.core.schema import check_schema
from penstock.core.types import SCHEMA
from penstock.cost.fitted import TERMS, Fitted
from penstock.cost.serving import ServingCost
from penstock.cost.shapes import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCost:
    """Seconds that deciding one step takes on the machine that was measured.

    `mape`: mean relative error of the line. `policies`: order/admit/batch/evict.
    """

    fixed_s: float
    per_running_s: float
    per_waiting_s: float
    num_steps: int = 0
    mape: float = 0.0
    policies: str = ""

    def seconds(self, num_running: int, num_waiting: int) -> float:
        return self.fixed_s + self.per_running_s * num_running + self.per_waiting_s * num_waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """`steps`: coefficients by term of cost.fitted. Errors are relative; `left_out` of steps the fit had not seen.

    `serving`: what it is when the engine serves over HTTP; its steps are the ones that simulations then take.
    """

    schema: int = SCHEMA
    machine: dict[str, str] = field(default_factory=dict)
    model: str
    num_layers: int
    made_on: str = ""
    steps: dict[str, float]
    num_steps: int
    mape: float
    left_out: float
    scheduler: SchedulerCost | None = None
    serving: ServingCost | None = None

    def __post_init__(self) -> None:
        unknown = sorted(self.step_terms.keys() - TERMS.keys())
        if unknown:
            raise ValueError(f"unknown terms {', '.join(unknown)}; known: {', '.join(TERMS)}")
        if any(not value >= 0 for value in self.step_terms.values()):
            raise ValueError("coefficients must be 0 or more")

    @property
    def step_terms(self) -> dict[str, float]:
        """Coefficients of the engine as it serves, or of the engine alone where only that was measured."""
        return self.steps if self.serving is None else self.serving.steps

    @property
    def digest(self) -> str:
        read = build(
            Profile, dataclasses.asdict(self)
        )  # as it will be read: 0 in the place of a float is 0.0
        told = json.dumps(dataclasses.asdict(read), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    def step_model(self, shape: ModelShape | None = None) -> Fitted:
        where = self.machine.get("device") or self.machine.get("processor") or "this machine"
        serving = self.serving
        num_steps = self.num_steps if serving is None else serving.num_steps
        return Fitted(
            self.step_terms,
            name=f"fit of {self.model} on {where} ({num_steps} steps{' served' if serving else ''})",
            digest=self.digest,
            num_layers=self.num_layers,
            shape=shape,
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".new")
        table = {**dataclasses.asdict(self), "digest": self.digest}
        draft.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        draft.rename(path)


def read_json(path: Path, what: str, hint: str) -> dict[str, object]:
    """The table in a JSON file. Raises BadConfig that says what the file should have been."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadConfig(f"there is no {what} {path}", hint=hint) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"the {what} {path} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise BadConfig(f"{path} is no {what}")
    return table


def load_profile(path: Path) -> Profile:
    """Read a profile. Raises BadConfig or SchemaMismatch with the file's name."""
    table = read_json(path, "profile", "`penstock bench calibrate` writes one")
    schema = table.get("schema")
    check_schema(f"the profile {path}", schema if isinstance(schema, int) else 0)
    told = table.pop("digest", None)
    profile = build(Profile, table, where=str(path))
    if told is not None and told != profile.digest:
        raise BadConfig(
            f"the profile {path} was changed by hand: its digest does not match",
            hint="remove its `digest` line to accept the change, or calibrate again",
        )
    return profile


def describe_machine(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Facts that decide whether a profile speaks for a machine; no host name, no user."""
    facts = {
        "system": platform.system(),
        "processor": _processor(),
        "python": platform.python_version(),
    }
    return {**facts, **(more or {})}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
