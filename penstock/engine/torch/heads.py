"""The attention part of a layer, from normed rows to what this rank adds to the stream.

    grouped   q, k, v = qkv(x), one product; q and k normed per head where the model does so, then rotated; k and v
              cached; out(attention)
    latent    c, r = down(x), one vector and one rotated key for all heads of a position; [norm(c), rotate(r)] is all
              that is cached. With k_h = [U_h c, r] and v_h = W_h c a score is

                  q_h . k_h = [U_h^T q_plain, q_rotated] . [c, r]

              so queries are taken to the latent instead of keys from it, the cache is read once for all heads, and
              the weighted sum of latents is taken to values by W_h afterwards: the absorbed form of multi-head latent
              attention (DeepSeek-V2, section 2.1)

Models that rotate neighbours (2i, 2i + 1) have the rows of their weights reordered when they are loaded: a score is a
sum over all dimensions, so their order does not matter as long as q and k share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.engine.torch.families import Latent
from penstock.engine.torch.kernels import CpuPagedAttention, qk_norm_rope_, rms_norm, rope_
from penstock.engine.torch.kernels.program import Recorder
from penstock.engine.torch.kernels.recording import record_rope
from penstock.engine.torch.ports import AttentionBackend, Linear, Mask, Placing, StepMeta, Turn
from penstock.engine.torch.rope import RopeTable


class Heads(Protocol):
    def __call__(
        self, x: Tensor, positions: Tensor, meta: StepMeta, attention: AttentionBackend
    ) -> Tensor:
        """x [T, hidden], normed -> [T, hidden], this rank's part of it."""
        ...


@dataclass(slots=True, kw_only=True)
class GroupedHeads:
    """`num_heads` and `num_kv_heads` are those of this rank."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: Mask
    scale: float
    rope: RopeTable
    qkv: Linear
    qk_norm: tuple[Tensor, Tensor, float] | None  # weights of q and of k [head_dim], epsilon
    out: Linear
    wide_norm: tuple[Tensor, Tensor, float] | None = None  # the same over all heads together

    def __call__(
        self, x: Tensor, positions: Tensor, meta: StepMeta, attention: AttentionBackend
    ) -> Tensor:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x).view(-1, heads + 2 * kv_heads, self.head_dim)
        if self.wide_norm is None and isinstance(attention, Placing):
            turn = Turn(self.qk_norm, self.rope.upto(meta.max_context), positions)
            out = attention.seen(self.layer, qkv, turn, meta, self.mask, self.scale)
            return self.out(out.flatten(1))
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], 1)
        if self.wide_norm is not None:
            q_weight, k_weight, eps = self.wide_norm
            q = rms_norm(q.flatten(1), q_weight, eps).view_as(q)
            k = rms_norm(k.flatten(1), k_weight, eps).view_as(k)
        qk_norm_rope_(q, k, self.qk_norm, self.rope.upto(meta.max_context), positions)
        out, _ = attention(self.layer, q, k, v, meta, self.mask, self.scale)
        return self.out(out.flatten(1))

    def record(self, into: Recorder, x: Tensor, out: Tensor, attention: CpuPagedAttention) -> None:
        """The same over buffers; whoever changes one changes the other."""
        heads, kv_heads, dim = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = into.scratch("qkv", (heads + 2 * kv_heads) * dim)
        seen = into.scratch("seen", heads * dim)
        into.linear(self.qkv, x, qkv)
        q, k, v = torch.split(qkv.view(into.rows, -1, dim), [heads, kv_heads, kv_heads], 1)
        record_rope(into, (q, k), self.qk_norm, self.rope)
        attended = seen.view(into.rows, heads, dim)
        attention.record(into, self.layer, (q, k, v), attended, self.mask, self.scale)
        into.linear(self.out, seen, out)


@dataclass(slots=True, kw_only=True)
class LatentHeads:
    """`query` puts out the plain parts of this rank's heads side by side, then their rotated parts."""

    layer: int
    num_heads: int
    latent: Latent
    mask: Mask
    scale: float
    rope: RopeTable
    query_down: tuple[Linear, Tensor, float] | None  # the bottleneck, the norm behind it
    query: Linear
    down: Linear
    norm: tuple[Tensor, float]
    to_latent: Tensor  # U, [H, plain, width]
    to_value: Tensor  # W^T, [H, width, value]
    out: Linear

    def __call__(
        self, x: Tensor, positions: Tensor, meta: StepMeta, attention: AttentionBackend
    ) -> Tensor:
        told, heads = self.latent, self.num_heads
        q = self.query(self._narrowed(x))
        plain, rotated = torch.split(q, [heads * told.plain, heads * told.rotated], 1)
        c, r = torch.split(self.down(x), [told.width, told.rotated], 1)
        q_rope, r = rotated.view(-1, heads, told.rotated), r.view(-1, 1, told.rotated)
        rope_(q_rope, r, self.rope.upto(meta.max_context), positions)
        wide = torch.bmm(plain.view(-1, heads, told.plain).transpose(0, 1), self.to_latent)
        queries = torch.cat((wide.transpose(0, 1), q_rope), 2)
        weight, eps = self.norm
        keys = torch.cat((rms_norm(c, weight, eps)[:, None], r), 2)
        seen, _ = attention(
            self.layer, queries, keys, keys[..., : told.width], meta, self.mask, self.scale
        )
        values = torch.bmm(seen.transpose(0, 1), self.to_value)
        return self.out(values.transpose(0, 1).flatten(1))

    def _narrowed(self, x: Tensor) -> Tensor:
        if self.query_down is None:
            return x
        down, weight, eps = self.query_down
        return rms_norm(down(x), weight, eps)
