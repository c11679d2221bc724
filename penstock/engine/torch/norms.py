"""Norms over the hidden dimension. Each first adds what a part of a layer put out, in the same pass.

rms      x / sqrt(mean(x^2) + eps) * weight. A weight in fp32 multiplies before the result is rounded (Gemma), one in
         the model's own type after (Llama)
layer    (x - mean) / sqrt(var + eps) * weight + bias
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.kernels import add_rms_norm, rms_norm
from penstock.engine.torch.kernels.program import Recorder
from penstock.engine.torch.kernels.recording import record_norm


class Norm(Protocol):
    def __call__(self, part: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + part, x + part); [T, hidden] each."""
        ...


@dataclass(slots=True)
class RmsNorm:
    weight: Tensor
    eps: float

    def __call__(self, part: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        if part is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(part, x, self.weight, self.eps)

    def record(self, into: Recorder, part: Tensor | None, x: Tensor, out: Tensor) -> None:
        """The same over buffers: x + part is left in x."""
        if part is None:
            record_norm(into, x, None, (self.weight, self.eps), out)
        else:
            record_norm(into, part, x, (self.weight, self.eps), out)


@dataclass(slots=True)
class LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, part: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        if part is not None:
            x = x + part
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps), x
