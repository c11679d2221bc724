"""Fitted generators that a workload may name in place of arrivals and lengths.

[model]
kind = "burstgpt"                # BurstGPT's generator as fitted by `penstock trace fit` (see traffic.burst_model)
path = "model.json"              # without a path: as its authors publish it
[model]
kind = "servegen"                # ServeGen's clients, replayed; further keys are those of traffic.servegen.ServeGen
folder = "servegen/m-large"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from penstock.core.config import Table, build
from penstock.core.errors import BadConfig
from penstock.traffic.burst_model import BurstGptModel
from penstock.traffic.rows import Row
from penstock.traffic.servegen import ServeGen


class Opened(Protocol):
    @property
    def mean_rate_per_s(self) -> float: ...

    def rows(self, seed: int) -> Iterator[Row]: ...


class Model(Protocol):
    def open(self) -> Opened:
        """Read its files. Raises BadTrace."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstGpt:
    """`factor`: so many times the arrivals in the same windows."""

    path: Path | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor must be positive, got {self.factor}")

    def open(self) -> BurstGptModel:
        found = BurstGptModel.published() if self.path is None else BurstGptModel.load(self.path)
        return found if self.factor == 1.0 else found.times(self.factor)


def model_of(table: Table, where: str) -> Model:
    """The model as described; its files are not read yet. Raises BadConfig."""
    rest = dict(table)
    kind = rest.pop("kind", None)
    if kind == "burstgpt":
        return build(BurstGpt, rest, where)
    if kind == "servegen":
        return build(ServeGen, rest, where)
    raise BadConfig(f"{where}.kind must be 'burstgpt' or 'servegen'; got {kind!r}")
