"""Attention of canvases: every position sees every other, and keys and values are kept per head and sparsely.

`PackedAttention` stands behind the decoder's attention port. The step's `Piece`s say in which phase each answer is:

    full      out = attention(q, k, v) over all its positions
    refresh   the same; then each key/value head keeps `kept` of the positions outside the active block, with
                  score_j = max over the group's query heads of (mean query of the block) . k_j
                  score_j = max(score_{j-1}, score_j, score_{j+1})              over neighbours outside the block
              the highest scores win, equal scores by position. What is kept lies packed, in order of position: all
              heads keep equally many and each its own
    reuse     queries of the block attend to [what is kept, the block itself]

With `kept` = all positions outside the block nothing is chosen: the same numbers as a dense cache, bit for bit. Keys
are kept after rotation; positions never change. A position has one slot of the arena; an answer owns its slots for its
whole life. Scores and sums are fp32. One product works on at most TILE_BYTES of scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.core.types import Phase
from penstock.engine.torch.ports import Mask, StepMeta

TILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """One answer in a step: rows [first, first + count) of it; `block` is the active block's (start, end) positions.

    `slots`: of the arena, one a kept position; int64 [kept].
    """

    phase: Phase
    first: int
    count: int
    block: tuple[int, int]
    slots: Tensor


class PackedAttention:
    """Keys and values [layers, 2, K, slots, D], on one device."""

    name = "packed"

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_kv_heads, num_slots, head_dim)
        self._kv = torch.zeros(shape, dtype=dtype, device=device)
        self.pieces: tuple[Piece, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self._kv.nbytes

    @property
    def arena(self) -> Tensor:
        """[pieces, slots, D]"""
        return self._kv.flatten(0, 2)

    def want_lse(self, wanted: bool) -> None:
        assert not wanted, "partial results of canvases are never merged"

    def copy_blocks(self, pairs: Tensor) -> None:
        raise AssertionError("blocks of canvases are never shared")

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, meta: StepMeta, mask: Mask, scale: float
    ) -> tuple[Tensor, None]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for piece in self.pieces:
            rows = slice(piece.first, piece.first + piece.count)
            queries, keys, values = q[rows], k[rows].transpose(0, 1), v[rows].transpose(0, 1)
            if piece.phase == "refresh":
                self._keep(layer, piece, queries, keys, values)
            if piece.phase == "reuse":
                kept = self._kv[layer].index_select(2, piece.slots)
                keys = torch.cat((kept[0], keys), 1)
                values = torch.cat((kept[1], values), 1)
            out[rows] = attend(queries, keys, values, scale)
        return out, None

    def _keep(self, layer: int, piece: Piece, q: Tensor, keys: Tensor, values: Tensor) -> None:
        start, end = piece.block
        outside = torch.cat(
            (
                torch.arange(start, device=q.device),
                torch.arange(end, piece.count, device=q.device),
            )
        )
        keys, values = keys[:, outside], values[:, outside]
        if len(piece.slots) < len(outside):
            chosen = most_useful(q[start:end], keys, len(piece.slots))
            each = chosen[..., None].expand(-1, -1, keys.shape[2])
            keys, values = keys.gather(1, each), values.gather(1, each)
        for kept, cache in zip((keys, values), self._kv[layer], strict=True):
            cache.index_copy_(1, piece.slots, kept)


def most_useful(q: Tensor, keys: Tensor, count: int) -> Tensor:
    """Per head, which `count` of keys [K, n, D] the block's queries [B, H, D] need most; [K, count] in order."""
    num_kv_heads = keys.shape[0]
    mean = q.float().mean(0).view(num_kv_heads, -1, keys.shape[2])  # [K, G, D]
    scores = torch.matmul(mean, keys.float().transpose(1, 2)).amax(1)
    scores = torch.nn.functional.max_pool1d(scores[:, None], 3, stride=1, padding=1)[:, 0]
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return best.sort(dim=1).values


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q [T, H, D] over keys and values [K, S, D], all of which each query sees; [T, H, D]."""
    num_kv_heads, context, width = keys.shape
    group = q.shape[1] // num_kv_heads
    keys, values = keys.float().transpose(1, 2), values.float()
    step = max(1, TILE_BYTES // (context * q.shape[1] * 4))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, len(q), step):
        tile = q[first : first + step]
        heads = tile.view(len(tile), num_kv_heads, group, width).permute(1, 2, 0, 3).flatten(1, 2)
        weights = torch.matmul(heads.float() * scale, keys).softmax(-1)
        result = torch.matmul(weights, values).view(num_kv_heads, group, len(tile), width)
        out[first : first + step] = result.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


def num_kept(outside: int, retention: float) -> int:
    """How many of the positions outside a block are kept."""
    return math.ceil(retention * outside - 1e-9)
