"""What a step moves and computes, whatever runs it: a function of the model's shape and of the step's sums."""

from __future__ import annotations

from penstock.cost.coverage import Coverage, coverage_of
from penstock.cost.shapes import ModelShape
from penstock.cost.step import StepFeatures


def work_of(
    shape: ModelShape, features: StepFeatures, coverage: Coverage | None = None
) -> tuple[float, float]:
    """(bytes moved, flops done) over all devices: weights once a step, keys and values read and written."""
    layers = features.layers or shape.layers
    part = layers / shape.layers
    head = shape.head_params if features.num_samples else 0
    weights = layers * read_params(shape, features.num_tokens, coverage) + head
    context = features.decode_context + features.prefill_context + features.num_tokens
    num_bytes = weights * shape.weight_item_bytes + part * shape.kv_bytes * context
    pairs = features.decode_context + features.prefill_pairs
    flops = 2 * features.num_tokens * layers * shape.layer_params
    flops += 2 * features.num_samples * shape.head_params
    flops += 4 * shape.heads * shape.head_dim * layers * pairs
    return num_bytes, flops


def read_params(shape: ModelShape, tokens: int, coverage: Coverage | None = None) -> float:
    """Weights of one layer that a step of `tokens` reads: in a mixture, those of the experts that it reaches."""
    if shape.experts is None:
        return shape.layer_params
    coverage = coverage or coverage_of(shape)
    assert coverage is not None
    reached = coverage.distinct(tokens) * shape.expert_params
    return shape.attention_params + shape.router_params + reached
