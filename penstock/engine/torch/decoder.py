"""One decoder for all families: weights packed layer by layer, and the forward as a generator over pieces.

    x = embedding[ids]
    every layer:  x += out(attention(rotate(qk_norm(qkv(norm(x))))))     piece (layer, "attention")
                  x += mlp(norm(x)), see mlp.py                          piece (layer, "mlp")
    hidden = norm(x[rows])                                               logits = head(hidden)

A part's result is added to x by the next part's norm, in one pass.

`forward` yields after each piece, so that whoever drives it may stop between any two and go on later; nothing
outside the generator holds activations. q, k, v are one product and so are gate and up. Over N ranks each has
1/N of the heads and of each MLP: `out` and `mlp` then yield partial sums, which `reduce` adds up.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from penstock.core.errors import BadModel
from penstock.engine.torch.families import Experts, Shape
from penstock.engine.torch.kernels import add_rms_norm, qk_norm_rope_, rms_norm
from penstock.engine.torch.mlp import Mixture, Mlp, PlainMlp, Shared, Taken
from penstock.engine.torch.ports import (
    AttentionBackend,
    Linear,
    LinearMethod,
    Mask,
    ShardSpec,
    StepMeta,
)
from penstock.engine.torch.rope import RopeTable
from penstock.engine.torch.weights import WeightFolder

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

    `taken` is filled by the forward.
    """

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    rows: Tensor | None  # int64 [R]
    meta: StepMeta
    taken: Taken = field(default_factory=dict)


@dataclass(slots=True)
class Layer:
    mask: Mask
    attention_norm: Tensor
    qkv: Linear
    qk_norm: tuple[Tensor, Tensor, float] | None  # weights of q and of k [head_dim], epsilon
    out: Linear
    mlp_norm: Tensor
    mlp: Mlp


