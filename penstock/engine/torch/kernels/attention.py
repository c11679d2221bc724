"""Paged attention on the CPU: the cache and the call.

The cache is one tensor [layers, 2 (keys, values), blocks, elements of a block]; how a block is laid out is told in
source/calls.h. It is the same for every instruction set, so blocks can be moved between machines.

bfloat16 caches are read as they are; arithmetic is in float32, except that the bfloat16 dot-product instruction,
where there is one, takes the probabilities rounded to bfloat16. float32 caches agree with exact arithmetic to about
1e-6. A cache of eight bits (torch.int8) holds whole numbers and, for each token and key/value head, the scale of its
key and of its value, at the end of what the head has of a block: 4 bytes more than a byte a number. Numbers are
rounded to the 255 steps between the vector's greatest in size and its opposite, so each is off by at most 1/254 of it.

A cache of latents (`latent`) holds one vector a token, the same for all query heads, of which the first `latent`
numbers are the value.

With one thread the result of a chunk does not depend on what else is in the step; with more, long contexts may
be split among threads, which changes the order of a sum.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.engine.torch.kernels import library as native
from penstock.engine.torch.kernels.program import Recorder
from penstock.engine.torch.ports import Mask, StepMeta

LARGEST_HEAD_DIM = 1024
SCALE_BYTES = 4


@dataclass(slots=True, kw_only=True, eq=False)
class CpuPagedAttention:
    """The AttentionBackend of the kernels. `isa` forces an instruction set (see `isas()`); None takes the best.

    `dtype` is what queries, keys and values are, and what the cache holds unless `stored` is torch.int8.
    """

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    stored: torch.dtype | None = None
    latent: int | None = None
    num_threads: int | None = None
    isa: str | None = None
    library: native.Library | None = None
    name: str = field(default="cpu-paged", init=False)
    cache: Tensor = field(init=False, repr=False)
    _table: int = field(init=False, repr=False)
    _wants_lse: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        reason = self.why_not_for(self.head_dim, self.block_size, self.dtype)
        assert reason is None, reason
        assert self.stored in (None, self.dtype, torch.int8)
        assert self.latent is None or (self.latent % 16 == 0 and self.num_kv_heads == 1)
        if self.library is None:
            self.library, self._table = native.pick(self.isa)
        else:
            self._table = self.library.tables[self.isa or next(iter(self.library.tables))]
        vector = self.head_dim + (SCALE_BYTES if self.stored == torch.int8 else 0)
        block = self.num_kv_heads * self.block_size * vector
        pieces = 2 if self.latent is None else 1
        self.cache = torch.empty(
            self.num_layers, pieces, self.num_blocks, block, dtype=self.stored or self.dtype
        )
        self.library.large_pages(self.cache.data_ptr(), self.num_bytes)
        self.cache.zero_()  # which takes the memory: only now, as pages that are there stay small

    @staticmethod
    def why_not_for(head_dim: int, block_size: int, dtype: torch.dtype) -> str | None:
        """Why this shape is not supported, or None if it is. Says nothing about whether the kernels are available."""
        if head_dim % 16 or not 16 <= head_dim <= LARGEST_HEAD_DIM:
            return f"head_dim must be a multiple of 16 up to {LARGEST_HEAD_DIM}, not {head_dim}"
        if block_size % 16 or block_size < 16:
            return f"block_size must be a multiple of 16, not {block_size}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the cache must be float32 or bfloat16, not {dtype}"
        return None

    @classmethod
    def available_for(cls, head_dim: int, block_size: int, dtype: torch.dtype) -> bool:
        return cls.why_not_for(head_dim, block_size, dtype) is None and native.available()

    def __call__(  # noqa: PLR0913 - the port's signature
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, meta: StepMeta, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        q, k = (_rows(x, self.dtype) for x in (q, k))
        v = v if self.latent is not None else _rows(v, self.dtype)
        tokens, heads, dim = q.shape
        assert dim == self.head_dim and k.shape == (tokens, self.num_kv_heads, dim)
        assert v.shape == (*k.shape[:2], self.latent or dim)
        assert heads % self.num_kv_heads == 0
        assert mask.kind == "causal" or mask.window is None, "a window goes with a causal mask"
        table = meta.block_table
        assert table.dtype == meta.context.dtype == meta.query_start.dtype == torch.int32
        assert meta.slots.dtype == torch.int64 and table.stride(1) == 1
        out = q.new_empty(tokens, heads, v.shape[2])
        lse = torch.empty(tokens, heads) if self._wants_lse else None
        call = self._call(layer, (q, k, v), (out, lse), meta, mask, scale)
        assert self.library is not None
        threads = self.num_threads or torch.get_num_threads()
        self.library.attention(self._table, ctypes.byref(call), threads)
        return out, lse

    @property
    def can_record(self) -> bool:
        return not self._wants_lse and self.num_threads is None

    def record(
        self,
        into: Recorder,
        layer: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        mask: Mask,
        scale: float,
    ) -> None:
        """As a call, over buffers; the step's arrays come with the step (`StepMeta`, by the names of its fields)."""
        none = torch.zeros(1, 1, dtype=torch.int32)
        meta = StepMeta(none[0], none[0], none, none[0].long(), 1, 1)
        call = self._call(layer, qkv, (out, None), meta, mask, scale)
        arrays = {name: name for name in ("query_start", "context", "block_table", "slots")}
        counts = {"table_stride": "table_stride", "num_chunks": "chunks", "num_tokens": into.ROWS}
        assert self.library is not None
        into.call(self.library.attention, call, arrays | counts)

    def _call(  # noqa: PLR0913 - what a call is made of
        self,
        layer: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        into: tuple[Tensor, Tensor | None],
        meta: StepMeta,
        mask: Mask,
        scale: float,
    ) -> native.AttentionCall:
        q, k, v = qkv
        out, lse = into
        return native.AttentionCall(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            native.address(lse),
            self.cache[layer, 0].data_ptr(),
            self.cache[layer, -1].data_ptr(),
            meta.query_start.data_ptr(),
            meta.context.data_ptr(),
            meta.block_table.data_ptr(),
            meta.slots.data_ptr(),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            meta.block_table.stride(0),
            meta.context.shape[0],
            q.shape[0],
            q.shape[1],
            self.num_kv_heads,
            self.head_dim,
            self.block_size,
            mask.kind == "causal",
            native.SEES_ALL if mask.window is None else mask.window,
            scale,
            math.inf if mask.cap is None else mask.cap,
            self.dtype == torch.bfloat16,
            self.stored == torch.int8,
            self.latent is not None,
            v.shape[2],
        )

    def want_lse(self, wanted: bool) -> None:
        self._wants_lse = wanted

    @property
    def arena(self) -> Tensor:
        return self.cache.flatten(0, 1)

    def copy_blocks(self, pairs: Tensor) -> None:
        """All sources are read before any target is written."""
        self.cache[:, :, pairs[:, 1]] = self.cache[:, :, pairs[:, 0]]

    @property
    def num_bytes(self) -> int:
        return self.cache.numel() * self.cache.element_size()


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, heads, dim] with heads side by side; the rows themselves may be part of wider ones."""
    assert x.dtype == dtype and x.device.type == "cpu"
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
