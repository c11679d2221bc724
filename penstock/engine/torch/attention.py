"""The portable attention backend, and the choice of a backend.

`GatherAttention` is pure torch and runs on any device. The cache of a layer is [K, blocks, block_size, D] for keys and
the same for values, so that one index_select over the block table yields contiguous [K, B, S, D] operands for a batched
product. Chunks of one token are done together, longer ones chunk by chunk in tiles of queries; each tile reads only
the keys that its mask lets it see. Scores and sums are fp32 whatever the cache holds. Working memory of one product is
bounded by TILE_BYTES.

A cache of latents holds one vector a position in place of a key and a value, whose first numbers are the value.
A cache of eight bits holds whole numbers with their scale in the last bytes of each vector.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.engine.torch.kernels import CpuPagedAttention, isas, why_not
from penstock.engine.torch.kernels.attention import SCALE_BYTES
from penstock.engine.torch.kernels.fused import has_triton
from penstock.engine.torch.ports import AttentionBackend, Mask, StepMeta

TILE_BYTES = 64 << 20
TRITON = "triton-paged"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """What a backend must hold; on one rank, hence `num_kv_heads` of that rank.

    latent   None: a key and a value of head_dim each; else one vector of head_dim, whose first `latent` are the value
    stored   what the cache holds: None = `dtype`; torch.int8 = whole numbers, and a scale for each vector
    """

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    latent: int | None = None
    stored: torch.dtype | None = None

    @property
    def is_int8(self) -> bool:
        return self.stored == torch.int8

    @property
    def vector_bytes(self) -> int:
        return self.head_dim + SCALE_BYTES if self.is_int8 else self.head_dim * self.dtype.itemsize

    @property
    def pieces(self) -> int:
        """Vectors that a position and a key/value head have in one layer."""
        return 2 if self.latent is None else 1

    def holding(self, num_blocks: int) -> KvLayout:
        return replace(self, num_blocks=num_blocks)


@dataclass(slots=True)
class _Chunk:
    start: int  # first row in the step
    count: int
    context: int


@dataclass(slots=True)
class _Split:
    """One step's chunks, sorted out once for all layers: single tokens together, the others one by one."""

    meta: StepMeta
    singles: Tensor  # rows of the step [S]
    blocks: Tensor  # their block table, trimmed [S, M]
    context: Tensor
    longest: int
    table: Tensor  # the step's whole block table
    longer: list[tuple[int, _Chunk]]


