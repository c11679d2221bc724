"""The second half of a layer: one MLP, or a mixture of them of which each token takes a few.

    plain      down(silu(gate x) * up x); some families have GELU for SiLU, and some no gate: down(gelu(up x))
    mixture    p = softmax(router x), or a sigmoid, in fp32; the top_k experts of largest p, weighted by p (scaled to
               sum to one where the family says so, or by a constant); + shared(x), times sigmoid(g x) where it has a
               gate, where every token takes a shared expert besides. Where experts lie in groups, only those of the few
               groups with the largest p (of sigmoids: the largest sum of two) are there to be taken. DeepSeek-V3
               chooses by p + a bias of each expert, which evens out how often they are taken, and weighs by p

In a mixture the rows of a step are sorted by expert, and an expert multiplies the rows that chose it and no others;
one that nobody chose is not read at all. What a step reads is therefore known exactly: each mixture notes how many rows
each expert took (`Taken`). The number of experts that took any, the loads, is what moves over the memory bus and what
layer groups save. A row's sum runs over its experts in their order, whatever else is in the step. Over N ranks every
expert is split like a plain MLP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from penstock.core.types import PlanId
from penstock.engine.torch.kernels import gelu_mul, silu_mul
from penstock.engine.torch.kernels.program import Recorder
from penstock.engine.torch.kernels.recording import record_gate
from penstock.engine.torch.ports import FewBits, Gating, Linear

Taken = dict[int, list[int]]  # layer -> rows that each expert took in one step
KEPT_STEPS = 4096


def relu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.relu() * up


class Mlp(Protocol):
    def __call__(self, x: Tensor, taken: Taken) -> Tensor:
        """x [M, hidden] -> [M, hidden], this rank's part of it. Mixtures note in `taken` what they did."""
        ...


@dataclass(slots=True)
class PlainMlp:
    """`gate_up` without the gate where `activate` takes none."""

    gate_up: Linear
    down: Linear
    activate: Callable[[Tensor], Tensor] = silu_mul

    def __call__(self, x: Tensor, taken: Taken) -> Tensor:
        if self.can_record() and isinstance(self.gate_up, Gating):
            return self.down(self.gate_up.gated(x, self.activate is gelu_mul))
        return self.down(self.activate(self.gate_up(x)))

    def can_record(self) -> bool:
        return self.activate in (silu_mul, gelu_mul)

    def record(self, into: Recorder, x: Tensor, out: Tensor, width: int) -> None:
        """The same over buffers, `width` numbers between up and down."""
        wide, narrow = into.scratch("gate_up", 2 * width), into.scratch("between", width)
        into.linear(self.gate_up, x, wide)
        record_gate(into, wide, narrow, self.activate is gelu_mul)
        into.linear(self.down, narrow, out)


def packed_bytes(mlp: PlainMlp) -> int | None:
    """Of an MLP in few bits; None of others."""
    few = [one for one in (mlp.gate_up, mlp.down) if isinstance(one, FewBits)]
    return sum(one.num_bytes for one in few) if len(few) == 2 else None


@dataclass(slots=True)
class Shared:
    """The expert that every token takes, and its gate [1, hidden]."""

    mlp: PlainMlp
    gate: Linear | None


