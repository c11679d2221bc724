"""Step time from peaks and measured efficiencies: a roofline with floors. No data of the model at hand is needed.

For m rows through weights of w parameters on g devices, with peak F, bandwidth B, shares x of the device:

    gemm(m, w)   = max( 2 m w / (g x F mfu(m)),  w * item_bytes / (g B' mbu) )          B' = B min(1, x / 0.4)
    experts      = max( 2 m k w_e / (g x F mfu(m k / E_m)),  E_m w_e item_bytes / (g B' mbu) )
    decode       = kv_bytes * context / (g B' mbu_a) + skew, and a floor for each layer
    prefill      = 4 H d layers * pairs / (g x F mfu_a(size)), and a floor for each layer; size = sqrt(2 pairs / chunks)
    elementwise  = m * layers * (8 h + 3 f / g) * item_bytes / B'         two residual norms, one gated activation
    all-reduce   = 2 layers * (alpha + 2 (g-1)/g * m h item_bytes / B_link)
    host         = launches of kernels + a constant for each job

In a layer with a window, a context is no longer than that and a query sees no more keys (model_shape.py); the line over
contexts bends where their mean reaches it, and a run of steps is cut there.

A mixture of experts passes k experts of w_e weights for each of m rows and reads E_m of them (cost.coverage); each is
a product of its own, of m k / E_m rows.

Host constants: 3 us a kernel and 8 kernels a layer come to the 0.7 ms that a fit on published H100 runs of 8B models
gives; the same fit gives 15 us for each sequence (scheduler and sampler of vLLM). They belong to an engine, not to a
card. Beside three published runs of vLLM, with nothing fitted to them, mean TPOT came out 10.5 % too high, 4.3 % and
7.7 % too low (`penstock bench gate`): rank plans with it, take tables or calibrate before believing less than that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass

from penstock.cost.coverage import Coverage, coverage_of
from penstock.cost.hardware import FULL_BANDWIDTH_SHARE, Card, curve
from penstock.cost.shapes import ModelShape
from penstock.cost.step import StepCost, StepFeatures, line_of_steps
from penstock.cost.work import decode_context, prefill_pairs, work_of

PARTS = (
    "layers", "head", "decode attention", "prefill attention", "elementwise", "all-reduce", "host",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the engine around the kernels takes."""

    launch_s: float = 3e-6
    launches_per_layer: int = 8
    per_job_s: float = 15e-6


