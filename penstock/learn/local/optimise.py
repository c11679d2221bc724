"""Muon for the hidden matrices, AdamW for everything else, as one optimiser with one state."""

from __future__ import annotations

import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

NEWTON = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Tensor, steps: int = 4) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by a quintic Newton-Schulz iteration; batch first."""
    a, b, c = NEWTON
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.transpose(-2, -1) if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.transpose(-2, -1) if tall else x
    return result


class Muon:
    """Momentum orthogonalised per matrix, scaled so that one learning rate suits Muon and AdamW alike.

    Works in fp32 and treats all matrices of one shape as a batch, which is what two CPU cores like.
    """

    def __init__(
        self, weights: list[nn.Parameter], *, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        self.weights, self.momentum, self.decay = weights, momentum, decay
        self.speed = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rate: float, pool: ThreadPoolExecutor) -> None:
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, weight in enumerate(self.weights):
            groups[tuple(weight.shape)].append(index)
        list(pool.map(lambda members: self._update(members, gradients, rate), groups.values()))

    @torch.no_grad()
    def _update(self, members: list[int], gradients: list[Tensor], rate: float) -> None:
        stacked = []
        for index in members:
            self.speed[index].lerp_(gradients[index].float(), 1 - self.momentum)
            stacked.append(gradients[index].float().lerp(self.speed[index], self.momentum))
        update = orthogonal(torch.stack(stacked))
        scale = 0.2 * math.sqrt(max(update.shape[1:]))
        for row, index in enumerate(members):
            self.weights[index].mul_(1 - rate * self.decay)
            self.weights[index].add_(update[row], alpha=-rate * scale)


class Optimiser:
    """Both halves behind one `step(rate)`; `state()` and `restore()` carry everything a resume needs."""

    def __init__(self, model: nn.Module, *, decay: float = 0.1) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in model.named_parameters():
            hidden = weight.dim() == 2 and "embed_tokens" not in name
            (matrices if hidden else others).append(weight)
        self.muon = Muon(matrices, decay=decay)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
        self.everything = matrices + others

    def step(
        self, gradients: list[Tensor], rate: float, pool: ThreadPoolExecutor, *, clip: float = 1.0
    ) -> float:
        """Clip and update; `gradients` in the order of `everything`. Returns the norm before clipping."""
        norm = torch.stack([gradient.float().norm() for gradient in gradients]).norm()
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        clipped = [gradient * factor for gradient in gradients]
        count = len(self.muon.weights)
        self.muon.step(clipped[:count], rate, pool)
        for group in self.adam.param_groups:
            group["lr"] = rate
        for weight, gradient in zip(self.everything[count:], clipped[count:], strict=True):
            weight.grad = gradient
        self.adam.step()
        return float(norm)

    def state(self) -> dict[str, Any]:
        return {"speed": self.muon.speed, "adam": self.adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.muon.speed, state["speed"], strict=True):
            mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])