@dataclass(slots=True)
class ExactRouter:
    """In fp32 whatever the model's type."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight)


class Spread(Protocol):
    """Experts in other processes (elastic/)."""

    def begin(self, layer: int, x: Tensor, rows: Tensor, counts: Sequence[int]) -> None:
        """Have `counts[e]` rows of x, those at `rows` in turn, multiplied by expert e of a layer."""
        ...

    def end(self) -> Tensor:
        """What came out, [len(rows), hidden]; good until the next `begin` of this thread. Raises StepFailed."""
        ...


@dataclass(slots=True)
class Mixture:
    """See the module's text. `spread` None: `experts` are here; otherwise that list is empty."""

    layer: int
    router: Linear
    experts: list[PlainMlp]
    top_k: int
    is_normed: bool
    shared: Shared | None
    scaling: float = 1.0
    groups: tuple[int, int] | None = None  # how many there are, how many a token may take from
    scores: Literal["softmax", "sigmoid"] = "softmax"
    correction: Tensor | None = None  # fp32 [experts], added to what they are chosen by
    spread: Spread | None = None
    num_experts: int = 0  # wherever they are

    def __call__(self, x: Tensor, taken: Taken) -> Tensor:
        return self.routed(x, taken, self.router(x))

    def routed(self, x: Tensor, taken: Taken, told: Tensor) -> Tensor:
        """The same with what a router said, which need not have read x."""
        chosen, weights = self.choose(told, x.dtype)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        rows, scales = order // self.top_k, weights.flatten()[order, None]
        if self.spread is not None:
            return self._gather(x, taken, rows, scales, flat)
        out = self._begin(x, taken)
        counts, at = torch.bincount(flat, minlength=len(self.experts)).tolist(), 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                some = rows[at : at + count]
                part = expert(x[some], taken).mul_(scales[at : at + count])
                out.index_add_(0, some, part)
                at += count
        taken[self.layer] = counts
        return out

    def _gather(
        self, x: Tensor, taken: Taken, rows: Tensor, scales: Tensor, flat: Tensor
    ) -> Tensor:
        """The same sum in the same order, of what others multiply meanwhile."""
        assert self.spread is not None
        counts, at = torch.bincount(flat, minlength=self.num_experts).tolist(), 0
        self.spread.begin(self.layer, x, rows, counts)
        try:
            out = self._begin(x, taken)
        finally:
            parts = self.spread.end()
        parts.mul_(scales)
        for count in counts:
            if count:
                out.index_add_(0, rows[at : at + count], parts[at : at + count])
                at += count
        taken[self.layer] = counts
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(experts int64, their weights), both [M, top_k], the likeliest first."""
        return self.choose(self.router(x), x.dtype)

    def choose(self, told: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        told = told.float()
        chance = told.sigmoid() if self.scores == "sigmoid" else told.softmax(-1)
        wanted = chance if self.correction is None else chance + self.correction
        chosen = self._in_groups(wanted).topk(self.top_k).indices
        weights = chance.gather(1, chosen)
        if self.is_normed:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.scaling != 1.0:
            weights = weights * self.scaling
        return chosen, weights.to(dtype)

    def _in_groups(self, wanted: Tensor) -> Tensor:
        """[M, experts], the same with groups that a token may not take from closed."""
        if self.groups is None:
            return wanted
        count, kept = self.groups
        grouped = wanted.view(len(wanted), count, -1)
        speak = 2 if self.scores == "sigmoid" else 1
        best = grouped.topk(speak).values.sum(-1).topk(kept).indices
        is_open = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~is_open[..., None], float("-inf")).flatten(1)

    def _begin(self, x: Tensor, taken: Taken) -> Tensor:
        """What is there before the chosen experts add theirs."""
        if self.shared is None:
            return torch.zeros_like(x)
        out = self.shared.mlp(x, taken)
        return out if self.shared.gate is None else out.mul_(self.shared.gate(x).sigmoid())


class ExpertLoads:
    """How many experts' weights the steps of an executor have read. Written by the lane: read it between steps.

    total      by layer, over all steps; 0 in layers without experts
    recent     (plan, by layer the experts it read) of the last KEPT_STEPS steps, oldest first
    taken      rows that each expert took since the start, [layers, experts]; for cost.coverage
    each_bytes weights of one expert
    """

    def __init__(self, *, num_layers: int, num_experts: int, each_bytes: int) -> None:
        self.each_bytes = each_bytes
        self.total = [0] * num_layers
        self.taken: NDArray[np.int64] = np.zeros((num_layers, num_experts), np.int64)
        self.num_steps = 0
        self.recent: deque[tuple[PlanId, dict[int, int]]] = deque(maxlen=KEPT_STEPS)

    def add(self, plan: PlanId, taken: Taken) -> None:
        self.num_steps += 1
        loads = {layer: len(counts) - counts.count(0) for layer, counts in taken.items()}
        for layer, load in loads.items():
            self.total[layer] += load
            self.taken[layer] += taken[layer]
        self.recent.append((plan, loads))

    @property
    def num_bytes(self) -> int:
        """Read from experts since the start."""
        return sum(self.total) * self.each_bytes
