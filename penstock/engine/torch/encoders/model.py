"""The forward of an encoder over packed texts: no row is computed for padding.

    x = norm(word + position + type)
    every layer:   x = norm(x + attention(x));  x = norm(x + mlp(x))           BERT and its relatives
                   x += attention(norm(x));     x += mlp(norm(x))              ModernBERT, and a norm at the end

Texts lie one behind the other, sorted by length, so that linear layers and norms run over all tokens at once. In
attention the texts of one length are one batch: nothing is masked, and what a text gets does not depend on others.
Layers are made in load.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch.decoder import Piece
from penstock.engine.torch.encoders.pooling import Gathered, Pooler, as_bytes
from penstock.engine.torch.encoders.shape import EncoderShape
from penstock.engine.torch.ports import Linear
from penstock.engine.torch.rope import RopeTable

ROW_CAP = 8192  # tokens of one forward
BUCKETS, FARTHEST = 32, 128
Activate = Callable[[Tensor], Tensor]


class Text(NamedTuple):
    """`second_at`: where the second of two texts begins; None = there is one."""

    ids: Sequence[int]
    second_at: int | None = None


class Run(NamedTuple):
    """Texts of one length, one behind the other from row `start` on."""

    start: int
    texts: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.texts * self.length)


@dataclass(slots=True)
class Norm:
    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(slots=True)
class Layer:
    """`attention_norm` None: the first of ModernBERT's layers reads what was normed already."""

    qkv: Linear
    out: Linear
    attention_norm: Norm | None
    up: Linear
    down: Linear
    mlp_norm: Norm
    rope: RopeTable | None = None
    reach: int | None = None