class Roofline:
    """Prices steps of one model shape on `tp` cards of a kind."""

    def __init__(
        self,
        shape: ModelShape,
        card: Card,
        *,
        tp: int = 1,
        host: Host | None = None,
        coverage: Coverage | None = None,
    ) -> None:
        card.all_reduce_s(0.0, tp)  # refuse an unknown link size now, not in the first step
        self.shape, self.card, self.tp, self.host = shape, card, tp, host or Host()
        self.coverage = coverage or coverage_of(shape)
        # Of decode steps, of numbers of rows and of samples: as many entries as batches have sizes.
        self._lines: dict[tuple[int, int, int | None, float], tuple[float, float]] = {}
        self._rows: dict[tuple[int, int, float], tuple[float, float, float]] = {}
        self._head: dict[tuple[int, float], float] = {}
        self._per_context: dict[tuple[int | None, float], float] = {}

    @property
    def name(self) -> str:
        return f"roofline of {self.shape.name} on {self.tp} x {self.card.name}"

    @property
    def digest(self) -> str:
        parts = (self.shape, self.card, self.host)
        told = repr([dataclasses.astuple(part) for part in parts] + [self.tp, self.coverage])
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        fixed, per_context = self._line(features, share)
        return fixed + per_context * features.decode_context

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        narrow = self._steps_within_window(features)
        if 0 < narrow < count:
            first = line_of_steps(features, narrow, *self._line(features, share))
            return first + self.run_seconds(features.grown(narrow), count - narrow, share)
        return line_of_steps(features, count, *self._line(features, share))

    def _steps_within_window(self, features: StepFeatures) -> int:
        """How many steps of a run the mean context stays below the window; after them another line holds."""
        if self.shape.window is None or not features.num_decodes:
            return 0
        left = self.shape.window * features.num_decodes - features.decode_context
        return max(0, -(-left // features.num_decodes))

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        time_s = self.seconds(features, share)
        breakdown = dict(zip(PARTS, self._parts(features, share), strict=True))
        breakdown["decode attention"] += self._slope(features.layers, share) * decode_context(
            self.shape, features
        )
        whole = work_of(self.shape, features, self.coverage)
        num_bytes, flops = whole[0] / self.tp, whole[1] / self.tp
        watts = self.card.watts(
            num_bytes / time_s / self.card.bandwidth, flops / time_s / self.card.flops
        )
        energy_j = watts * time_s * self.tp
        return StepCost(time_s, energy_j, num_bytes, flops, tuple(breakdown.items()))

    def _line(self, features: StepFeatures, share: float) -> tuple[float, float]:
        """(fixed, slope): a step takes fixed + slope * decode_context. Decode steps hit the memory of `fixed`."""
        tokens, _, samples, _, _, _, prefills, _, _, layers = features
        if prefills:
            fixed, slope = self._fixed_s(features, share), self._slope(layers, share)
        else:
            key = (tokens, samples, layers, share)
            known = self._lines.get(key)
            if known is None:
                known = self._fixed_s(features, share), self._slope(layers, share)
                self._lines[key] = known
            fixed, slope = known
        whole = slope
        if self.card.skew:
            # What depends on contexts only through their spread does not change within a run.
            spread = features.max_decode_context * features.num_decodes - features.decode_context
            fixed += whole * self.card.skew * spread
        window = self.shape.window
        if window is not None and features.decode_context >= window * features.num_decodes:
            share_of_windows = self.shape.window_layers / self.shape.layers
            fixed += whole * share_of_windows * window * features.num_decodes
            slope = whole * (1.0 - share_of_windows)
        return fixed, slope

    def _fixed_s(self, features: StepFeatures, share: float) -> float:
        """The sum of the parts. Not sum(): from Python 3.12 on it rounds otherwise, and digests would differ."""
        layers, head, decode, prefill, elementwise, reduce, host = self._parts(features, share)
        return layers + head + decode + prefill + elementwise + reduce + host

    def _slope(self, layers: int | None, share: float) -> float:
        key = (layers, share)
        slope = self._per_context.get(key)
        if slope is None:
            kv_bytes = self.shape.kv_bytes * (layers or self.shape.layers) / self.shape.layers
            speed = self.tp * self._bandwidth(share) * self.card.decode_attention_mbu
            slope = self._per_context[key] = kv_bytes / speed
        return slope

    def _bandwidth(self, share: float) -> float:
        return self.card.bandwidth * min(1.0, share / FULL_BANDWIDTH_SHARE)

    def _parts(self, features: StepFeatures, share: float) -> tuple[float, ...]:
        """Seconds by part, named by PARTS, without what grows with the decodes' contexts."""
        layers, samples = features.layers or self.shape.layers, features.num_samples
        products, elementwise, reduce = self._of_rows(features.num_tokens, layers, share)
        head = self._head.get((samples, share))
        if head is None:
            head = self._gemm(samples, self.shape.head_params, share)
            self._head[samples, share] = head
        return (
            products,
            head,
            layers * self.card.attention_floor_s if features.num_decodes else 0.0,
            self._prefill_s(features, layers, share),
            elementwise,
            reduce,
            layers * self.host.launches_per_layer * self.host.launch_s
            + features.num_jobs * self.host.per_job_s,
        )

    def _of_rows(self, rows: int, layers: int, share: float) -> tuple[float, float, float]:
        """Matrix products, elementwise work and all-reduces, which the number of rows decides; remembered."""
        key = (rows, layers, share)
        found = self._rows.get(key)
        if found is None:
            shape = self.shape
            taken = (shape.top_k or 0) * (shape.expert_ffn or 0) + (shape.shared_ffn or 0)
            ffn = shape.ffn if shape.top_k is None else taken
            wide = layers * (8 * shape.hidden + 3 * ffn / self.tp) * shape.weight_item_bytes
            row_bytes = rows * shape.hidden * shape.weight_item_bytes
            found = self._rows[key] = (
                layers * self._layer_s(rows, share),
                rows * wide / self._bandwidth(share),
                2 * layers * self.card.all_reduce_s(row_bytes, self.tp),
            )
        return found

    def _layer_s(self, rows: int, share: float) -> float:
        """The matrix products of one layer."""
        shape = self.shape
        if self.coverage is None:
            return self._gemm(rows, shape.layer_params, share)
        seconds = self._gemm(rows, shape.fixed_params, share)
        reached, passed = self.coverage.distinct(rows), rows * (shape.top_k or 0)
        return seconds + shape.expert_share * self._product_s(
            passed / reached, passed * shape.expert_params, reached * shape.expert_params, share
        )

    def _gemm(self, rows: int, params: float, share: float) -> float:
        return self._product_s(rows, rows * params, params, share) if rows else 0.0

    def _product_s(self, rows: float, multiplied: float, read: float, share: float) -> float:
        """Products of `rows` rows each: weights `multiplied`, over all rows, and `read`."""
        card = self.card
        flops_s = 2 * multiplied / (self.tp * share * card.flops * curve(card.gemm_mfu, rows))
        num_bytes = read * self.shape.weight_item_bytes
        return max(flops_s, num_bytes / (self.tp * self._bandwidth(share) * card.gemm_mbu))

    def _prefill_s(self, features: StepFeatures, layers: int, share: float) -> float:
        if not features.num_prefills:
            return 0.0
        shape, card = self.shape, self.card
        size = math.sqrt(2 * features.prefill_pairs / features.num_prefills)
        flops = shape.pair_flops * layers * prefill_pairs(shape, features)
        speed = self.tp * share * card.flops * curve(card.prefill_attention_mfu, size)
        return flops / speed + layers * card.attention_floor_s
