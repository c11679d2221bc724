"""A and B of all resident adapters for one product, in slots; and the product that adds them.

    down [slots, parts, rank, in]     A of each part (of a merged product: q, k, v; gate, up), fewer ranks padded with 0
    up   [slots, rank, out] a part    s * B, transposed

A run of neighbouring slots is one matrix of either, so any number of adapters takes one product down and one up a
part. Memory is taken when the first adapter comes that changes the product. It is held in fp32 where the processor
multiplies bf16 slowly (linear.py): an adapter is a hundredth of its model.

A slot may be written while others are read: its own rows are nobody's then, and what they yield is struck out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.engine.torch.adapters.rows import HERE, Group
from penstock.engine.torch.ports import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class BankForm:
    """Of all banks of a model."""

    slots: int
    rank: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Columns [start, stop) of a product: one linear layer of the checkpoint, by its name inside its decoder layer."""

    name: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Factors:
    """What one adapter has for one part: A [r, in] and s * B, transposed, [r, out]."""

    down: Tensor
    up: Tensor


@dataclass(slots=True, eq=False)
class Bank:
    """See the module's text."""

    form: BankForm
    parts: Sequence[Part]
    width: int
    down: Tensor | None = None
    ups: list[Tensor | None] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return sum([one.nbytes for one in (self.down, *self.ups) if one is not None])

    def put(self, slot: int, factors: Mapping[str, Factors]) -> None:
        """Fill a slot; parts that the adapter leaves alone become 0."""
        if self.down is None and not factors:
            return
        form = self.form
        if self.down is None:
            shape = (form.slots, len(self.parts), form.rank, self.width)
            self.ups = [None] * len(self.parts)
            self.down = torch.zeros(shape, dtype=form.dtype, device=form.device)
        for at, part in enumerate(self.parts):
            self._put_part(slot, at, part, factors.get(part.name))

    def _put_part(self, slot: int, at: int, part: Part, given: Factors | None) -> None:
        assert self.down is not None
        up = self.ups[at]
        if given is None:
            if up is not None:
                up[slot].zero_()
            return
        if up is None:
            form = self.form
            shape = (form.slots, form.rank, part.width)
            up = torch.zeros(shape, dtype=form.dtype, device=form.device)
        rank = len(given.down)
        up[slot, :rank], self.down[slot, at, :rank] = given.up.to(up), given.down.to(self.down)
        up[slot, rank:] = 0
        self.down[slot, at, rank:] = 0
        self.ups[at] = up

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add to out [M, out] what this thread's rows of x [M, in] ask for."""
        if self.down is not None:
            for group in HERE.groups:
                self._add(x, out, group, self.down)

    def _add(self, x: Tensor, out: Tensor, group: Group, bank: Tensor) -> None:
        rows = x[group.start : group.stop].to(bank.dtype)
        down, count = bank[group.first : group.last], group.last - group.first
        inner = (rows @ down.flatten(0, 2).T).view(len(rows), count, len(self.parts), -1)
        if group.strangers is not None:
            inner.masked_fill_(group.strangers[:, :, None, None], 0.0)
        for at, (part, up) in enumerate(zip(self.parts, self.ups, strict=True)):
            if up is None:
                continue
            weight = up[group.first : group.last].flatten(0, 1)
            target = out[group.start : group.stop, part.start : part.stop]
            if target.dtype == weight.dtype:
                target.addmm_(inner[:, :, at].flatten(1), weight)
            else:
                target.add_(inner[:, :, at].flatten(1) @ weight)


@dataclass(slots=True, eq=False)
class AdaptedLinear:
    """A packed layer, and what adapters add to it."""

    base: Linear
    bank: Bank

    def __call__(self, x: Tensor) -> Tensor:
        out = self.base(x)
        self.bank.add(x, out)
        return out