@dataclass(slots=True, kw_only=True)
class Encoder:
    """Packed weights. `score` makes the labels of pooled states [n, hidden]; None: the model gives embeddings."""

    shape: EncoderShape
    device: torch.device
    words: Tensor
    positions: Tensor | None
    types: Tensor | None
    embedding_norm: Norm
    layers: list[Layer]
    final_norm: Norm | None
    activate: Activate
    pooler: Pooler
    distances: Tensor | None = None  # [buckets, heads]
    score: Callable[[Tensor], Tensor] | None = None

    def vectors(
        self, texts: Sequence[Text], row_cap: int = ROW_CAP
    ) -> Generator[Piece, None, list[bytes | None]]:
        """One vector a text, in fp32; None where it is not finite. Yields after every layer."""
        order = sorted(range(len(texts)), key=lambda at: len(texts[at].ids))
        found: dict[int, bytes | None] = {}
        for part in _parts(order, texts, row_cap):
            told = yield from self._forward([texts[at] for at in part])
            found.update(zip(part, told, strict=True))
        return [found[at] for at in range(len(texts))]

    def _forward(self, texts: Sequence[Text]) -> Generator[Piece, None, list[bytes | None]]:
        runs = _runs(texts)
        x, places = self._embed(texts)
        biases = {run.length: self._bias(run.length) for run in runs}
        for index, layer in enumerate(self.layers):
            if self.shape.is_pre_normed:
                normed = x if layer.attention_norm is None else layer.attention_norm(x)
                x = x + self._attend(layer, normed, places, runs, biases)
                x = x + self._pass_mlp(layer, layer.mlp_norm(x))
            else:
                assert layer.attention_norm is not None
                x = layer.attention_norm(x + self._attend(layer, x, places, runs, biases))
                x = layer.mlp_norm(x + self._pass_mlp(layer, x))
            yield Piece(index, "mlp", x.nbytes)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return self._told(x, texts)

    def _embed(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """(what enters the first layer, the position of each row)"""
        ids = torch.tensor([id for text in texts for id in text.ids], device=self.device)
        places = torch.cat([torch.arange(len(text.ids)) for text in texts]).to(self.device)
        x = self.words[ids]
        if self.types is not None:
            types = [
                int(text.second_at is not None and at >= text.second_at and len(self.types) > 1)
                for text in texts
                for at in range(len(text.ids))
            ]
            x = x + self.types[torch.tensor(types, device=self.device)]
        if self.positions is not None:
            x = x + self.positions[places + self.shape.first_position]
        return self.embedding_norm(x), places

    def _attend(
        self,
        layer: Layer,
        x: Tensor,
        places: Tensor,
        runs: Sequence[Run],
        biases: dict[int, Tensor | None],
    ) -> Tensor:
        heads, dim = self.shape.num_heads, self.shape.head_dim
        q, k, v = layer.qkv(x).view(-1, 3, heads, dim).unbind(1)
        if layer.rope is not None:
            turns = layer.rope.upto(runs[-1].length)[places]
            q, k = _turned(q, turns), _turned(k, turns)
        out = torch.empty_like(x)
        for run in runs:
            q1, k1, v1 = (
                one[run.rows].view(run.texts, run.length, heads, dim).transpose(1, 2)
                for one in (q, k, v)
            )
            mask = biases[run.length]
            if layer.reach is not None and run.length > layer.reach + 1:
                mask = _near(run.length, layer.reach, self.device)
            seen = F.scaled_dot_product_attention(q1, k1, v1, attn_mask=mask)
            out[run.rows] = seen.transpose(1, 2).reshape(-1, heads * dim)
        return layer.out(out)

    def _pass_mlp(self, layer: Layer, x: Tensor) -> Tensor:
        wide = layer.up(x)
        if not self.shape.is_gated:
            return layer.down(self.activate(wide))
        gate, up = wide.chunk(2, -1)
        return layer.down(self.activate(gate) * up)

    def _bias(self, length: int) -> Tensor | None:
        """What is added to the scores of each head, by distance: [1, heads, length, length]."""
        if self.distances is None:
            return None
        at = torch.arange(length, device=self.device)
        buckets = bucket_of(at[None, :] - at[:, None])
        return self.distances[buckets].permute(2, 0, 1)[None].contiguous()

    def _told(self, x: Tensor, texts: Sequence[Text]) -> list[bytes | None]:
        gathered, start = [], 0
        labels = self.shape.labels
        for text in texts:
            count = len(text.ids)
            if labels is None:
                one = self.pooler.gathered(count)
            else:
                one = Gathered((labels.pools,), count)
            one.add(x[start : start + count], 0)
            gathered.append(one)
            start += count
        if self.score is None:
            return self.pooler.vectors(gathered)
        return as_bytes(self.score(torch.stack([one.pooled() for one in gathered])))


def bucket_of(distance: Tensor) -> Tensor:
    """The bucket of key minus query position: 16 to each side, 8 exact, then wider and wider up to FARTHEST."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    far = distance.abs()
    wide = torch.log(far.clamp_min(1).float() / exact) / torch.log(torch.tensor(FARTHEST / exact))
    # Truncated like the reference, which multiplies in fp32.
    beyond = (exact + (wide * (half - exact)).long()).clamp_max(half - 1)
    return torch.where(far < exact, far, beyond) + half * (distance > 0)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [T, heads, dim] by a row [T, dim] of cosines, then sines."""
    cos, sin = (part[:, None] for part in turns.chunk(2, -1))
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _near(length: int, reach: int, device: torch.device) -> Tensor:
    at = torch.arange(length, device=device)
    return (at[:, None] - at[None, :]).abs() <= reach


def _runs(texts: Sequence[Text]) -> list[Run]:
    found, start = [], 0
    for length, same in groupby(texts, key=lambda text: len(text.ids)):
        count = len(list(same))
        found.append(Run(start, count, length))
        start += count * length
    return found


def _parts(order: Sequence[int], texts: Sequence[Text], row_cap: int) -> list[list[int]]:
    """Texts that are passed together: in order, at most `row_cap` tokens of them (or one text)."""
    parts: list[list[int]] = [[]]
    room = row_cap
    for at in order:
        count = len(texts[at].ids)
        if parts[-1] and count > room:
            parts.append([])
            room = row_cap
        parts[-1].append(at)
        room -= count
    return [part for part in parts if part]