class GatherAttention:
    """See the module's text."""

    name = "gather"

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        shape = (
            layout.num_layers,
            layout.pieces,
            layout.num_kv_heads,
            layout.num_blocks,
            layout.block_size,
            layout.vector_bytes if layout.is_int8 else layout.head_dim,
        )
        # zeros, not empty: unused positions are masked by a zero weight, and 0 * NaN would spread
        self._kv = torch.zeros(shape, dtype=layout.stored or layout.dtype, device=layout.device)
        self._last = threading.local()  # `split`: of the step that this lane runs
        self._wants_lse = False

    @property
    def num_bytes(self) -> int:
        return self._kv.numel() * self._kv.element_size()

    @property
    def arena(self) -> Tensor:
        return self._kv.flatten(0, 2)

    def want_lse(self, wanted: bool) -> None:
        self._wants_lse = wanted

    def copy_blocks(self, pairs: Tensor) -> None:
        source, target = pairs.to(self._kv.device).unbind(1)
        self._kv[:, :, :, target] = self._kv[:, :, :, source]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, meta: StepMeta, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        cache = self._kv[layer]
        for part, fresh in zip(cache, (k, v), strict=False):
            kept = quantised(fresh) if self.layout.is_int8 else fresh
            part.flatten(1, 2).index_copy_(1, meta.slots, kept.transpose(0, 1))
        split = self._sort_out(meta)
        out = q.new_empty(*q.shape[:2], v.shape[2])
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if self._wants_lse else None
        if len(split.singles):
            self._attend_singles(split, cache, q, mask, scale, (out, lse))
        for index, chunk in split.longer:
            rows = slice(chunk.start, chunk.start + chunk.count)
            part = None if lse is None else lse[rows]
            self._attend_chunk(
                split.table[index], chunk, cache, q[rows], mask, scale, (out[rows], part)
            )
        return out, lse

    def _sort_out(self, meta: StepMeta) -> _Split:
        known: _Split | None = getattr(self._last, "split", None)
        if known is not None and known.meta is meta:
            return known
        starts, context = meta.query_start.tolist(), meta.context.tolist()
        singles, longer = [], []
        for index, end in enumerate(context):
            count = starts[index + 1] - starts[index]
            if count == 1:
                singles.append(index)
            else:
                longer.append((index, _Chunk(starts[index], count, end)))
        longest = max((context[index] for index in singles), default=0)
        width = -(-longest // self.layout.block_size)
        chosen = torch.tensor(singles, dtype=torch.int64, device=meta.context.device)
        split = self._last.split = _Split(
            meta=meta,
            singles=meta.query_start[chosen].long(),
            blocks=meta.block_table[chosen, :width].long(),
            context=meta.context[chosen],
            longest=longest,
            table=meta.block_table.long(),
            longer=longer,
        )
        return split

    def _read(self, cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks: [K, B, M * size, D] each."""
        latent, parts = self.layout.latent, [_gathered(part, table) for part in cache]
        if self.layout.is_int8:
            parts = [restored(part) for part in parts]
        return parts[0], parts[1] if latent is None else parts[0][..., :latent]

    def _attend_singles(
        self,
        split: _Split,
        cache: Tensor,
        q: Tensor,
        mask: Mask,
        scale: float,
        into: tuple[Tensor, Tensor | None],
    ) -> None:
        layout = self.layout
        each = split.longest * layout.num_kv_heads * layout.head_dim * 4
        step = max(1, TILE_BYTES // max(1, each))
        for first in range(0, len(split.singles), step):
            some = slice(first, first + step)
            rows, context = split.singles[some], split.context[some]
            heads = _grouped(q[rows], layout.num_kv_heads).transpose(0, 1)  # [K, B, G, D]
            keys, values = self._read(cache, split.blocks[some])
            scores = torch.matmul(heads.float() * scale, keys.float().transpose(2, 3))
            _squeeze(scores, mask)
            places = torch.arange(keys.shape[2], device=q.device)
            hidden = places >= context[:, None]
            if mask.window is not None:
                hidden |= places < context[:, None] - mask.window
            scores.masked_fill_(hidden[:, None, :], -torch.inf)
            result = torch.matmul(scores.softmax(-1), values.float())
            into[0][rows] = result.transpose(0, 1).flatten(1, 2).to(q.dtype)
            if into[1] is not None:
                into[1][rows] = scores.logsumexp(-1).transpose(0, 1).flatten(1, 2)

    def _attend_chunk(
        self,
        blocks: Tensor,
        chunk: _Chunk,
        cache: Tensor,
        q: Tensor,
        mask: Mask,
        scale: float,
        into: tuple[Tensor, Tensor | None],
    ) -> None:
        size = self.layout.block_size
        first = chunk.context - chunk.count  # position of the chunk's first query
        step = max(1, TILE_BYTES // (chunk.context * q.shape[1] * 4))
        for at in range(0, chunk.count, step):
            count = min(step, chunk.count - at)
            begin, end = _seen(mask, first + at, first + at + count, chunk.context)
            begin -= begin % size
            table = blocks[None, begin // size : -(-end // size)]
            keys, values = (part[:, 0, : end - begin] for part in self._read(cache, table))
            tile = _grouped(q[at : at + count], self.layout.num_kv_heads)
            tile = tile.permute(1, 2, 0, 3)  # [K, G, n, D]
            scores = torch.matmul(
                tile.flatten(1, 2).float() * scale, keys.float().transpose(1, 2)
            ).view(*tile.shape[:3], end - begin)
            _squeeze(scores, mask)
            hidden = _hidden(mask, first + at, count, begin, end, q.device)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            weights = scores.softmax(-1).flatten(1, 2)
            result = torch.matmul(weights, values.float()).view(*tile.shape[:3], -1)
            into[0][at : at + count] = result.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
            if into[1] is not None:
                lse = scores.logsumexp(-1).permute(2, 0, 1)
                into[1][at : at + count] = lse.flatten(1, 2)


def quantised(x: Tensor) -> Tensor:
    """[..., D] -> int8 [..., D + 4]: whole numbers, and the scale as the bytes of an fp32.

    A vector that is not finite gets a scale that is NaN.
    """
    wide = x.float()
    greatest = wide.abs().amax(-1, keepdim=True)
    steps = torch.full_like(greatest, 127)  # 127 / x would be rounded twice, unlike in the kernel
    factor = torch.where(greatest > 0, steps / greatest, 0.0)
    scale = torch.where(greatest.isfinite(), greatest / 127, torch.nan)
    numbers = (wide * factor).nan_to_num_(0.0).round_().to(torch.int8)
    return torch.cat((numbers, scale.view(torch.int8)), -1)


def restored(x: Tensor) -> Tensor:
    """What `quantised` left of a tensor, fp32."""
    numbers, scale = x[..., :-SCALE_BYTES], x[..., -SCALE_BYTES:]
    return numbers.float() * scale.contiguous().view(torch.float32)


def _squeeze(scores: Tensor, mask: Mask) -> None:
    if mask.cap is not None:
        scores.div_(mask.cap).tanh_().mul_(mask.cap)


def _grouped(q: Tensor, num_kv_heads: int) -> Tensor:
    """[T, H, D] -> [T, K, G, D]"""
    return q.reshape(q.shape[0], num_kv_heads, -1, q.shape[2])


def _gathered(cache: Tensor, table: Tensor) -> Tensor:
    """cache [K, N, size, D], table [B, M] -> [K, B, M * size, D]"""
    picked = cache.index_select(1, table.flatten())
    return picked.view(cache.shape[0], table.shape[0], -1, cache.shape[3])


def _seen(mask: Mask, first: int, last: int, context: int) -> tuple[int, int]:
    """Positions [begin, end) that queries at [first, last) may see."""
    if mask.kind == "full":
        return 0, context
    begin = 0 if mask.window is None else max(0, first - mask.window + 1)
    return begin, last


def _hidden(
    mask: Mask, first: int, count: int, begin: int, end: int, device: torch.device
) -> Tensor | None:
    if mask.kind == "full":
        return None
    queries = torch.arange(first, first + count, device=device)[:, None]
    keys = torch.arange(begin, end, device=device)
    hidden = keys > queries
    if mask.window is not None:
        hidden |= keys <= queries - mask.window
    return hidden


def choose_backend(layout: KvLayout, *, wanted: str = "auto") -> tuple[AttentionBackend, str]:
    """The backend for a layout, and why. `wanted` "gather" asks for the portable one."""
    if wanted == "gather":
        return GatherAttention(layout), "asked for"
    if layout.device.type == "cuda" and has_triton() and not layout.is_int8:
        from penstock.engine.torch.cuda.attention import TritonPagedAttention

        return TritonPagedAttention(layout, spare_blocks=1), "compiled by Triton"
    if layout.device.type != "cpu":
        why = "eight bits" if layout.is_int8 else "no Triton"
        return GatherAttention(layout), f"{layout.device.type}, {why}: the portable backend"
    reason = CpuPagedAttention.why_not_for(layout.head_dim, layout.block_size, layout.dtype)
    if layout.latent is not None and layout.latent % 16:
        reason = f"the width of latents must be a multiple of 16, not {layout.latent}"
    reason = reason or why_not()
    if reason is not None:
        return GatherAttention(layout), f"no compiled kernel: {reason}"
    backend = CpuPagedAttention(
        num_layers=layout.num_layers,
        num_blocks=layout.num_blocks,
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        stored=layout.stored,
        latent=layout.latent,
    )
    return backend, f"compiled for {isas()[0]}"
