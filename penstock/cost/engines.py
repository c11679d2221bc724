"""What engines add to the kernels, by version: a dated data file (engines.toml says what its keys mean)."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from penstock.core.config import build, load_toml
from penstock.core.errors import BadConfig
from penstock.core.schema import check_schema

COSTS = ("step_s", "prefill_s", "job_s", "first_step_s")
ENGINES = Path(__file__).with_name("engines.toml")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One version of one engine. The default adds nothing."""

    name: str = "kernels alone"
    as_of: str = ""
    source: str = "nothing is added"
    step_s: float = 0.0
    prefill_s: float = 0.0
    job_s: float = 0.0
    first_step_s: float = 0.0
    graph_sizes: tuple[tuple[int, int, int], ...] = ()
    _sizes: tuple[int, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        sizes = sorted(
            at for first, last, by in self.graph_sizes for at in range(first, last + 1, by)
        )
        object.__setattr__(self, "_sizes", tuple(sizes))

    def with_costs(self, costs: Mapping[str, float]) -> Engine:
        """This engine with some of its seconds changed. Raises BadConfig for what is no cost."""
        for name, seconds in costs.items():
            if name not in COSTS:
                raise BadConfig(f"engine_costs has no {name!r}; known: {', '.join(COSTS)}")
            if not seconds >= 0:
                raise BadConfig(f"engine_costs.{name} must be 0 or more seconds, got {seconds}")
        return replace(self, **costs) if costs else self  # type: ignore[arg-type]

    def padded(self, tokens: int) -> int:
        """Tokens that the kernels of a step of `tokens` compute."""
        sizes = self._sizes
        if not sizes or tokens > sizes[-1]:
            return tokens
        return sizes[bisect_left(sizes, tokens)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    schema: int
    engine: tuple[Engine, ...]


@functools.cache
def read_engines(path: Path = ENGINES) -> dict[str, Engine]:
    table = load_toml(path)
    schema = table.get("schema")
    check_schema(str(path), schema if isinstance(schema, int) else 0)
    return {engine.name: engine for engine in build(Engines, table).engine}


def engine_of(name: str) -> Engine:
    known = read_engines()
    if name not in known:
        raise BadConfig(f"no engine is known as {name!r}; known: {', '.join(sorted(known))}")
    return known[name]
