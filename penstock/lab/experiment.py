"""An experiment: one published claim, what it is measured against here, and when it counts as reproduced.

    prepare --> plan --> work (each run alone, in parallel) --> judge

`plan` lists what is to be run as plain data: JSON that names everything a run depends on, so that a run is found again
by its settings and a stopped one goes on where it was. `work` runs one of them and returns figures; it is called in
another process, so it takes nothing but its settings and where the data is. `judge` sees all rows and says in plain
words what came out.

What the runner enforces, whatever the experiment says (rules for honest comparison of schedulers):
- a kept result has at least SEEDS seeds a point; with fewer it is marked "quick" and no verdict is kept;
- rows that differ in nothing but `variant` finished the same requests, or the difference is counted in the result;
- an experiment that compares schedulers runs the four BASELINES among its variants, and charges scheduler time;
- every ratio is paired by seed and shown with its spread; constants are listed beside it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from penstock.core.errors import BadConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 5
BASELINES = ("vllm-512", "vllm-2048", "sglang", "s-edf")

Settings = Mapping[str, object]  # JSON: what one run depends on; `variant` and `seed` among it
Outcome = Literal["reproduced", "in part", "not"]


def number(table: Mapping[str, object], name: str) -> float:
    """An entry that is a number; nan for None or nothing."""
    value = table.get(name)
    assert value is None or isinstance(value, int | float), f"{name} is {value!r}"
    return float("nan") if value is None else float(value)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: what it depended on, and what came out. `finished` among the figures digests who was served."""

    settings: Settings
    figures: Mapping[str, object]

    def get(self, name: str) -> object:
        """A figure or a setting; None when there is none."""
        return self.figures.get(name, self.settings.get(name))

    def number(self, name: str) -> float:
        """A figure or a setting that is a number; nan when it was not measured."""
        return number(self.settings if name in self.settings else self.figures, name)

    def fits(self, where: Mapping[str, object]) -> bool:
        return all(self.get(name) == value for name, value in where.items())


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much to run. `data`: the folder of published traces, None = the small pieces in the repository."""

    name: Literal["quick", "full"] = "quick"
    num_seeds: int = 2
    data: Path | None = None

    @property
    def is_full(self) -> bool:
        return self.name == "full"

    @property
    def seeds(self) -> range:
        return range(self.num_seeds)

    def trace(self, name: str, sample: str | None = None) -> Path:
        """A published trace by its file name, or the `sample` of it in the repository when no folder is given."""
        if self.data is not None:
            for folder in (self.data, self.data / "traces"):
                if (folder / name).exists():
                    return folder / name
            raise BadConfig(
                f"{self.data} has no {name}", hint="--data names the folder of the traces"
            )
        if sample is None or self.is_full:
            raise BadConfig(
                f"this needs the trace {name}",
                hint="--data FOLDER, the folder that holds it (see docs/reproducing.md)",
            )
        return SAMPLES / sample


SAMPLES = Path(__file__).resolve().parents[2] / "data"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """What was compared, one value a seed, none where the divisor was zero. `published`: what the source reports."""

    name: str
    values: tuple[float, ...]
    published: str = ""
    unit: str = "x"

    @property
    def mean(self) -> float:
        """nan of nothing."""
        return mean(self.values)

    def __str__(self) -> str:
        if not self.values:
            return "not measured"
        told = f"{_short(self.mean)}{self.unit}"
        if len(self.values) > 1:
            told += f" [{_short(min(self.values))}..{_short(max(self.values))}]"
        return told


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`why` says in plain words what holds, what does not and what it hangs on."""

    outcome: Outcome
    why: str
    ratios: tuple[Ratio, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One published claim. `criterion` is fixed before the runs; `constants` are (what, value and source).

    `prepare` measures once what the plan needs (saturation); `plan` gets it, and the result lists it among the
    constants. `traces`: names of the files that a full run reads.
    """

    name: str
    system: str
    source: str
    claim: str
    criterion: str
    workload: str
    plan: Callable[[Scale, Settings], Sequence[Settings]]
    work: Callable[[Settings, Scale], Mapping[str, object]]
    judge: Callable[[Sequence[Row]], Verdict]
    constants: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[Scale], Settings] | None = None
    traces: tuple[str, ...] = ()
    compares_schedulers: bool = True
    draw: Callable[[Sequence[Row], Figure], None] | None = None


def check_plan(experiment: Experiment, plan: Sequence[Settings], scale: Scale) -> None:
    """Raise AssertionError when a plan breaks the rules above: that is a mistake in the experiment."""
    assert plan, f"{experiment.name} plans nothing"
    keys = [key_of(settings) for settings in plan]
    assert len(set(keys)) == len(keys), f"{experiment.name} plans a run twice"
    for settings in plan:
        assert {"variant", "seed"} <= settings.keys(), f"{experiment.name}: {settings}"
    if experiment.compares_schedulers:
        missing = set(BASELINES) - {str(settings["variant"]) for settings in plan}
        assert not missing, f"{experiment.name} lacks the baselines {sorted(missing)}"
    seeds = defaultdict(set)
    for settings in plan:
        seeds[key_of(settings, without=("seed",))].add(settings["seed"])
    if scale.is_full:
        few = [point for point, known in seeds.items() if len(known) < SEEDS]
        assert not few, f"{experiment.name}: fewer than {SEEDS} seeds at {few[0]}"


def key_of(settings: Settings, without: Iterable[str] = ()) -> str:
    """Settings as one line of JSON, some left out: equal lines are equal settings."""
    left = {name: value for name, value in settings.items() if name not in set(without)}
    return json.dumps(left, sort_keys=True)


def unequal_sets(rows: Sequence[Row]) -> list[str]:
    """Points at which the variants did not finish the same requests."""
    sets = defaultdict(set)
    for row in rows:
        sets[key_of(row.settings, without=("variant",))].add(row.figures.get("finished"))
    return [point for point, known in sets.items() if len(known) > 1]


def by_seed(rows: Sequence[Row], figure: str, **where: object) -> dict[object, float]:
    """A figure at the point `where`, by seed. One row a seed, or the point is not one."""
    found: dict[object, float] = {}
    for row in rows:
        value = row.get(figure)
        if row.fits(where) and isinstance(value, int | float):
            assert row.get("seed") not in found, f"{where} names several points"
            found[row.get("seed")] = float(value)
    return found


def paired(
    rows: Sequence[Row], figure: str, over: Mapping[str, object], under: Mapping[str, object]
) -> tuple[float, ...]:
    """`figure` at the point `over` divided by that at `under`, seed by seed."""
    above, below = by_seed(rows, figure, **over), by_seed(rows, figure, **under)
    seeds = sorted(above.keys() & below.keys(), key=str)
    return tuple(above[seed] / below[seed] for seed in seeds if below[seed] > 0)


def mean(values: Iterable[float]) -> float:
    """The mean; nan of nothing."""
    known = list(values)
    return sum(known) / len(known) if known else float("nan")


def outcome_of(num_held: int, num_all: int) -> Outcome:
    """Reproduced where all holds, in part where some does."""
    if num_held == num_all:
        return "reproduced"
    return "in part" if num_held else "not"
