"""The second half of a layer: one gated MLP, or a mixture of them of which each token takes a few.

    plain      down(silu(gate x) * up x)
    mixture    p = softmax(router x) in fp32; the top_k experts of largest p, weighted by p (scaled to sum to one where
               the family says so); + sigmoid(g x) * shared(x) where every token takes a shared expert besides

In a mixture the rows of a step are sorted by expert, and an expert multiplies the rows that chose it and no others; one
that nobody chose is not read at all. What a step reads is therefore known exactly: each mixture notes how many distinct
experts were touched (`Touched`), which is what moves over the memory bus and what layer groups save. A row's sum runs
over its experts in their order, whatever else is in the step. Over N ranks every expert is split like a plain MLP.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.core.types import PlanId
from penstock.engine.torch.kernels import silu_mul
from penstock.engine.torch.ports import Linear

Touched = dict[int, int]  # layer -> distinct experts that one step touched there
KEPT_STEPS = 4096


class Mlp(Protocol):
    def __call__(self, x: Tensor, touched: Touched) -> Tensor:
        """x [M, hidden] -> [M, hidden], this rank's part of it. Mixtures note in `touched` what they read."""
        ...


@dataclass(slots=True)
class PlainMlp:
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor, touched: Touched) -> Tensor:
        return self.down(silu_mul(self.gate_up(x)))


@dataclass(slots=True)
class Shared:
    """The expert that every token takes, and its gate [1, hidden]."""

    mlp: PlainMlp
    gate: Linear


@dataclass(slots=True)
class Mixture:
    """See the module's text."""

    layer: int
    router: Linear
    experts: list[PlainMlp]
    top_k: int
    is_normed: bool
    shared: Shared | None

    def __call__(self, x: Tensor, touched: Touched) -> Tensor:
        chosen, weights = self.route(x)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        rows, scales = order // self.top_k, weights.flatten()[order, None]
        out = self._begin(x, touched)
        counts, at = torch.bincount(flat, minlength=len(self.experts)).tolist(), 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                some = rows[at : at + count]
                part = expert(x[some], touched).mul_(scales[at : at + count])
                out.index_add_(0, some, part)
                at += count
        touched[self.layer] = len(counts) - counts.count(0)
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(experts int64, their weights), both [M, top_k], the likeliest first."""
        chance = self.router(x).softmax(-1, dtype=torch.float32)
        weights, chosen = chance.topk(self.top_k)
        if self.is_normed:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights.to(x.dtype)

    def _begin(self, x: Tensor, touched: Touched) -> Tensor:
        """What is there before the chosen experts add theirs."""
        if self.shared is None:
            return torch.zeros_like(x)
        return self.shared.mlp(x, touched).mul_(self.shared.gate(x).sigmoid())


class ExpertLoads:
    """How many experts' weights the steps of an executor have read. Written by the lane: read it between steps.

    total      by layer, over all steps; 0 in layers without experts
    recent     (plan, by layer what it touched) of the last KEPT_STEPS steps, oldest first
    each_bytes weights of one expert
    """

    def __init__(self, *, num_layers: int, num_experts: int, each_bytes: int) -> None:
        self.num_experts, self.each_bytes = num_experts, each_bytes
        self.total = [0] * num_layers
        self.num_steps = 0
        self.recent: deque[tuple[PlanId, Touched]] = deque(maxlen=KEPT_STEPS)

    def add(self, plan: PlanId, touched: Touched) -> None:
        self.num_steps += 1
        for layer, count in touched.items():
            self.total[layer] += count
        self.recent.append((plan, touched))

    @property
    def num_bytes(self) -> int:
        """Read from experts since the start."""
        return sum(self.total) * self.each_bytes
