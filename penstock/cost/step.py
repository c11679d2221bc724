"""What a step costs, and what its cost depends on.

A step is reduced once to a handful of sums; every model is a function of these. In a run of identical decode steps
only the contexts change: each decode reads one position more than in the step before, so the sums of step i are
arithmetic progressions of i and a model prices the whole run at once:

    decode_context(i) = decode_context + i * num_decodes

Contract of a StepModel: `run_seconds(f, n)[i] == seconds(f.grown(i))`, bit for bit, so that a simulator which runs n
steps as one launch writes the same instants as one that runs them singly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from penstock.core.plans import Work


class StepFeatures(NamedTuple):
    """Sums over the chunks of one lane. A decode is a chunk of one token; the rest is prefill.

    decode_context: positions whose KV the decodes read, their own included. prefill_pairs: (query, key) pairs of
    the prefill chunks under a causal mask. prefill_context: positions whose KV the prefill chunks read.
    layers: through how many layers, None = the whole model.
    """

    num_tokens: int
    num_jobs: int
    num_samples: int
    num_decodes: int = 0
    decode_context: int = 0
    max_decode_context: int = 0
    num_prefills: int = 0
    prefill_pairs: int = 0
    prefill_context: int = 0
    layers: int | None = None

    def grown(self, steps: int) -> StepFeatures:
        """The features of the step `steps` later in a run of identical decode steps."""
        tokens, jobs, samples, decodes, context, longest, prefills, pairs, prefilled, layers = self
        context += steps * decodes
        longest += steps
        return StepFeatures(
            tokens, jobs, samples, decodes, context, longest, prefills, pairs, prefilled, layers
        )


def features_of(pieces: Iterable[tuple[int, int, int]], layers: int | None = None) -> StepFeatures:
    """Reduce (start, tokens, samples) triples; `samples`: rows of logits, so True is one of them."""
    num_tokens = num_jobs = num_samples = 0
    num_decodes = decode_context = longest = 0
    num_prefills = pairs = context = 0
    for start, tokens, samples in pieces:
        num_jobs += 1
        num_tokens += tokens
        end = start + tokens
        num_samples += samples
        if tokens == 1:
            num_decodes += 1
            decode_context += end
            if end > longest:
                longest = end
            continue
        num_prefills += 1
        pairs += start * tokens + tokens * (tokens + 1) // 2
        context += end
    return StepFeatures(
        num_tokens, num_jobs, num_samples, num_decodes, decode_context, longest,
        num_prefills, pairs, context, layers,
    )  # fmt: skip


FEW = 100  # steps up to which plain floats are faster than arrays


def line_of_steps(
    features: StepFeatures, count: int, fixed_s: float, per_context_s: float
) -> list[float]:
    """fixed_s + per_context_s * decode_context, of each step of a run of decodes."""
    first, each = features.decode_context, features.num_decodes
    if count <= FEW:
        contexts = range(first, first + count * each, each) if each else (first,) * count
        return [fixed_s + per_context_s * context for context in contexts]
    line = np.arange(count, dtype=np.float64)
    line *= each
    line += first
    line *= per_context_s
    line += fixed_s
    found: list[float] = line.tolist()
    return found


def layer_segments(work: Sequence[Work], num_layers: int) -> list[StepFeatures]:
    """One entry for each run of layers that the same chunks pass; layered plans differ from layer to layer."""
    ranges = [(item, item.layers or (0, num_layers)) for item in work]
    borders = sorted({border for _, layers in ranges for border in layers})
    segments = []
    for first, end in zip(borders, borders[1:], strict=False):
        inside = [
            (item.start, item.tokens, item.samples and end == num_layers)
            for item, (low, high) in ranges
            if low <= first and end <= high
        ]
        if inside:
            segments.append(features_of(inside, end - first))
    return segments


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step: `energy_j` over all devices, `num_bytes` and `flops` of one device; `breakdown` sums to `time_s`.

    None = not known to this model.
    """

    time_s: float
    energy_j: float | None
    num_bytes: float | None
    flops: float | None
    breakdown: tuple[tuple[str, float], ...] = ()


class StepModel(Protocol):
    """Prices steps. `name` and `digest` tell which model with which constants; reports and logs carry them."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float: ...

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        """Durations of `count` identical decode steps in a row, contexts growing by one each.

        A list for the caller to keep.
        """
        ...

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost: ...
