"""Times of a layer's operators from the cost models there are: the roofline, and operator tables.

Both are exact parts of their step model: the operators of an uncut batch, one after the other, add up to what the model
says of a step, less LM head and host. Mixtures of experts are refused: which experts a nano-batch reaches is another
question.
"""

from __future__ import annotations

import functools
import math

from penstock.core.errors import BadConfig
from penstock.cost.hardware import curve
from penstock.cost.nano_layer import LayerTimes
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import ModelShape
from penstock.cost.step import StepModel
from penstock.cost.table import TableModel

TABLE_NAMES = {  # rows of operator tables that each product takes with it, and how often
    "qkv": {"layernorm": 1, "qkv_proj": 1, "qk_norm": 1, "rotary_emb": 1},
    "out": {"o_proj": 1},
    "gate up": {"layernorm": 1, "gate_up_proj": 1},
    "down": {"act_fn": 1, "down_proj": 1},
}


def times_of(model: StepModel) -> LayerTimes:
    """Raises BadConfig for models that do not know operators, or not these."""
    if isinstance(model, Roofline):
        return RooflineTimes(model)
    if isinstance(model, TableModel):
        return TableTimes(model)
    raise BadConfig(
        f"the cost model {model.name} knows steps, not operators",
        hint="nano-batches are priced from a card of the catalogue or from operator tables",
    )


def _dense(shape: ModelShape) -> ModelShape:
    if shape.experts is not None:
        raise BadConfig(f"{shape.name} is a mixture of experts; nano-batches are of dense models")
    if not shape.is_uniform:
        raise BadConfig(f"the operators of {shape.name} are not those that nano-batches know")
    return shape


class RooflineTimes:
    """See cost.roofline for the formulas."""

    def __init__(self, model: Roofline) -> None:
        self.model, self.shape, self.card = model, _dense(model.shape), model.card
        self.name, self.digest, self.tp = model.name, model.digest, model.tp
        self.num_layers = self.shape.layers
        shape = self.shape
        heads = shape.heads + 2 * shape.kv_heads
        mlp = shape.hidden * shape.ffn
        # weights of the product, and numbers that norms or the activation move for each row
        self._sizes = {
            "qkv": (shape.hidden * heads * shape.head_dim, 4.0 * shape.hidden),
            "out": (shape.hidden * shape.heads * shape.head_dim, 0.0),
            "gate up": (2 * mlp, 4.0 * shape.hidden),
            "down": (mlp, 3 * shape.ffn / self.tp),
        }
        self._products = functools.lru_cache(maxsize=1 << 16)(self._product_s)

    def product_s(self, operator: str, rows: int) -> float:
        return self._products(operator, rows)

    def _product_s(self, operator: str, rows: int) -> float:
        card, item_bytes = self.card, self.shape.weight_item_bytes
        weights, numbers = self._sizes[operator]
        flops_s = 2 * rows * weights / (self.tp * card.flops * curve(card.gemm_mfu, rows))
        bytes_s = weights * item_bytes / (self.tp * card.bandwidth * card.gemm_mbu)
        return max(flops_s, bytes_s) + rows * numbers * item_bytes / card.bandwidth

    def decode_s(self, num: int, context: float) -> float:
        kv_bytes = self.shape.kv_bytes / self.num_layers
        speed = self.tp * self.card.bandwidth * self.card.decode_attention_mbu
        return kv_bytes * context / speed + self.card.attention_floor_s

    def prefill_s(self, tokens: float, pairs: float, num: float) -> float:
        card, shape = self.card, self.shape
        flops = 4 * shape.heads * shape.head_dim * pairs
        speed = card.flops * curve(card.prefill_attention_mfu, math.sqrt(2 * pairs / num))
        return flops / (self.tp * speed) + card.attention_floor_s

    def sum_s(self, rows: int) -> float:
        row_bytes = self.shape.hidden * self.shape.weight_item_bytes
        return self.card.all_reduce_s(rows * row_bytes, self.tp)


class TableTimes:
    """See cost.table. Skew between long and short decodes stays with the step model."""

    def __init__(self, model: TableModel) -> None:
        self.model, self.shape, self.tables = model, _dense(model.shape), model.tables
        self.name, self.digest, self.tp = model.name, model.digest, model.tp
        self.num_layers = self.shape.layers

    def product_s(self, operator: str, rows: int) -> float:
        lines = self.tables.layer
        return sum(
            times * lines[name](rows)
            for name, times in TABLE_NAMES[operator].items()
            if name in lines
        )

    def decode_s(self, num: int, context: float) -> float:
        return self.tables.attention.decodes(num)(context / num)

    def prefill_s(self, tokens: float, pairs: float, num: float) -> float:
        return self.tables.attention.mixed(max(1, round(tokens)), round(pairs), 0, 0.0)

    def sum_s(self, rows: int) -> float:
        num_bytes = rows * self.shape.hidden * self.shape.weight_item_bytes
        if self.tables.sums is not None:
            return self.tables.sums(num_bytes)
        return self.model.card.all_reduce_s(num_bytes, self.tp)
