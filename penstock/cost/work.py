"""What a step moves and computes, whatever runs it: a function of the model's shape and of the step's sums."""

from __future__ import annotations

from penstock.cost.shapes import ModelShape
from penstock.cost.step import StepFeatures


def work_of(shape: ModelShape, features: StepFeatures) -> tuple[float, float]:
    """(bytes moved, flops done) over all devices: weights once a step, keys and values read and written."""
    part = (features.layers or shape.layers) / shape.layers
    head = shape.head_params if features.num_samples else 0
    weights = part * shape.layers * shape.layer_params + head
    context = features.decode_context + features.prefill_context + features.num_tokens
    num_bytes = weights * shape.weight_item_bytes + part * shape.kv_bytes * context
    pairs = features.decode_context + features.prefill_pairs
    flops = 2 * features.num_tokens * part * shape.layers * shape.layer_params
    flops += 2 * features.num_samples * shape.head_params
    flops += 4 * shape.heads * shape.head_dim * part * shape.layers * pairs
    return num_bytes, flops
