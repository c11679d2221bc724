"""The two ports inside the engine: how a linear layer is computed, and how attention reads paged memory.

Whoever adds a quantised format, a LoRA path or a GPU kernel implements one of these and changes nothing else.
Shapes use T tokens in the step (all jobs' chunks, ragged), B chunks, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from penstock.engine.torch.quantised import Quantised


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """How a weight [out, in] is split over `world` ranks: by rows ("out"), by columns ("in"), or not at all.

    A layer split by "in" yields partial sums: whoever calls it all-reduces.
    """

    dim: Literal["none", "out", "in"] = "none"
    rank: int = 0
    world: int = 1


class Linear(Protocol):
    """A packed layer. x [M, in] -> [M, out] for any M >= 1."""

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class FewBits(Protocol):
    """A packed layer in few bits."""

    @property
    def num_bytes(self) -> int:
        """Read by a call of few rows."""
        ...


@runtime_checkable
class Gating(Protocol):
    """A packed layer of gates and values that can activate on the way out."""

    def gated(self, x: Tensor, is_gelu: bool) -> Tensor:
        """x [M, in] -> activate(gate) * up [M, out / 2]"""
        ...


class LinearMethod(Protocol):
    """Packs a weight once; the packed layer is called with any number of rows."""

    name: str

    def pack(self, weight: Tensor, bias: Tensor | None, shard: ShardSpec) -> Linear:
        """`weight` is this rank's shard, [out, in]; the original may be freed afterwards."""
        ...


class QuantisedMethod(Protocol):
    """Packs weights of few bits, as they are. Where there is none, `Quantised.expand` and a LinearMethod do."""

    name: str

    def pack_quantised(self, weight: Quantised, bias: Tensor | None) -> Linear:
        """`weight` is this rank's shard."""
        ...


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees: "causal" (with `window`: the last `window` positions, itself included), or "full".

    `cap`: scores of keys that are seen are squeezed into (-cap, cap), as cap * tanh(score / cap).
    """

    kind: Literal["causal", "full"] = "causal"
    window: int | None = None
    cap: float | None = None


@dataclass(slots=True)
class StepMeta:
    """Where each chunk's tokens and blocks are; built once a step and used by every layer.

    query_start int32 [B+1]   chunk b's tokens are [query_start[b], query_start[b+1]) of the T rows
    context     int32 [B]     positions the job holds after this step (last query position + 1)
    block_table int32 [B, M]  block ids in order, padded with 0
    slots       int64 [T]     block id * block_size + offset where each token's key and value go
    max_query, max_context    plain ints
    """

    query_start: Tensor
    context: Tensor
    block_table: Tensor
    slots: Tensor
    max_query: int
    max_context: int


class AttentionBackend(Protocol):
    """Owns the layout of the paged cache of all layers and computes attention over it.

    Made from a KvLayout (attention.py). All tokens of a step are written before any is read, so a chunk may read
    blocks that another chunk of the same step fills.

    Most caches hold a key and a value of D numbers for each position and key/value head. A cache of latents holds one
    vector of D numbers, whose first L are its value too: then v is k[..., :L], is not written again, and out is
    [T, H, L].
    """

    name: str

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, meta: StepMeta, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """q [T, H, D], k and v [T, K, D] -> (out [T, H, D], lse [T, H] float32 or None if not asked for).

        Writes k and v at meta.slots, then attends. `lse` is the log of the sum of exponentials of the scaled
        scores, with which partial results over disjoint keys can be merged.
        """
        ...

    def want_lse(self, wanted: bool) -> None: ...

    def copy_blocks(self, pairs: Tensor) -> None:
        """Copy whole blocks, all layers: pairs int64 [P, 2] of (source, target)."""
        ...

    @property
    def num_bytes(self) -> int: ...


class Turn(NamedTuple):
    """What is done to q and k before they meet: see kernels.qk_norm_rope_."""

    norm: tuple[Tensor, Tensor, float] | None
    cos_sin: Tensor
    positions: Tensor


@runtime_checkable
class Placing(Protocol):
    """A backend that turns q and k and stores k and v itself."""

    def seen(
        self, layer: int, qkv: Tensor, turn: Turn, meta: StepMeta, mask: Mask, scale: float
    ) -> Tensor:
        """qkv [T, H + 2 K, D] -> [T, H, D], as the call of AttentionBackend of what was turned. May change qkv."""
        ...


@runtime_checkable
class Movable(Protocol):
    """A backend whose blocks can be copied elsewhere and back (mover.py)."""

    @property
    def arena(self) -> Tensor:
        """The cache as [pieces, blocks, ...], not a copy: a run of blocks is consecutive in each piece."""
        ...


DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
