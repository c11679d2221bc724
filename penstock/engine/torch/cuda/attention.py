"""Paged attention in Triton: one kernel for prompts, decoding and mixtures of both.

The cache of a layer is [pieces, blocks, K, block size, D]. A program takes one key/value head and a tile of query rows,
all heads that share it together, so each key is read once for all of them. Chunks are ragged: tile t belongs to the
last chunk b with query_start[b] // tile + b <= t, found by bisection, so the grid follows from sizes that the host
knows and nothing waits for the device (which also lets a step be recorded as a graph). With few tiles the keys of each
are split among programs, and the parts are merged by their log-sum-exp in a second kernel.

A cache of latents has one vector of D a position, whose first L are the value: it is read in two parts, L and the rest,
as a tile's width must be a power of two.

Scores and sums are fp32; probabilities are rounded to the cache's type before they meet the values.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from penstock.engine.torch.attention import TRITON, KvLayout
from penstock.engine.torch.cuda import programs
from penstock.engine.torch.ports import Mask, StepMeta

LEAST_ROWS = 16  # of a matrix product in Triton
KEYS = 32  # a program reads so many at a time
MOST_SPLITS = 16


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
        q = _rows(q)
        self._store(layer, _rows(k), None if self.layout.latent is not None else _rows(v), meta)
        tokens, heads, dim = q.shape
        kv_heads = k.shape[1]
        group = heads // kv_heads
        padded = triton.next_power_of_2(group)
        # Decoding wants few rows a tile, a prompt many: more rows read the same keys once.
        rows = max(LEAST_ROWS, padded) if meta.max_query == 1 else max(64, padded)
        tile = rows // padded
        tiles = tokens // tile + len(meta.context)
        value_dim = self.layout.latent or dim
        splits = self._num_splits(tiles * kv_heads, meta)
        parts = q.new_empty(
            tokens, heads, splits, value_dim, dtype=torch.float32 if splits > 1 else q.dtype
        )
        part_lse = q.new_empty(tokens, heads, splits, dtype=torch.float32)
        caches = self.cache[layer]
        programs.attend[(tiles, kv_heads, splits)](
            q, caches[0], caches[-1], parts, part_lse,
            meta.query_start, meta.context, meta.block_table, len(meta.context),
            q.stride(0), meta.block_table.stride(0), caches.stride(1),
            scale, 1.0 if mask.cap is None else mask.cap,
            2**30 if mask.window is None else mask.window,
            G=group, GP=padded, H=heads, SIZE=self.layout.block_size, D=dim,
            L=value_dim, LP=triton.next_power_of_2(value_dim),
            RP=max(16, triton.next_power_of_2(dim - value_dim)) if dim > value_dim else 16,
            ROWS=rows, N=KEYS, SPLITS=splits, IS_CAUSAL=mask.kind == "causal",
            HAS_CAP=mask.cap is not None, IS_EXACT=q.dtype == torch.float32,
        )  # fmt: skip
        if splits == 1:
            return parts[:, :, 0], part_lse[:, :, 0] if self._wants_lse else None
        out = torch.empty_like(q[..., :value_dim], memory_format=torch.contiguous_format)
        lse = part_lse.new_empty(tokens, heads)
        programs.merge_parts[(tokens * heads,)](
            parts,
            part_lse,
            out,
            lse,
            L=value_dim,
            LP=triton.next_power_of_2(value_dim),
            SPLITS=splits,
        )
        return out, lse if self._wants_lse else None

    def _store(self, layer: int, k: Tensor, v: Tensor | None, meta: StepMeta) -> None:
        caches, dim = self.cache[layer], self.layout.head_dim
        value = k if v is None else v
        programs.write_cache[(k.shape[0], k.shape[1])](
            k, value, caches[0], caches[-1], meta.slots,
            k.stride(0), value.stride(0), caches.stride(1),
            K=k.shape[1], D=dim, DP=triton.next_power_of_2(dim),
            SIZE=self.layout.block_size, HAS_VALUE=v is not None,
        )  # fmt: skip

    def _num_splits(self, programs: int, meta: StepMeta) -> int:
        """As many as keep the device busy, of two turns or more each; a power of two."""
        if meta.max_query > 1:
            return 1
        most = min(MOST_SPLITS, meta.max_context // (2 * KEYS), self._programs // programs)
        return 1 << (most.bit_length() - 1) if most > 1 else 1


def _wanted_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 16
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _rows(x: Tensor) -> Tensor:
    """[T, heads, dim] with heads side by side; the rows themselves may be part of wider ones."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
