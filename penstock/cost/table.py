"""Step time from operator latency tables: what was measured kernel by kernel, added up.

    step = once(T) + layers x (norms, projections, activation)(T) + layers x attention + head(samples)
           + 2 x layers x all-reduce(T) + host

T = tokens of the step, padded up to the size of a captured graph where the engine has one. Attention: see
cost.attention_table. Experts: cost.coverage says how many distinct ones T tokens reach, the table what that costs.
Communication: the tables', or alpha-beta of the card's links. Host: cost.engines, by engine version.

Tables know decodes of equal length only. Unequal ones keep some of the device waiting for the longest:

    attention = t(mean) + alpha (t(longest) - t(mean))

with one alpha a table, the median of its published fits over steps of decodes. By bucket those fits scatter (on one
card alpha is .02, .2 and .07 for 16, 32 and 64 decodes); beside a prefill from -4 to 5, so there it is left out.

A step of decodes is linear, piece by piece, in C, the sum of contexts, and M, the longest one:

    seconds = base + per_context * C + per_longest * M

The pieces change where mean or longest context pass a measured point. Borders are compared in whole numbers, so a run
of steps and the same steps one by one are cut at the same places and give the same floats.

Shares: tables were measured on the whole device. A lane with a share of it is slowed as a whole by 1/share, which is
pessimistic for what memory bounds.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np

from penstock.core.errors import BadConfig
from penstock.cost.coverage import Coverage, coverage_of
from penstock.cost.engines import Engine
from penstock.cost.hardware import Card
from penstock.cost.op_tables import EACH_LAYER, OpTables
from penstock.cost.shapes import ModelShape
from penstock.cost.step import FEW, StepCost, StepFeatures
from penstock.cost.work import work_of


@dataclass(frozen=True, slots=True)
class Plane:
    """Coefficients of a piece, and for how many steps in a row from here they hold (None: for ever)."""

    base: float
    per_context: float
    per_longest: float
    steps: int | None


class TableModel:
    """Prices steps of one model on `tp` cards from the tables of one of them."""

    def __init__(
        self,
        tables: OpTables,
        shape: ModelShape,
        card: Card,
        *,
        tp: int = 1,
        engine: Engine | None = None,
        coverage: Coverage | None = None,
    ) -> None:
        if tables.sums is None:
            card.all_reduce_s(0.0, tp)  # refuse an unknown link size now, not in the first step
        self.tables, self.shape, self.card, self.tp = tables, shape, card, tp
        self.engine = engine or Engine()
        if tables.is_mixture == (shape.experts is None):
            kinds = ("a dense model", "a mixture of experts")
            raise BadConfig(
                f"the tables {tables.name} are of {kinds[tables.is_mixture]}, "
                f"but {shape.name} is {kinds[shape.experts is not None]}"
            )
        self.coverage = coverage or coverage_of(shape)
        self._dense: dict[int, float] = {}
        self._head: dict[int, float] = {}

    @property
    def name(self) -> str:
        engine = f", {self.engine.name}" if self.engine.name else ""
        return f"operator tables {self.tables.name} [{self.tables.digest}] on {self.tp} x {self.card.name}{engine}"

    @property
    def digest(self) -> str:
        parts = (self.tables.digest, self.shape, self.card, self.tp, self.engine, self.coverage)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    # ------------------------------------------------------------------ seconds

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        context, longest = features.decode_context, features.max_decode_context
        if features.num_prefills:
            return self._mixed_s(features) / share
        plane = self._plane(features, context, longest)
        return (plane.base + plane.per_context * context + plane.per_longest * longest) / share

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        num = features.num_decodes
        found: list[float] = []
        first, longest = features.decode_context, features.max_decode_context
        while len(found) < count:
            plane = self._plane(features, first, longest)
            steps = min(count - len(found), plane.steps or count)
            found += _line(plane, first, longest, num, steps, share)
            first, longest = first + steps * num, longest + steps
        return found

    def _plane(self, features: StepFeatures, context: int, longest: int) -> Plane:
        """The piece of a step without prefills at these contexts."""
        num = features.num_decodes
        layers = features.layers or self.shape.layers
        fixed = self._fixed_s(features, layers)
        if not num:
            return Plane(fixed, 0.0, 0.0, None)
        alpha = self.tables.alpha
        line = self.tables.attention.decodes(num)
        offset, slope, corner = line.segment(context // num)
        top_offset, top_slope, top_corner = line.segment(longest)
        steps = None if corner is None else corner - context // num
        if top_corner is not None and (steps is None or top_corner - longest < steps):
            steps = top_corner - longest
        base = fixed + layers * ((1 - alpha) * offset + alpha * top_offset)
        per_context = layers * (1 - alpha) * slope / num
        return Plane(base, per_context, layers * alpha * top_slope, steps)

    def _mixed_s(self, features: StepFeatures) -> float:
        layers = features.layers or self.shape.layers
        num = features.num_decodes
        mean = features.decode_context / num if num else 0.0
        tokens = features.num_tokens - num
        attention = self.tables.attention.mixed(tokens, features.prefill_pairs, num, mean)
        return self._fixed_s(features, layers) + layers * attention

    def _fixed_s(self, features: StepFeatures, layers: int) -> float:
        """What does not depend on contexts."""
        tokens, engine = features.num_tokens, self.engine
        dense = self._dense.get(tokens)
        if dense is None:
            dense = self._dense[tokens] = self._layer_s(engine.padded(tokens))
        samples = features.num_samples
        head = self._head.get(samples)
        if head is None:
            head = self._head[samples] = self._head_s(samples)
        part = layers / self.shape.layers
        host = engine.step_s + (engine.prefill_s if features.num_prefills else 0.0)
        return layers * dense + head + part * (host + features.num_jobs * engine.job_s)

    def _layer_s(self, tokens: int) -> float:
        """One layer without attention, with its share of what a step does once."""
        tables, shape = self.tables, self.shape
        seconds = math.fsum(
            EACH_LAYER.get(name, 1) * line(tokens) for name, line in tables.layer.items()
        )
        seconds += math.fsum(line(tokens) for line in tables.once.values()) / shape.layers
        if tables.experts is not None and self.coverage is not None:
            seconds += tables.experts(tokens, self.coverage.distinct(tokens))
        reduced = tokens * shape.hidden * shape.weight_item_bytes
        sums = tables.sums or functools.partial(self.card.all_reduce_s, devices=self.tp)
        return seconds + 2 * sums(reduced)

    def _head_s(self, samples: int) -> float:
        return math.fsum(line(samples) for line in self.tables.head.values()) if samples else 0.0

    # ------------------------------------------------------------------ the rest

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        time_s = self.seconds(features, share)
        layers = features.layers or self.shape.layers
        head = self._head_s(features.num_samples) / share
        fixed = self._fixed_s(features, layers) / share
        parts = (("layers and host", fixed - head), ("head", head), ("attention", time_s - fixed))
        whole = work_of(self.shape, features, self.coverage)
        num_bytes, flops = whole[0] / self.tp, whole[1] / self.tp
        watts = self.card.watts(
            num_bytes / time_s / self.card.bandwidth, flops / time_s / self.card.flops
        )
        return StepCost(time_s, watts * time_s * self.tp, num_bytes, flops, parts)


def _line(
    plane: Plane, context: int, longest: int, num: int, count: int, share: float
) -> list[float]:
    """Seconds of `count` steps on one plane, contexts growing: the same operations in the same order as one step."""
    base, slope, rise = plane.base, plane.per_context, plane.per_longest
    contexts = range(context, context + count * num, num) if num else (context,) * count
    tops = range(longest, longest + count)
    if count <= FEW:
        pairs = zip(contexts, tops, strict=True)
        return [(base + slope * all_ + rise * top) / share for all_, top in pairs]
    line = slope * np.asarray(contexts, dtype=np.float64)
    line += base
    line += rise * np.asarray(tops, dtype=np.float64)
    line /= share
    seconds: list[float] = line.tolist()
    return seconds
