"""From the states of a text to its vector: gathered as its chunks pass, then made into one vector of length one.

    cls     the first state              mean          the mean of all        max    the largest of each number
    last    the last state               mean_sqrt     their sum / sqrt(n)    weightedmean   state i weighs i + 1

Sums are in fp32 whatever the model's type. A decoder's text may come in several chunks: what is kept of each is a sum
or a maximum, and a chunk that is run again takes the place of what it and those behind it left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from penstock.core.errors import BadModel
from penstock.engine.torch.encoders.package import Dense, Mode, Package

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}
BROKEN = "the model gave no finite numbers for this text"


@dataclass(slots=True)
class Gathered:
    """What is kept of one text of `num_tokens`: by the start of a chunk, one [hidden] a mode (None: nothing of it)."""

    modes: tuple[Mode, ...]
    num_tokens: int
    kept: dict[int, list[Tensor | None]] = field(default_factory=dict)

    def span(self, start: int, stop: int) -> range:
        """Positions of a chunk whose states are needed."""
        if all(mode == "last" for mode in self.modes):
            start = max(start, self.num_tokens - 1)
        return range(start, min(stop, self.num_tokens))

    def add(self, states: Tensor, start: int) -> None:
        """States [n, hidden] of the positions from `start` on."""
        for later in [at for at in self.kept if at >= start]:
            del self.kept[later]
        states = states.float()
        self.kept[start] = [self._part(mode, states, start) for mode in self.modes]

    def _part(self, mode: Mode, states: Tensor, start: int) -> Tensor | None:
        if mode == "cls":
            return states[0] if start == 0 else None
        if mode == "last":
            return states[-1] if start + len(states) == self.num_tokens else None
        if mode == "max":
            return states.amax(0)
        if mode == "weightedmean":
            weights = torch.arange(start + 1, start + 1 + len(states), device=states.device)
            states = states * weights[:, None]
        return states.sum(0)

    def pooled(self) -> Tensor:
        """[modes * hidden]"""
        count = self.num_tokens
        divided = {"mean": count, "mean_sqrt": count**0.5, "weightedmean": count * (count + 1) / 2}
        found = []
        for place, mode in enumerate(self.modes):
            parts = [part for kept in self.kept.values() if (part := kept[place]) is not None]
            whole = torch.stack(parts)
            found.append(whole.amax(0) if mode == "max" else whole.sum(0) / divided.get(mode, 1.0))
        return torch.cat(found)


class Pooler:
    """What a package does with pooled states. Raises BadModel when its dense layers cannot be read."""

    def __init__(self, package: Package, device: torch.device) -> None:
        self.package = package
        self._dense = [_read(layer, device) for layer in package.dense]

    def gathered(self, num_tokens: int) -> Gathered:
        return Gathered(self.package.modes, num_tokens)

    def vectors(self, texts: Sequence[Gathered]) -> list[bytes | None]:
        """Little-endian fp32, one a text; None where a number is not finite."""
        if not texts:
            return []
        rows = torch.stack([text.pooled() for text in texts])
        for layer, (weight, bias) in zip(self.package.dense, self._dense, strict=True):
            rows = ACTIVATIONS[layer.activation](F.linear(rows, weight, bias))
        if self.package.is_normed:
            rows = F.normalize(rows, dim=-1, eps=1e-12)
        return as_bytes(rows)


def as_bytes(rows: Tensor) -> list[bytes | None]:
    """Rows [n, width] in fp32; None where one is not finite."""
    told = rows.float().cpu().contiguous()
    fine = told.isfinite().all(-1).tolist()
    numbers = told.numpy().astype("<f4", copy=False)
    return [row.tobytes() if good else None for row, good in zip(numbers, fine, strict=True)]


def _read(layer: Dense, device: torch.device) -> tuple[Tensor, Tensor | None]:
    path = layer.folder / "model.safetensors"
    if not path.is_file():
        raise BadModel(
            f"{path} is missing", hint="save the dense layer again with safe_serialization"
        )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as opened:
            weight = opened.get_tensor("linear.weight").float().to(device)
            bias = opened.get_tensor("linear.bias").float().to(device) if layer.has_bias else None
    except (SafetensorError, OSError) as error:
        raise BadModel(f"{path} cannot be read: {error}") from None
    if tuple(weight.shape) != (layer.num_out, layer.num_in):
        raise BadModel(
            f"{path}: linear.weight has shape {list(weight.shape)}, "
            f"config.json asks for {[layer.num_out, layer.num_in]}"
        )
    return weight, bias
