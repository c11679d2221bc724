"""Paged attention in Triton: one kernel for prompts, decoding and mixtures of both.

The cache of a layer is [pieces, blocks, K, block size, D]. A program takes one key/value head and a tile of query rows,
all heads that share it together, so each key is read once for all of them. Chunks are ragged: tile t belongs to the
last chunk b with query_start[b] // tile + b <= t, found by bisection, so the grid follows from sizes that the host
knows and nothing waits for the device (which also lets a step be recorded as a graph). With few tiles the keys of each
are split among programs, and the parts are merged by their log-sum-exp in a second kernel.

`place` turns and stores what `attend` then reads, in one pass over a row of [q, k, v]; of single tokens one program
does all of it, and the merging too (decoding.py).

A cache of latents has one vector of D a position, whose first L are the value: it is read in two parts, L and the rest,
as a tile's width must be a power of two.

Scores and sums are fp32; probabilities are rounded to the cache's type before they meet the values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from penstock.engine.torch.attention import TRITON, KvLayout
from penstock.engine.torch.cuda import decoding, programs
from penstock.engine.torch.cuda.launch import Open, launch
from penstock.engine.torch.ports import Mask, StepMeta, Turn

LEAST_ROWS = 16  # of a matrix product in Triton
MOST_SPLITS = 16
SMALLEST_SPLIT = 64  # keys
MERGED = 64  # parts of heads at once
PLACED_ALONE = 128  # tokens; of more, 16 are placed together


class Tile(NamedTuple):
    """Query rows and keys of a program, and how Triton compiles it."""

    rows: int
    keys: int
    warps: int
    stages: int


DECODE = {2: Tile(LEAST_ROWS, 64, 4, 2), 4: Tile(LEAST_ROWS, 32, 4, 2)}  # by bytes of a number
PROMPT = {2: Tile(64, 64, 4, 3), 4: Tile(64, 32, 4, 2)}
LONG = Tile(128, 64, 8, 5)  # of more than LONG_TOKENS, in 16 bits
LONG_TOKENS = 2048
WIDE = Tile(LEAST_ROWS, 32, 8, 2)  # heads of more than 256 numbers


class TritonPagedAttention:
    """The AttentionBackend. `spare_blocks` lie behind those of the layout, for steps padded to a graph's size."""

    name = TRITON

    def __init__(self, layout: KvLayout, *, spare_blocks: int = 0) -> None:
        self.layout = layout
        self.cache = torch.zeros(
            layout.num_layers,
            layout.pieces,
            layout.num_blocks + spare_blocks,
            layout.num_kv_heads,
            layout.block_size,
            layout.head_dim,
            dtype=layout.dtype,
            device=layout.device,
        )
        self._wants_lse = False
        self._programs = _wanted_programs(layout.device)
        # How many parts of a token and head have ended. Where there are parts, there are fewer of these than programs.
        self._arrived = torch.zeros(self._programs, dtype=torch.int32, device=layout.device)

    @property
    def num_bytes(self) -> int:
        return self.cache.numel() * self.cache.element_size()

    @property
    def arena(self) -> Tensor:
        return self.cache.flatten(0, 1)

    def want_lse(self, wanted: bool) -> None:
        self._wants_lse = wanted

    def copy_blocks(self, pairs: Tensor) -> None:
        source, target = pairs.to(self.cache.device).unbind(1)
        self.cache[:, :, target] = self.cache[:, :, source]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, meta: StepMeta, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        self._store(layer, _rows(k), None if self.layout.latent is not None else _rows(v), meta)
        return self.attend(layer, q, meta, mask, scale)

    def attend(
        self, layer: int, q: Tensor, meta: StepMeta, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Of keys that were stored before."""
        q = _rows(q)
        tokens, heads, dim = q.shape
        kv_heads = self.layout.num_kv_heads
        group = heads // kv_heads
        padded = triton.next_power_of_2(group)
        tile = self._tile(q, meta)
        rows = max(tile.rows, padded)
        is_single = meta.max_query == 1
        tiles = tokens if is_single else tokens // (rows // padded) + len(meta.context)
        value_dim = self.layout.latent or dim
        splits = self._num_splits(tiles * kv_heads, meta)
        parts = q.new_empty(
            tokens, heads, splits, value_dim, dtype=torch.float32 if splits > 1 else q.dtype
        )
        part_lse = q.new_empty(tokens, heads, splits, dtype=torch.float32)
        caches = self.cache[layer]
        launch(
            programs.attend, (tiles, kv_heads, splits), q, caches[0], caches[-1], parts, part_lse,
            meta.query_start, meta.context, meta.block_table, Open(len(meta.context)),
            q.stride(0), Open(meta.block_table.stride(0)), caches.stride(1),
            scale, 1.0 if mask.cap is None else mask.cap,
            2**30 if mask.window is None else mask.window,
            G=group, GP=padded, H=heads, SIZE=self.layout.block_size, D=dim,
            L=value_dim, LP=triton.next_power_of_2(value_dim),
            RP=max(16, triton.next_power_of_2(dim - value_dim)) if dim > value_dim else 16,
            ROWS=rows, N=tile.keys, SPLITS=splits, IS_CAUSAL=mask.kind == "causal",
            HAS_CAP=mask.cap is not None, HAS_WINDOW=mask.window is not None, IS_SINGLE=is_single,
            IS_EXACT=q.dtype == torch.float32, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        if splits == 1:
            return parts[:, :, 0], part_lse[:, :, 0] if self._wants_lse else None
        out = torch.empty_like(q[..., :value_dim], memory_format=torch.contiguous_format)
        lse = part_lse.new_empty(tokens, heads)
        launch(
            programs.merge_parts, (tokens * heads,), parts, part_lse, out, lse,
            L=value_dim, LP=triton.next_power_of_2(value_dim), SPLITS=splits,
        )  # fmt: skip
        return out, lse if self._wants_lse else None

    def seen(
        self, layer: int, qkv: Tensor, turn: Turn, meta: StepMeta, mask: Mask, scale: float
    ) -> Tensor:
        """See ports.Placing.

        Tokens in several parts each are best done by one program. Of a single token three are as quick, as more of the
        next layers' weights are under way meanwhile; of many, whose parts are whole, turning q apart costs less.
        """
        is_single = meta.max_query == 1 and mask.kind == "causal" and not self._wants_lse
        if is_single and self.layout.head_dim <= 256:
            splits = self._num_splits(len(qkv) * self.layout.num_kv_heads, meta)
            if splits > 1 and len(qkv) > 1:
                return self._decode(layer, qkv, turn, meta, mask, scale)
        q = self.place(layer, qkv, turn, meta)
        return self.attend(layer, q, meta, mask, scale)[0]

    def _decode(
        self, layer: int, qkv: Tensor, turn: Turn, meta: StepMeta, mask: Mask, scale: float
    ) -> Tensor:
        """Single tokens in several parts each: all in one program (decoding.py)."""
        caches, dim, kv_heads = self.cache[layer], self.layout.head_dim, self.layout.num_kv_heads
        tokens, heads = qkv.shape[0], qkv.shape[1] - 2 * kv_heads
        q_weight, k_weight, eps = (None, None, 0.0) if turn.norm is None else turn.norm
        tile, splits = DECODE[qkv.element_size()], self._num_splits(tokens * kv_heads, meta)
        group = heads // kv_heads
        parts = qkv.new_empty(tokens, heads, splits, dim, dtype=torch.float32)
        part_lse = qkv.new_empty(tokens, heads, splits, dtype=torch.float32)
        out = qkv.new_empty(tokens, heads, dim)
        launch(
            decoding.decode_heads, (tokens, kv_heads, splits), qkv, q_weight, k_weight,
            caches[0], caches[1], turn.cos_sin, turn.positions, meta.slots, meta.context, meta.block_table,
            parts, part_lse, self._arrived, out, qkv.stride(0), Open(meta.block_table.stride(0)), caches.stride(1),
            eps, scale, 1.0 if mask.cap is None else mask.cap,
            2**30 if mask.window is None else mask.window,
            G=group, H=heads, K=kv_heads, SIZE=self.layout.block_size, D=dim, DP=triton.next_power_of_2(dim),
            HALF=turn.cos_sin.shape[1] // 2, ROWS=max(LEAST_ROWS, triton.next_power_of_2(group)), N=tile.keys,
            SPLITS=splits, HAS_CAP=mask.cap is not None, HAS_WINDOW=mask.window is not None,
            IS_NORMED=q_weight is not None,
            IS_WIDE=q_weight is not None and q_weight.dtype is torch.float32 and qkv.dtype is not torch.float32,
            IS_EXACT=qkv.dtype == torch.float32,
            AT_ONCE=min(triton.next_power_of_2(group), max(1, MERGED // splits)),
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        return out

    def place(self, layer: int, qkv: Tensor, turn: Turn, meta: StepMeta) -> Tensor:
        """qkv [T, H + 2 K, D] -> q [T, H, D], ready for `attend`. Changes qkv."""
        caches, dim, kv_heads = self.cache[layer], self.layout.head_dim, self.layout.num_kv_heads
        tokens, heads = qkv.shape[0], qkv.shape[1] - 2 * kv_heads
        q_weight, k_weight, eps = (None, None, 0.0) if turn.norm is None else turn.norm
        rows = 1 if tokens <= PLACED_ALONE else 16
        launch(
            programs.place_heads, (triton.cdiv(tokens, rows), heads + 2 * kv_heads), qkv,
            q_weight, k_weight, caches[0], caches[1], turn.cos_sin, turn.positions, meta.slots,
            qkv.stride(0), caches.stride(1), Open(tokens), eps, ROWS=rows,
            H=heads, K=kv_heads, SIZE=self.layout.block_size, DIM=dim,
            DIMS=triton.next_power_of_2(dim), HALF=turn.cos_sin.shape[1] // 2,
            IS_NORMED=q_weight is not None,
            IS_WIDE=q_weight is not None and q_weight.dtype is torch.float32 and qkv.dtype is not torch.float32,
        )  # fmt: skip
        return qkv[:, :heads]

    def _tile(self, q: Tensor, meta: StepMeta) -> Tile:
        """Decoding wants few rows a tile, a prompt many: more rows read the same keys once."""
        if meta.max_query == 1 and q.shape[2] <= 256:
            return DECODE[q.element_size()]
        if q.shape[2] > 256:
            return WIDE
        if q.element_size() == 2 and meta.max_query > LONG_TOKENS:
            return LONG
        return PROMPT[q.element_size()]

    def _store(self, layer: int, k: Tensor, v: Tensor | None, meta: StepMeta) -> None:
        caches, dim = self.cache[layer], self.layout.head_dim
        value = k if v is None else v
        launch(
            programs.write_cache, (k.shape[0], k.shape[1]), k, value, caches[0], caches[-1], meta.slots,
            k.stride(0), value.stride(0), caches.stride(1),
            K=k.shape[1], D=dim, DP=triton.next_power_of_2(dim),
            SIZE=self.layout.block_size, HAS_VALUE=v is not None,
        )  # fmt: skip

    def _num_splits(self, programs: int, meta: StepMeta) -> int:
        """As many as keep the device busy, of two turns or more each; a power of two."""
        if meta.max_query > 1:
            return 1
        most = min(MOST_SPLITS, meta.max_context // SMALLEST_SPLIT, self._programs // programs)
        return 1 << (most.bit_length() - 1) if most > 1 else 1


def _wanted_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 16
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _rows(x: Tensor) -> Tensor:
    """[T, heads, dim] with heads side by side; the rows themselves may be part of wider ones."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
