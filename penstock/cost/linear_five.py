"""Step times of the DistServe simulator: a prompt step is quadratic, a decode step linear, five numbers each way.

    prompts    A + B sum(L) + C sum(L^2)        a chunk from position s on: C ((s + L)^2 - s^2)
    decodes    a + b contexts + c jobs          other numbers from `many_from` jobs on
    any        + step + token * positions held

A step of both kinds, which the publication does not have, costs the larger constant once and the other terms of both.
Published numbers (linear_five.toml) are fits to two engines on A100-80G. Energy, bytes and flops are not known.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from penstock.core.config import build, load_toml
from penstock.core.errors import BadConfig
from penstock.core.schema import check_schema
from penstock.cost.step import StepCost, StepFeatures, line_of_steps

FILE = Path(__file__).with_name("linear_five.toml")
MS = 1e-3
LINEAR_CARD = "a100-80g"
LINEAR_TABLES = {
    "distserve": "distserve",
    "distserve-vllm": "vllm",
}  # executor.tables: the engine that was measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """Of one engine with one model on `tp` devices, in milliseconds; see the file's head."""

    engine: str
    model: str
    tp: int
    prefill: tuple[float, float, float]
    few: tuple[float, float, float]
    many: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFiveFile:
    schema: int
    as_of: str
    source: str
    card: str
    step_ms: float
    token_ms: float
    many_from: int
    row: tuple[Coefficients, ...]


@functools.cache
def read_linear_five(path: Path = FILE) -> LinearFiveFile:
    table = load_toml(path)
    schema = table.get("schema")
    check_schema(str(path), schema if isinstance(schema, int) else 0)
    return build(LinearFiveFile, table)


class LinearFive:
    """A StepModel of one row."""

    def __init__(self, row: Coefficients, file: LinearFiveFile, num_layers: int) -> None:
        self.row, self._file, self._num_layers = row, file, num_layers

    @property
    def name(self) -> str:
        row = self.row
        return f"published fit of {row.engine}'s {row.model} on {row.tp} x {self._file.card} (DistServe)"

    @property
    def digest(self) -> str:
        told = repr((self.row, self._file.step_ms, self._file.token_ms, self._file.many_from))
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        fixed, slope = self._line(features, share)
        return fixed + slope * features.decode_context

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return line_of_steps(features, count, *self._line(features, share))

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        time_s = self.seconds(features, share)
        return StepCost(time_s, None, None, None, (("fitted", time_s),))

    def overhead_s(self, features: StepFeatures) -> float:
        """Of the engine around the kernels: once a step, whatever the pipeline's depth."""
        held = features.decode_context + features.prefill_context
        return MS * (self._file.step_ms + self._file.token_ms * held)

    def _line(self, features: StepFeatures, share: float) -> tuple[float, float]:
        """(fixed, slope): a step takes fixed + slope * decode_context."""
        constant = rest = slope = 0.0
        if features.num_prefills:
            first, each, square = self.row.prefill
            tokens = features.num_tokens - features.num_decodes
            constant = first
            rest = each * tokens + square * (2 * features.prefill_pairs - tokens)
        if features.num_decodes:
            is_many = features.num_decodes >= self._file.many_from
            first, slope, each = self.row.many if is_many else self.row.few
            constant = max(constant, first)
            rest += each * features.num_decodes
        part = 1.0 if features.layers is None else features.layers / self._num_layers
        scale = MS * part / share
        token = MS * self._file.token_ms
        around = part * MS * self._file.step_ms + token * features.prefill_context
        return scale * (constant + rest) + around, scale * slope + token


def linear_five(
    engine: str, model: str, tp: int, *, num_layers: int, path: Path = FILE
) -> LinearFive:
    """The published row. Raises BadConfig that names those there are."""
    file = read_linear_five(path)
    for row in file.row:
        if (row.engine, row.model, row.tp) == (engine, model, tp):
            return LinearFive(row, file, num_layers)
    known = ", ".join(
        sorted({f"{row.model} at tp {row.tp}" for row in file.row if row.engine == engine})
    )
    raise BadConfig(
        f"nobody published steps of {model} at tp {tp} under {engine}; known: {known or 'none'}",
        hint="leave the table out, and the card's roofline is taken",
    )


def degrees_of(engine: str, model: str, path: Path = FILE) -> tuple[int, ...]:
    """Tensor parallel degrees that have a row."""
    rows = read_linear_five(path).row
    return tuple(sorted(row.tp for row in rows if (row.engine, row.model) == (engine, model)))
