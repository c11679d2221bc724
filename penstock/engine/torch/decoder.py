"""One decoder for all families: layers of two parts each, and the forward as a generator over pieces.

    x = embedding[ids]
    every layer:  x += attention(norm(x)), see heads.py                  piece (layer, "attention")
                  x += mlp(norm(x)), see mlp.py                          piece (layer, "mlp")
    hidden = norm(x[rows])                                               logits = head(hidden)

A part's result is added to x by the next part's norm, in one pass. Some models norm it once more before (Gemma), and
in some both parts read the same norm and are added together (Phi).

On a CPU steps of few rows run the same pieces as recorded kernel calls (recorded.py).

`forward` yields after each piece (recorded ones: see there), so that whoever drives it may stop between any two and go
on later; nothing outside the generator holds activations. Over N ranks each has 1/N of the heads and of each MLP: both
parts then yield partial sums, which `reduce` adds up. Layers are made in load.py.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from penstock.engine.torch.adapters.rows import AdapterRows
from penstock.engine.torch.families import Shape
from penstock.engine.torch.heads import Heads
from penstock.engine.torch.mlp import Mixture, Mlp, Taken
from penstock.engine.torch.norms import Norm
from penstock.engine.torch.ports import AttentionBackend, Linear, StepMeta
from penstock.engine.torch.recorded import Space, Spaces, Visit

Part = Literal["attention", "mlp"]


class Piece(NamedTuple):
    """Where a forward stands: `part` of `layer` was just done; `held_bytes` are its activations."""

    layer: int
    part: Part
    held_bytes: int

    @property
    def ends_layer(self) -> bool:
        return self.part == "mlp"


class Rank(Protocol):
    """This process among those that share a model."""

    rank: int
    world: int

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks."""
        ...

    def join(self, x: Tensor) -> Tensor:
        """Columns of all ranks side by side: [M, n] -> [M, n * world]."""
        ...


class Alone:
    """The only rank."""

    rank, world = 0, 1

    def reduce(self, x: Tensor) -> Tensor:
        return x

    def join(self, x: Tensor) -> Tensor:
        return x


@dataclass(slots=True)
class StepInput:
    """One step's tokens. `rows` are those whose logits are wanted; None = all of them, in order.

    `adapters`: which rows use which; None = none does. `taken` is filled by the forward. `away`: how a step attends
    of whose jobs a part of the context lies elsewhere (borrower.py).
    """

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    rows: Tensor | None  # int64 [R]
    meta: StepMeta
    adapters: AdapterRows | None = None
    taken: Taken = field(default_factory=dict)
    away: AttentionBackend | None = None


@dataclass(slots=True)
class Layer:
    """`mlp_norm` None: the MLP reads what attention reads. The `post` norms are of what a part puts out.

    `early`: the router of a mixture that is told what enters the layer, not what the MLP reads.
    """

    attention_norm: Norm
    attention: Heads
    mlp_norm: Norm | None
    mlp: Mlp
    attention_post: Norm | None = None
    mlp_post: Norm | None = None
    early: Linear | None = None


@dataclass(slots=True)
class Decoder:
    """Packed weights of one rank. `adapted`: the layers with what adapters add (adapters/), where there can be any."""

    shape: Shape
    rank: Rank
    embedding: Tensor
    layers: list[Layer]
    final_norm: Norm
    head: Linear
    is_head_split: bool
    embedding_scale: float | None = None
    attention: AttentionBackend | None = None
    adapted: list[Layer] | None = None
    spaces: Spaces | None = None  # None: layers run plainly

    def forward(self, step: StepInput) -> Generator[Piece, None, Tensor]:
        """Yields after pieces; returns the hidden states of `step.rows`, normed, [R, hidden]."""
        whole = (0, len(self.layers))
        x, part = yield from self.through(self.embed(step.ids), step, whole)
        return self.finish(x, part, step.rows)

    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first layer, [T, hidden]."""
        x = self.embedding[ids]
        return x if self.embedding_scale is None else x.mul_(self.embedding_scale)

    def through(
        self, x: Tensor, step: StepInput, layers: tuple[int, int], beside: int = 0
    ) -> Generator[Piece, None, tuple[Tensor, Tensor]]:
        """Rows x [T, hidden] through some layers: what came out is the sum of both tensors.

        `beside`: bytes of activations that whoever drives this holds besides.
        """
        each = x.numel() * x.element_size()
        if step.away is None and (space := self._space_for(x, step.adapters)) is not None:
            return (yield from _through_space(space, Visit(step, len(x), x), layers, beside))
        part: Tensor | None = None
        held = self._layers_for(step)
        for index in range(*layers):
            layer = held[index]
            normed, x = layer.attention_norm(part, x)
            routing = None if layer.early is None else layer.early(x)
            part = self._attend(layer, normed, step)
            if layer.mlp_norm is None:
                yield Piece(index, "attention", beside + 3 * each)
                part = part + self._pass_mlp(layer, normed, step, routing)
            else:
                del normed  # not held while this stands still
                yield Piece(index, "attention", beside + 2 * each)
                normed, x = layer.mlp_norm(part, x)
                part = self._pass_mlp(layer, normed, step, routing)
            del normed
            yield Piece(index, "mlp", beside + 2 * each)
        assert part is not None, "no layers to pass"
        return x, part

    def _space_for(self, x: Tensor, adapters: AdapterRows | None) -> Space | None:
        return None if self.spaces is None else self.spaces.find(x, adapters)

    def finish(self, x: Tensor, part: Tensor | None, rows: Tensor | None) -> Tensor:
        """The last norm, of `rows` only."""
        if rows is not None:
            x, part = x[rows], None if part is None else part[rows]
        return self.final_norm(part, x)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [R, vocab]"""
        out = self.head(hidden)
        found = (self.rank.join(out) if self.is_head_split else out).float()
        cap = self.shape.logit_cap
        return found if cap is None else found.div_(cap).tanh_().mul_(cap)

    def _layers_for(self, step: StepInput) -> list[Layer]:
        if step.adapters is None:
            return self.layers
        assert self.adapted is not None, "no adapter was loaded"
        return self.adapted

    def _attend(self, layer: Layer, x: Tensor, step: StepInput) -> Tensor:
        attention = step.away or self.attention
        assert attention is not None
        if step.adapters is not None:
            step.adapters.enter()
        part = self.rank.reduce(layer.attention(x, step.positions, step.meta, attention))
        return part if layer.attention_post is None else layer.attention_post(None, part)[0]

    def _pass_mlp(self, layer: Layer, x: Tensor, step: StepInput, routing: Tensor | None) -> Tensor:
        if step.adapters is not None:
            step.adapters.enter()
        if routing is None:
            part = self.rank.reduce(layer.mlp(x, step.taken))
        else:
            assert isinstance(layer.mlp, Mixture)
            part = self.rank.reduce(layer.mlp.routed(x, step.taken, routing))
        return part if layer.mlp_post is None else layer.mlp_post(None, part)[0]


def _through_space(
    space: Space, visit: Visit, layers: tuple[int, int], beside: int
) -> Generator[Piece, None, tuple[Tensor, Tensor]]:
    """`Decoder.through` by recorded calls. What comes out is good until this thread runs another step."""
    assert visit.x is not None
    held, threads = beside + 2 * visit.x.nbytes, torch.get_num_threads()
    try:
        at, end = 2 * layers[0], 2 * layers[1]
        while at < end:
            at = space.run(visit, at, end, threads)
            yield Piece((at - 1) // 2, "attention" if at % 2 else "mlp", held)
        return space.end(visit)
    finally:
        space.leave(visit)
