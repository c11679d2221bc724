"""Memory that an engine takes beside its weights and its blocks of keys and values: the most that it can come to.

    step       activations of the largest step, and the logits of those who draw: gone when the step is over
    scratch    rows that kernels have brought to whole numbers (kernels/source: shorts, quantised), kept by each lane
    recorded   buffers of the recorded steps (recorded.py), kept by each lane; twice where adapters are recorded too
    adapters   all slots, each with an adapter that changes every product it can
    behind     host memory for jobs and cached blocks (slow_memory.py), where the device's is the host's too
    others     torch, and what allocators keep for the next time

Rows of a step are counted at their widest place, in attention or in the MLP:

    attention  4 hidden (stream, part, normed, what comes out) + 2 (q + k + v) + 2 q
    MLP        4 hidden + 3 width of the MLP, or of all experts that a token takes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.engine.torch.families import Shape
from penstock.engine.torch.recorded import MOST_ROWS

USUAL_JOBS = 256  # that run at once
SCRATCH = 2.25  # bytes of a number that a product reads: 16 bits, and a step for each 16
OTHERS = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How an engine is run. `rows`: of the largest step; `drawn`: how many draw, guesses that are checked too."""

    rows: int
    drawn: int = USUAL_JOBS
    lanes: int = 1
    slots: int = 0
    rank: int = 16
    host_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Bytes."""

    step: int
    scratch: int = 0
    recorded: int = 0
    adapters: int = 0
    behind: int = 0
    others: int = OTHERS

    @property
    def total(self) -> int:
        return sum(bytes_ for _, bytes_ in self.parts)

    @property
    def parts(self) -> list[tuple[str, int]]:
        names = ("step", "scratch", "recorded", "adapters", "behind", "others")
        return [(name, getattr(self, name)) for name in names]

    def __str__(self) -> str:
        told = [f"{name} {bytes_ / 1e6:,.0f}" for name, bytes_ in self.parts if bytes_]
        return f"{self.total / 1e6:,.0f} MB at most ({', '.join(told)})"


@dataclass(frozen=True, slots=True)
class _Widths:
    """Numbers of a row at each place of a layer, on one of `world` ranks."""

    hidden: int
    query: int
    key: int
    mlp: int

    @property
    def qkv(self) -> int:
        return self.query + 2 * self.key

    @property
    def widest(self) -> int:
        """Of the inputs of products."""
        return max(self.hidden, self.query, self.mlp)


def beside_of(
    shape: Shape, dtype: torch.dtype, device: torch.device, use: Use, world: int = 1
) -> Beside:
    wide, each, is_cpu = _widths(shape, world), dtype.itemsize, device.type == "cpu"
    attention = 4 * wide.hidden + 2 * wide.qkv + 2 * wide.query
    row = each * max(attention, 4 * wide.hidden + 3 * wide.mlp)
    logits = (
        min(use.rows, use.drawn) * shape.vocab_size * (each + 8)
    )  # as they come, and twice fp32
    kept = 3 * wide.hidden + wide.qkv + wide.query + 3 * wide.mlp
    spaces = use.lanes * (2 if use.slots else 1)
    return Beside(
        step=use.lanes * (use.rows * row + logits),
        scratch=int(use.lanes * use.rows * wide.widest * SCRATCH) if is_cpu else 0,
        recorded=spaces * MOST_ROWS * kept * each if is_cpu else 0,
        adapters=use.slots * use.rank * _adapted(wide, shape.num_layers) * 4,
        behind=use.host_bytes if is_cpu else 0,
    )


def _widths(shape: Shape, world: int) -> _Widths:
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if shape.latent is not None:  # queries are as wide as what is cached, and so is what they see
        query, key = 2 * shape.num_heads * shape.latent.cached, shape.latent.cached
    mlp, experts = shape.intermediate, shape.experts
    if experts is not None:
        mlp = max(mlp, experts.top_k * (experts.width + shape.hidden) + (experts.shared_width or 0))
    return _Widths(shape.hidden, query // world, key // world, mlp // world)


def _adapted(wide: _Widths, num_layers: int) -> int:
    """Numbers of an adapter of rank 1: what each product reads, once a part, and what it puts out."""
    qkv, out = 3 * wide.hidden + wide.qkv, wide.query + wide.hidden
    mlp = 2 * wide.hidden + 2 * wide.mlp + wide.mlp + wide.hidden
    return num_layers * (qkv + out + mlp)
