"""What a sweep runs: axes as they are typed, and the grid that is their product.

    rate=0.5:4:0.5          load: requests a second, the trace's own arrivals played faster or slower
    poisson=1,2,4           load: requests a second, Poisson arrivals in place of the trace's
    speed=0.5,1,2           load: so many times as fast as the trace
    replicas=1:4:1          short for fleet.0.replicas; so are policy.route, cache.block_size and the like
    policy.batch=vllm,sglang    another batch policy, and with it what its preset says beside it; a table gives it
                            parameters: policy.batch={name="vllm-v1",max_tokens=512},sglang
    seed=..., net.latency_s=..., fleet.1.replicas=...   any setting by its whole name

Rules
- Values are a list, `a,b,c`, or a range with its end, `from:to:step`. Commas in quotes and brackets separate nothing.
- At most one axis is the load. Every point of the other axes is a variant.
- A batch policy is a part of a published scheduler, and is compared as a whole: the name of a preset (`vllm` is short
  for vllm-v1) sets the preset and every slot in which presets differ, over what the file says. The policy that the file
  itself names keeps the file's parameters. What no preset is named after is put into the batch slot alone.
- Settings are applied in the order of the axes, presets first, so that a parameter can be swept below them.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from penstock.assemble import Config, FleetConfig
from penstock.assemble.presets import PRESETS, policy_tables
from penstock.core.config import set_path
from penstock.core.errors import BadConfig

LOADS = ("rate", "poisson", "speed")
ALIASES = {"vllm": "vllm-v1"}
BATCH = re.compile(r"fleet\.\d+\.policy\.(batch|preset)")
MAX_POINTS = 100_000
HINT = "write NAME=A,B,C or NAME=FROM:TO:STEP, e.g. rate=0.5:4:0.5"
SETTINGS = [each.name for each in dataclasses.fields(Config)]
SHORT = [each.name for each in dataclasses.fields(FleetConfig)]


@dataclass(frozen=True, slots=True)
class Axis:
    """`name` as it was typed, `path` where it leads; values as text. `flag` is for errors."""

    name: str
    path: str
    values: tuple[str, ...]
    flag: str = "--sweep"

    @property
    def is_load(self) -> bool:
        return self.path in LOADS

    @property
    def switches_preset(self) -> bool:
        return BATCH.fullmatch(self.path) is not None


@dataclass(frozen=True, slots=True)
class Spot:
    """One point of a grid, but for the seed: a value for every axis, in their order."""

    values: tuple[tuple[Axis, str], ...]

    @property
    def load(self) -> tuple[str, float] | None:
        """The kind of load and how much of it."""
        return next(
            ((axis.path, float(value)) for axis, value in self.values if axis.is_load), None
        )

    @property
    def variant(self) -> str:
        """What tells it from others at the same load, for people."""
        told = [f"{_short(axis.name)}={value}" for axis, value in self.values if not axis.is_load]
        return ", ".join(told) or "as given"

    def sets(self, config: Config) -> list[str]:
        """Assignments as --set takes them, over what `config` says without them."""
        chosen = [each for each in self.values if not each[0].is_load]
        chosen.sort(key=lambda each: not each[0].switches_preset)
        return [text for axis, value in chosen for text in _assignments(axis, value, config)]


def parse_axis(text: str, flag: str = "--sweep") -> Axis:
    """Read `name=values`. Raises BadConfig that names the part at fault."""
    name, equals, listed = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise BadConfig(f"{flag} {text!r} has no '=' between name and values", hint=HINT)
    where = f"{flag} {name}"
    path = _path(name, where)
    axis = Axis(name, path, _range(listed, where) or _list(listed, where), flag)
    told = [_positive(value, where) if axis.is_load else value for value in axis.values]
    doubled = [value for i, value in enumerate(axis.values) if told[i] in told[:i]]
    if doubled:
        raise BadConfig(f"{where}: {doubled[0]!r} is given twice")
    return axis


def grid(sweeps: Sequence[str], compares: Sequence[str]) -> list[Axis]:
    """The axes of both flags. Raises BadConfig when they do not go together."""
    axes = [parse_axis(text, "--sweep") for text in sweeps]
    axes += [parse_axis(text, "--compare") for text in compares]
    taken: dict[str, Axis] = {}
    for axis in axes:
        if axis.path in taken:
            raise BadConfig(f"{axis.flag} {axis.name}: {axis.path} is an axis already")
        taken[axis.path] = axis
    loads = [axis.name for axis in axes if axis.is_load]
    if len(loads) > 1:
        raise BadConfig(f"a sweep has one load; {' and '.join(loads)} are several")
    num = 1
    for axis in axes:
        num *= len(axis.values)
    if num > MAX_POINTS:
        raise BadConfig(f"the grid has {num:,} points; {MAX_POINTS:,} is the most")
    return axes


def spots(axes: Sequence[Axis]) -> Iterator[Spot]:
    """The product of the axes, the load changing fastest."""
    ordered = sorted(axes, key=lambda axis: axis.is_load)
    for chosen in itertools.product(*(axis.values for axis in ordered)):
        yield Spot(tuple(zip(ordered, chosen, strict=True)))


def _path(name: str, where: str) -> str:
    first = name.partition(".")[0]
    if name in LOADS or first in SETTINGS:
        return name
    if first in SHORT:
        return f"fleet.0.{name}"
    near = difflib.get_close_matches(first, [*LOADS, *SHORT, *SETTINGS], n=1)
    known = f"did you mean {near[0]!r}?" if near else f"loads: {', '.join(LOADS)}"
    raise BadConfig(
        f"{where}: there is no setting {first!r}; {known}",
        hint="name a load, a key of the first fleet (replicas, policy.route) or a whole path as --set has it",
    )


def _range(text: str, where: str) -> tuple[str, ...] | None:
    """None when the text is no range of numbers."""
    parts = text.split(":")
    try:
        numbers = [Decimal(part.strip()) for part in parts]
    except InvalidOperation:
        return None
    if len(numbers) == 1:
        return None
    if len(numbers) != 3 or not all(number.is_finite() for number in numbers):
        raise BadConfig(f"{where}: {text!r} is no range", hint=HINT)
    low, high, step = numbers
    if step <= 0 or high < low:
        raise BadConfig(
            f"{where}: the range {text!r} goes nowhere",
            hint="FROM:TO:STEP rises by a positive step",
        )
    num = int((high - low) / step) + 1
    if num > MAX_POINTS:
        raise BadConfig(
            f"{where}: the range {text!r} has {num:,} values", hint="take a larger step"
        )
    return tuple(_plain(low + step * i) for i in range(num))


def _plain(number: Decimal) -> str:
    """Without an exponent and needless zeros: 2, 0.5, 100."""
    told = f"{number:f}"
    return told.rstrip("0").rstrip(".") if "." in told else told


def _list(text: str, where: str) -> tuple[str, ...]:
    values, depth, quote, start = [], 0, "", 0
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            values.append(text[start:i].strip())
            start = i + 1
    values.append(text[start:].strip())
    if not all(values):
        raise BadConfig(f"{where}: a value is missing in {text!r}", hint=HINT)
    return tuple(values)


def _positive(value: str, where: str) -> float:
    try:
        load = float(value)
    except ValueError:
        load = 0.0
    if not 0 < load < float("inf"):
        raise BadConfig(f"{where}: a load is a positive number, {value!r} is not", hint=HINT)
    return load


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _assignments(axis: Axis, value: str, config: Config) -> list[str]:
    name = _name_of(value)
    if not axis.switches_preset or name not in PRESETS:
        return [f"{axis.path}={value}"]
    place, _, slot = axis.path.rpartition(".")
    told = []
    index = int(place.split(".")[1])
    if index >= len(config.fleet) or name != _batch_of(config.fleet[index]):
        told.append(f"{place}.preset={name}")
        for each, chosen in PRESETS[name].items():
            if len({preset.get(each) for preset in PRESETS.values()}) > 1:
                told.append(f"{place}.{each}={chosen}")
    return [*told, f"{place}.{slot}={value}"] if value.startswith("{") else told


def _name_of(value: str) -> object:
    """Of a policy, from its bare name or its table."""
    read: dict[str, object] = {}
    set_path(read, f"policy={value}")
    policy = read["policy"]
    name = policy.get("name") if isinstance(policy, dict) else policy
    return ALIASES.get(name, name) if isinstance(name, str) else None


def _batch_of(fleet: FleetConfig) -> object:
    return policy_tables(fleet.policy, fleet.cache.prefix)["batch"]["name"]