@dataclass(slots=True)
class Decoder:
    """Packed weights of one rank."""

    shape: Shape
    rank: Rank
    embedding: Tensor
    layers: list[Layer]
    final_norm: Tensor
    head: Linear
    is_head_split: bool
    rope: RopeTable
    attention: AttentionBackend | None = None

    def forward(self, step: StepInput) -> Generator[Piece, None, Tensor]:
        """Yields after every piece; returns the hidden states of `step.rows`, normed, [R, hidden]."""
        whole = (0, len(self.layers))
        x, part = yield from self.through(self.embedding[step.ids], step, whole)
        return self.finish(x, part, step.rows)

    def through(
        self, x: Tensor, step: StepInput, layers: tuple[int, int], beside: int = 0
    ) -> Generator[Piece, None, tuple[Tensor, Tensor]]:
        """Rows x [T, hidden] through some layers: what came out is the sum of both tensors.

        `beside`: bytes of activations that whoever drives this holds besides.
        """
        held, eps = beside + 2 * x.numel() * x.element_size(), self.shape.norm_eps
        part: Tensor | None = None
        for index in range(*layers):
            layer = self.layers[index]
            normed, x = add_norm(part, x, layer.attention_norm, eps)
            part = self._attend(index, layer, normed, step)
            del normed  # not held while this stands still
            yield Piece(index, "attention", held)
            normed, x = add_norm(part, x, layer.mlp_norm, eps)
            part = self.rank.reduce(layer.mlp(normed, step.taken))
            del normed
            yield Piece(index, "mlp", held)
        assert part is not None, "no layers to pass"
        return x, part

    def finish(self, x: Tensor, part: Tensor | None, rows: Tensor | None) -> Tensor:
        """The last norm, of `rows` only."""
        if rows is not None:
            x, part = x[rows], None if part is None else part[rows]
        return add_norm(part, x, self.final_norm, self.shape.norm_eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [R, vocab]"""
        out = self.head(hidden)
        return (self.rank.join(out) if self.is_head_split else out).float()

    def _attend(self, index: int, layer: Layer, x: Tensor, step: StepInput) -> Tensor:
        shape, world, meta = self.shape, self.rank.world, step.meta
        heads, kv_heads = shape.num_heads // world, shape.num_kv_heads // world
        qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, shape.head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], 1)
        qk_norm_rope_(q, k, layer.qk_norm, self.rope.upto(meta.max_context), step.positions)
        assert self.attention is not None
        out, _ = self.attention(index, q, k, v, meta, layer.mask, shape.head_dim**-0.5)
        return self.rank.reduce(layer.out(out.flatten(1)))


def add_norm(part: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMS norm of x + part, x + part)"""
    if part is None:
        return rms_norm(x, weight, eps), x
    return add_rms_norm(part, x, weight, eps)


class _Packer:
    """Reads and packs one layer's linears with this rank's shards."""

    def __init__(self, folder: WeightFolder, method: LinearMethod, rank: Rank) -> None:
        self.folder, self.method, self.rank = folder, method, rank

    def shard(self, dim: Literal["none", "out", "in"]) -> ShardSpec:
        return ShardSpec(dim, self.rank.rank, self.rank.world)

    def merged(self, names: list[tuple[str, int]], width: int, has_bias: bool) -> Linear:
        """Layers that read the same input, as one: `names` of (tensor prefix, whole number of outputs)."""
        shard, get = self.shard("out"), self.folder.get
        weights = [get(f"{name}.weight", (size, width), shard) for name, size in names]
        biases = [get(f"{name}.bias", (size,), shard) for name, size in names] if has_bias else []
        bias = torch.cat(biases) if biases else None
        return self.method.pack(torch.cat(weights), bias, shard)

    def split_input(self, name: str, size: int, width: int, has_bias: bool) -> Linear:
        """A layer whose partial sums are added over ranks: only the first rank adds the bias."""
        shard = self.shard("in")
        weight = self.folder.get(f"{name}.weight", (size, width), shard)
        bias = self.folder.get(f"{name}.bias", (size,)) if has_bias else None
        return self.method.pack(weight, bias if self.rank.rank == 0 else None, shard)

    def mlp(
        self,
        prefix: str,
        names: tuple[str, str, str],
        size: tuple[int, int],
        has_bias: bool = False,
    ) -> PlainMlp:
        """`names` of gate, up and down; `size` is (hidden, width)."""
        gate, up, down = (f"{prefix}{name}" for name in names)
        hidden, width = size
        return PlainMlp(
            self.merged([(gate, width), (up, width)], hidden, has_bias),
            self.split_input(down, hidden, width, has_bias),
        )

    def whole(self, weight: Tensor) -> Linear:
        """A layer that every rank has whole."""
        return self.method.pack(weight, None, self.shard("none"))


def load_decoder(folder: WeightFolder, shape: Shape, method: LinearMethod, rank: Rank) -> Decoder:
    """Read and pack all layers; the attention backend is set afterwards, from the memory left. Raises BadModel."""
    packer = _Packer(folder, method, rank)
    prefix = folder.prefix
    embedding = folder.get(f"{prefix}embed_tokens.weight", (shape.vocab_size, shape.hidden))
    layers = [
        _load_layer(packer, shape, index, f"{prefix}layers.{index}.")
        for index in range(shape.num_layers)
    ]
    is_split = rank.world > 1 and shape.vocab_size % rank.world == 0
    spec = packer.shard("out" if is_split else "none")
    whole = (shape.vocab_size, shape.hidden)
    if shape.is_tied:
        each = shape.vocab_size // rank.world
        head = embedding[rank.rank * each : (rank.rank + 1) * each] if is_split else embedding
    else:
        head = folder.get("lm_head.weight", whole, spec)
    return Decoder(
        shape=shape,
        rank=rank,
        embedding=embedding,
        layers=layers,
        final_norm=folder.get(f"{prefix}norm.weight", (shape.hidden,)),
        head=method.pack(head, None, spec),
        is_head_split=is_split,
        rope=RopeTable(shape.rope, shape.head_dim, folder.device),
    )


def _load_layer(packer: _Packer, shape: Shape, index: int, prefix: str) -> Layer:
    get, hidden = packer.folder.get, shape.hidden
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attn = f"{prefix}self_attn."
    qk_norm = None
    if shape.has_qk_norm:
        names = (f"{attn}q_norm.weight", f"{attn}k_norm.weight")
        q_weight, k_weight = (get(name, (shape.head_dim,)) for name in names)
        qk_norm = (q_weight, k_weight, shape.norm_eps)
    return Layer(
        mask=Mask("causal", shape.windows[index]),
        attention_norm=get(f"{prefix}input_layernorm.weight", (hidden,)),
        qkv=packer.merged(
            [(f"{attn}q_proj", query), (f"{attn}k_proj", key), (f"{attn}v_proj", key)],
            hidden,
            shape.has_qkv_bias,
        ),
        qk_norm=qk_norm,
        out=packer.split_input(f"{attn}o_proj", hidden, query, shape.has_out_bias),
        mlp_norm=get(f"{prefix}post_attention_layernorm.weight", (hidden,)),
        mlp=_load_mlp(packer, shape, index, prefix),
    )


def _load_mlp(packer: _Packer, shape: Shape, index: int, prefix: str) -> Mlp:
    mixed = shape.experts
    if mixed is not None and mixed.layers[index]:
        return _load_mixture(packer, shape, mixed, index, f"{prefix}{mixed.block}.")
    names, width = ("gate_proj", "up_proj", "down_proj"), shape.intermediate
    return packer.mlp(f"{prefix}mlp.", names, (shape.hidden, width), shape.has_mlp_bias)


def _load_mixture(packer: _Packer, shape: Shape, mixed: Experts, index: int, block: str) -> Mixture:
    hidden, get = shape.hidden, packer.folder.get
    names, size = (mixed.gate, mixed.up, mixed.down), (hidden, mixed.width)
    shared = None
    if mixed.shared_width is not None:
        whole = (hidden, mixed.shared_width)
        shared = Shared(
            packer.mlp(f"{block}shared_expert.", names, whole),
            packer.whole(get(f"{block}shared_expert_gate.weight", (1, hidden))),
        )
    return Mixture(
        layer=index,
        router=packer.whole(get(f"{block}gate.weight", (mixed.count, hidden))),
        experts=[
            packer.mlp(f"{block}experts.{expert}.", names, size) for expert in range(mixed.count)
        ],
        top_k=mixed.top_k,
        is_normed=mixed.is_normed,
        shared=shared,
    )


def check_split(shape: Shape, world: int, where: str) -> None:
    """Raises BadModel unless heads and MLPs divide over `world` ranks."""
    mixed = shape.experts
    for what, size in (
        ("attention heads", shape.num_heads),
        ("key/value heads", shape.num_kv_heads),
        ("MLP width", shape.intermediate if mixed is None or not all(mixed.layers) else 0),
        ("width of an expert", mixed.width if mixed else 0),
        ("width of the shared expert", (mixed.shared_width or 0) if mixed else 0),
    ):
        if size % world:
            raise BadModel(
                f"{where}: {size} {what} do not divide over {world} processes",
                hint="choose a tensor_parallel that divides all of heads, kv heads and MLP width",
            )
