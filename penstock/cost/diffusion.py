"""What a diffusion language model costs: memory of an admissible batch, and seconds of a step in mixed phases.

Memory of n answers of L positions (prompt and masks), blocks of B, retention r, with V words and k kv bytes a position:

    weights + runtime + n ceil(r L) k + min(n L, max_tokens) (3 f + 4 h) item_bytes + rows V logit_bytes
    rows = min(n B, row_cap)     logits of active blocks, in slices
           n L                   an engine that keeps those of whole sequences

must fit into `utilisation` of the card. Bytes a logit are those alive at once: 2 for bf16 alone, 6 with a copy in
fp32, 18 with two buffers in fp64 (as LLaDA's published sampler makes for Gumbel noise); our own sampler holds 10 (bf16,
fp32, and what the log-sum-exp takes).

Time: matrix products, elementwise work and the host as in cost.roofline, of all query tokens of a step; the LM head of
its logit rows; attention of whole sequences over L^2 pairs; and of blocks the larger of computing B (kept + B) pairs
and reading the kept positions. Choosing what is kept is not charged (a product of one query a head), nor is what
happens to logits after the product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from penstock.core.types import CanvasRule, Phase
from penstock.cost.hardware import Card, curve
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import PRESETS, ModelShape
from penstock.cost.step import StepFeatures

LLADA_8B = PRESETS["llada-8b"]
LOGIT_BYTES = {"fp16": 2, "fp32": 6, "fp64": 18}
OWN_LOGIT_BYTES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """What logits of a step take. `row_cap` None: those of all positions, whole, all at once."""

    bytes_each: int = OWN_LOGIT_BYTES
    row_cap: int | None = 1024

    def num_rows(self, num_jobs: int, length: int, block: int) -> int:
        if self.row_cap is None:
            return num_jobs * length
        return min(num_jobs * block, self.row_cap)


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasMemory:
    """Of one card. `utilisation` and `max_tokens` as dLLM-Serve has them; `runtime_bytes` is assumed."""

    shape: ModelShape
    card: Card
    logits: Logits
    rule: CanvasRule
    utilisation: float = 0.8
    runtime_bytes: float = 0.5e9
    max_tokens: int = 16384

    @property
    def room(self) -> float:
        """Bytes beside the weights."""
        return (
            self.card.memory_bytes * self.utilisation - self.shape.weight_bytes - self.runtime_bytes
        )

    def kept_bytes(self, num_jobs: int, length: int) -> float:
        return num_jobs * self.rule.num_kept(length) * self.shape.kv_bytes

    def activation_bytes(self, num_tokens: int) -> float:
        shape = self.shape
        return num_tokens * (3 * shape.ffn + 4 * shape.hidden) * shape.weight_item_bytes

    def logit_bytes(self, num_jobs: int, length: int) -> float:
        rows = self.logits.num_rows(num_jobs, length, self.rule.block_tokens)
        return float(rows * self.shape.vocab * self.logits.bytes_each)

    def beside_kept(self, num_jobs: int, length: int) -> float:
        """Bytes of activations and logits when so many run."""
        tokens = min(num_jobs * length, self.max_tokens)
        return self.activation_bytes(tokens) + self.logit_bytes(num_jobs, length)

    def batch(self, length: int) -> int:
        """Answers of `length` positions that fit at once; 0 when not even one does."""
        num = 0
        while self._need(num + 1, length) <= self.room:
            num += 1
        return num

    def num_blocks(self, length: int, block_size: int) -> int:
        """Blocks of kept positions when activations and logits are set aside for the batch of `length`."""
        left = self.room - self.beside_kept(self.batch(length), length)
        return max(0, int(left // (self.shape.kv_bytes * block_size)))

    def _need(self, num_jobs: int, length: int) -> float:
        return self.kept_bytes(num_jobs, length) + self.beside_kept(num_jobs, length)


class CanvasPiece(NamedTuple):
    """One job's part of a step: query tokens, the size of its active block, positions kept."""

    phase: Phase
    tokens: int
    block: int
    kept: int


class CanvasCost:
    """Prices steps of one shape on one card. `has_whole_logits`: rows of whole sequences pass the LM head."""

    def __init__(self, shape: ModelShape, card: Card, *, has_whole_logits: bool = False) -> None:
        self._roofline, self._shape, self._card = Roofline(shape, card), shape, card
        self._has_whole_logits = has_whole_logits

    @property
    def name(self) -> str:
        return f"{self._roofline.name}, on canvases"

    def seconds(self, pieces: Iterable[CanvasPiece]) -> float:
        pieces = tuple(pieces)
        whole = [piece for piece in pieces if piece.phase != "reuse"]
        features = StepFeatures(
            num_tokens=sum([piece.tokens for piece in pieces]),
            num_jobs=len(pieces),
            num_samples=sum([self._rows(piece) for piece in pieces]),
            num_prefills=len(whole),
            prefill_pairs=sum([piece.tokens**2 for piece in whole]),
            prefill_context=sum([piece.tokens for piece in whole]),
        )
        return self._roofline.seconds(features) + self._reuse_s(pieces)

    def _rows(self, piece: CanvasPiece) -> int:
        return piece.tokens if self._has_whole_logits else piece.block

    def _reuse_s(self, pieces: Iterable[CanvasPiece]) -> float:
        """Attention of blocks."""
        shape, card, total_s = self._shape, self._card, 0.0
        for piece in pieces:
            if piece.phase != "reuse":
                continue
            seen = piece.kept + piece.tokens
            flops = 4 * shape.heads * shape.head_dim * shape.layers * piece.tokens * seen
            compute_s = flops / (card.flops * curve(card.prefill_attention_mfu, piece.tokens))
            read_s = piece.kept * shape.kv_bytes / (card.bandwidth * card.decode_attention_mbu)
            total_s += max(compute_s, read_s)
        return total_s


def sized_for(memory: CanvasMemory, length: int) -> CanvasMemory:
    """The same with a token budget that its batch of `length` can fill and no more."""
    most = max(length, min(memory.max_tokens, memory.batch(length) * length))
    return dataclasses.replace(memory, max_tokens=most)
