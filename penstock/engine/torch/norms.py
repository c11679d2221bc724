"""Norms over the hidden dimension. Each first adds what a part of a layer put out, in the same pass.

rms      x / sqrt(mean(x^2) + eps) * weight. A weight in fp32 multiplies before the result is rounded (Gemma), one in
         the model's own type after (Llama)
layer    (x - mean) / sqrt(var + eps) * weight + bias

What stands in their place where a model has none: the stream as it is (OLMo 2), and a factor (Granite).
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


@dataclass(slots=True)
class Unnormed:
    """Of models that norm only what a part puts out."""

    def __call__(self, part: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if part is None else x + part
        return x, x


@dataclass(slots=True)
class Scaled:
    """A factor of what a part puts out."""

    scale: float

    def __call__(self, part: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if part is None else x + part
        return x * self.scale, x
