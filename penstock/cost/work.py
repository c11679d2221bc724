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
    context = read_context(shape, features) + features.num_tokens
    num_bytes = weights * shape.weight_item_bytes + part * shape.kv_bytes * context
    pairs = decode_context(shape, features) + prefill_pairs(shape, features)
    flops = 2 * features.num_tokens * layers * shape.layer_params
    flops += 2 * features.num_samples * shape.head_params
    flops += shape.pair_flops * layers * pairs
    return num_bytes, flops


def decode_context(shape: ModelShape, features: StepFeatures) -> float:
    """Positions that decodes read in a layer, on average over the layers."""
    limit = (shape.window or 0) * features.num_decodes
    return shape.seen(features.decode_context, limit)


def prefill_pairs(shape: ModelShape, features: StepFeatures) -> float:
    """Pairs of prefill chunks: with a window, a token sees no more than that."""
    tokens = features.num_tokens - features.num_decodes
    return shape.seen(features.prefill_pairs, (shape.window or 0) * tokens)


def read_context(shape: ModelShape, features: StepFeatures) -> float:
    """Positions whose keys and values are read: a chunk reads its own and the window before it."""
    tokens = features.num_tokens - features.num_decodes
    limit = (shape.window or 0) * features.num_prefills + tokens
    return decode_context(shape, features) + shape.seen(features.prefill_context, limit)


def read_params(shape: ModelShape, tokens: int, coverage: Coverage | None = None) -> float:
    """Weights of one layer that a step of `tokens` reads: in a mixture, those of the experts that it reaches."""
    if shape.experts is None:
        return shape.layer_params
    coverage = coverage or coverage_of(shape)
    assert coverage is not None
    reached = coverage.distinct(tokens) * shape.expert_params
    return shape.fixed_params + shape.expert_share * reached
