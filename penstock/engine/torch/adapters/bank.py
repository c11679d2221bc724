"""A and B of all resident adapters for one product, in slots; and the product that adds them.

    down [slots, parts, rank, in]     A of each part (of a merged product: q, k, v; gate, up), fewer ranks padded with 0
    up   [slots, rank, out] a part    s * B, transposed

A run of neighbouring slots is one matrix of either, so any number of adapters takes one product down and one up a
part. Memory is taken when the first adapter comes that changes the product. On CPUs it is held in fp32, which our
kernels take, but where these are not there and bf16 is fast (linear.py): an adapter is a hundredth of its model.

At decode of few rows it is the number of torch operations that costs, so what can be is made once: views of each run of
slots are kept with the arrays they are of.

A slot may be written while others are read: its own rows are nobody's then, and what they yield is struck out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.engine.torch.adapters.rows import HERE, Group
from penstock.engine.torch.kernels.program import Recorder
from penstock.engine.torch.kernels.recording import MOST_RANK, record_adapter
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


Run = tuple[
    Tensor, tuple[Tensor | None, ...]
]  # [in, slots * parts * rank], and [slots * rank, out] of each part


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """The arrays of a bank, replaced as a whole when there is one more. `ups` None: no adapter changes the part."""

    down: Tensor
    ups: tuple[Tensor | None, ...]
    runs: dict[tuple[int, int], Run] = field(default_factory=dict)

    def run(self, first: int, last: int) -> Run:
        found = self.runs.get((first, last))
        if found is None:
            down = self.down[first:last].flatten(0, 2).T
            ups = [None if up is None else up[first:last].flatten(0, 1) for up in self.ups]
            found = self.runs[first, last] = down, tuple(ups)
        return found


@dataclass(slots=True, eq=False)
class Bank:
    """See the module's text. The parts lie side by side and are all of the product."""

    form: BankForm
    parts: Sequence[Part]
    width: int
    held: _Held | None = None

    @property
    def num_bytes(self) -> int:
        """Held now."""
        if self.held is None:
            return 0
        return sum([one.nbytes for one in (self.held.down, *self.held.ups) if one is not None])

    def put(self, slot: int, factors: Mapping[str, Factors]) -> None:
        """Fill a slot; parts that the adapter leaves alone become 0."""
        if not factors and self.held is None:
            return
        held = self.held = self._with_room(factors)
        for at, (part, up) in enumerate(zip(self.parts, held.ups, strict=True)):
            given = factors.get(part.name)
            if given is not None:
                assert up is not None
                rank = len(given.down)
                up[slot, :rank], held.down[slot, at, :rank] = given.up.to(up), given.down.to(up)
                up[slot, rank:], held.down[slot, at, rank:] = 0, 0
            elif up is not None:
                up[slot] = 0

    def _with_room(self, factors: Mapping[str, Factors]) -> _Held:
        """The arrays, with those that these need for the first time."""
        form, before = self.form, self.held

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=form.dtype, device=form.device)

        ups: list[Tensor | None] = [None] * len(self.parts)
        if before is not None:
            ups = list(before.ups)
        fresh = [
            at for at, part in enumerate(self.parts) if ups[at] is None and part.name in factors
        ]
        if before is not None and not fresh:
            return before
        for at in fresh:
            ups[at] = zeros(form.slots, form.rank, self.parts[at].width)
        down = before.down if before is not None else None
        if down is None:
            down = zeros(form.slots, len(self.parts), form.rank, self.width)
        return _Held(down, tuple(ups))

    @property
    def can_record(self) -> bool:
        widths = [self.width, *[edge for part in self.parts for edge in (part.start, part.stop)]]
        fits = self.form.rank <= MOST_RANK and not any([width % 16 for width in widths])
        return fits and self.form.dtype == torch.float32

    def record(self, into: Recorder, x: Tensor, out: Tensor) -> None:
        """As `add`, over buffers, with the arrays that are held now."""
        held = self.held
        if held is None:
            return
        for at, (part, up) in enumerate(zip(self.parts, held.ups, strict=True)):
            if up is not None:
                record_adapter(into, x, (held.down[:, at], up), out[:, part.start : part.stop])

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add to out [M, out] what this thread's rows of x [M, in] ask for."""
        held = self.held
        if held is not None:
            for group in HERE.groups:
                self._add(x, out, group, held)

    def _add(self, x: Tensor, out: Tensor, group: Group, held: _Held) -> None:
        down, ups = held.run(group.first, group.last)
        count, parts = group.stop - group.start, self.parts
        if count != len(x):
            x, out = x[group.start : group.stop], out[group.start : group.stop]
        inner = x.to(down.dtype) @ down
        if group.strangers is not None:
            inner.view(*group.strangers.shape[:2], -1).masked_fill_(group.strangers, 0.0)
        if len(parts) == 1:
            pieces: Sequence[Tensor] = (inner,)
            targets: Sequence[Tensor] = (out,)
        else:
            shape = (count, group.last - group.first, len(parts), self.form.rank)
            pieces = inner.view(shape).permute(2, 0, 1, 3).reshape(len(parts), count, -1).unbind()
            targets = torch.split(out, [part.width for part in parts], 1)
        for piece, up, target in zip(pieces, ups, targets, strict=True):
            if up is None:
                continue
            if target.dtype == up.dtype:
                target.addmm_(piece, up)
            else:
                target.add_(piece @ up)


@dataclass(slots=True, eq=False)
class AdaptedLinear:
    """A packed layer, and what adapters add to it."""

    base: Linear
    bank: Bank

    def __call__(self, x: Tensor) -> Tensor:
        out = self.base(x)
        self.bank.add(x, out)
        return out

    def record(self, into: Recorder, x: Tensor, out: Tensor) -> None:
        into.linear(self.base, x, out)
        self.bank.record(into, x, out)
