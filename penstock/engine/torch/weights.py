"""Tensors of a model folder, read one at a time, whole or as one rank's slice.

Nothing is loaded ahead: each tensor is read when the layer that needs it is packed, so the peak beyond the packed
model is one layer. Every way in which a file can be broken ends in a BadModel that names the file and the tensor. So
does a tensor of a layer that nobody asked for: the model would not be the one that was trained. Tensors elsewhere
(a vision tower, layers beyond the last) are left where they are; `unread` says which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.hints import SAME
from penstock.engine.torch.checkpoints.join import expanded, moved
from penstock.engine.torch.checkpoints.open import open_stored
from penstock.engine.torch.ports import ShardSpec
from penstock.engine.torch.quantised import Quantised

PREFIXES = ("", "model.", "language_model.model.", "model.language_model.")
NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEFT_OVER = ("rotary_emb.inv_freq",)  # old checkpoints hold what is computed here


class WeightFolder:
    """The tensors of one folder, on the wanted device: `get` in the wanted dtype, `weight` as they are stored."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.rank, self.world = rank, world
        self._stored = open_stored(folder)
        self._names = frozenset(self._stored.names())
        self._asked: set[str] = set()
        self.gave_codes = False  # whether any weight was given in few bits
        there = [one for one in PREFIXES if f"{one}embed_tokens.weight" in self._names]
        self.prefix = there[0] if there else "model."

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(
        self,
        name: str,
        shape: Sequence[int],
        shard: ShardSpec | None = None,
        rows: range | None = None,
    ) -> Tensor:
        """This rank's part of tensor `name`, whose whole shape must be `shape`, or of some `rows`. Raises BadModel."""
        found = self.value(name, shape, shard, rows, as_numbers=True)
        return expanded(found, self.dtype) if isinstance(found, Quantised) else found

    def weight(
        self,
        name: str,
        shape: Sequence[int],
        shard: ShardSpec | None = None,
        rows: range | None = None,
    ) -> Tensor | Quantised:
        """As `get`, but a weight in few bits is given as it is."""
        return self.value(name, shape, shard, rows)

    def value(
        self,
        name: str,
        shape: Sequence[int],
        shard: ShardSpec | None = None,
        rows: range | None = None,
        *,
        as_numbers: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor | Quantised:
        """What `get` and `weight` read, the former `as_numbers`. `dtype` None: the wanted one."""
        self._asked.add(name)
        if name not in self._names:
            raise BadModel(f"{self._stored.where} has no tensor {name!r}", hint=SAME)
        found = self._stored.shape(name)
        if tuple(found) != tuple(shape):
            raise BadModel(
                f"{self._stored.place(name)}: tensor {name!r} has shape {list(found)}, "
                f"config.json asks for {list(shape)}",
                hint=SAME,
            )
        value = self._stored.read(name, _part(found, shard, rows), as_numbers=as_numbers)
        if isinstance(value, Quantised):
            self.gave_codes |= not as_numbers
            return moved(value, self.device)
        if value.dtype not in NUMBERS:
            raise BadModel(
                f"{self._stored.place(name)}: tensor {name!r} is {value.dtype}, not a floating-point "
                "number of 16 bits or more",
                hint="of quantised checkpoints, config.json must say so in quantization_config",
            )
        return value.to(device=self.device, dtype=dtype or self.dtype).contiguous()

    def exact(self, name: str, shape: Sequence[int]) -> Tensor:
        """A whole tensor in fp32, whatever the model computes in."""
        found = self.value(name, shape, as_numbers=True, dtype=torch.float32)
        assert isinstance(found, Tensor)
        return found

    def is_quantised(self, name: str) -> bool:
        """Whether `weight` gives codes."""
        return name in self._names and self._stored.is_quantised(name)

    def check_layers(self, count: int) -> None:
        """Raises BadModel when a tensor of one of the first `count` layers was not asked for."""
        heads = tuple(f"{self.prefix}layers.{layer}." for layer in range(count))
        for name in sorted(self._names - self._asked):
            if not name.startswith(heads) or name.endswith(LEFT_OVER):
                continue
            raise BadModel(
                f"{self._stored.place(name)}: tensor {name!r} has no place in the model of config.json",
                hint=SAME,
            )

    def unread(self) -> list[str]:
        """Groups of tensors that nobody asked for, with their numbers."""
        left: Counter[str] = Counter()
        for name in self._names - self._asked:
            if not name.endswith(LEFT_OVER):
                left[".".join(_group(name.split(".")))] += 1
        return [f"{group} ({count})" for group, count in sorted(left.items())]

    def said(self) -> str | None:
        """How the weights read so far were stored, where that is not simply as numbers."""
        return self._stored.said()

    def close(self) -> None:
        self._stored.close()


def _part(shape: tuple[int, ...], shard: ShardSpec | None, rows: range | None) -> tuple[slice, ...]:
    parts = [range(size) for size in shape]
    if rows is not None:
        parts[0] = rows
    if shard is not None and shard.dim != "none":
        axis = 0 if shard.dim == "out" else 1
        each = len(parts[axis]) // shard.world
        parts[axis] = parts[axis][shard.rank * each : (shard.rank + 1) * each]
    return tuple(slice(part.start, part.stop) for part in parts)


def _group(words: list[str]) -> list[str]:
    """The beginning of a name: as far as the first number, at most three words."""
    for at, word in enumerate(words[:3]):
        if word.isdigit():
            return words[: at + 1]
    return words[: min(3, len(words) - 1)] or words
