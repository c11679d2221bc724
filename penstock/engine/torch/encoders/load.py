"""From a folder's tensors to an Encoder: packed by the same linear methods as decoders are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.core.errors import BadModel
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.encoders.model import Activate, Encoder, Layer, Norm
from penstock.engine.torch.encoders.pooling import Pooler
from penstock.engine.torch.encoders.shape import Activation, EncoderShape, Labels
from penstock.engine.torch.load import Packer
from penstock.engine.torch.ports import LinearMethod
from penstock.engine.torch.positions import Rope
from penstock.engine.torch.rope import RopeTable
from penstock.engine.torch.weights import WeightFolder

PREFIXES = ("", "bert.", "roberta.", "mpnet.", "distilbert.", "model.")
OLDER = {".weight": ".gamma", ".bias": ".beta"}  # what the norms of early checkpoints are called
ACTIVATIONS: dict[Activation, Activate] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
Score = Callable[[Tensor], Tensor]


def load_encoder(
    folder: WeightFolder, shape: EncoderShape, method: LinearMethod, pooler: Pooler
) -> Encoder:
    """Raises BadModel."""
    words = f"{shape.names.words}.weight"
    there = [prefix for prefix in PREFIXES if f"{prefix}{words}" in folder]
    if not there:
        raise BadModel(f"{folder.folder} has no tensor {words!r}")
    reading = _Reading(folder, shape, method, there[0])
    table = partial(reading.table, "embeddings")
    positions = types = distances = None
    if shape.num_positions is not None:
        positions = table("position_embeddings", shape.num_positions)
    if shape.num_types:
        types = table("token_type_embeddings", shape.num_types)
    if shape.num_buckets is not None:
        name = f"{reading.prefix}encoder.relative_attention_bias.weight"
        distances = folder.get(name, (shape.num_buckets, shape.num_heads))
    return Encoder(
        shape=shape,
        device=folder.device,
        words=folder.get(f"{reading.prefix}{words}", (shape.vocab_size, shape.hidden)),
        positions=positions,
        types=types,
        distances=distances,
        embedding_norm=reading.norm(shape.names.embedding_norm),
        layers=[reading.layer(index) for index in range(shape.num_layers)],
        final_norm=reading.norm("final_norm") if shape.is_pre_normed else None,
        activate=ACTIVATIONS[shape.activation],
        pooler=pooler,
        score=None if shape.labels is None else reading.labels(shape.labels),
    )


class _Reading:
    """Reads one model's parts. `prefix`: of all its names but those of the head."""

    def __init__(
        self, folder: WeightFolder, shape: EncoderShape, method: LinearMethod, prefix: str
    ) -> None:
        self.folder, self.shape, self.prefix = folder, shape, prefix
        self._packer = Packer(folder, shape.as_shape(), method, Alone())
        self._ropes: dict[Rope, RopeTable] = {}

    def table(self, place: str, name: str, count: int) -> Tensor:
        return self.folder.get(f"{self.prefix}{place}.{name}.weight", (count, self.shape.hidden))

    def norm(self, name: str, *, has_prefix: bool = True) -> Norm:
        def get(kind: str) -> Tensor:
            told = f"{self.prefix if has_prefix else ''}{name}"
            older = f"{told}{OLDER[kind]}"
            found = older if older in self.folder else f"{told}{kind}"
            return self.folder.get(found, (self.shape.hidden,))

        bias = get(".bias") if self.shape.has_norm_bias else None
        return Norm(get(".weight"), bias, self.shape.norm_eps)

    def layer(self, index: int) -> Layer:
        shape, names, packer = self.shape, self.shape.names, self._packer
        at = f"{names.layer}.{index}."
        place, hidden, wide = f"{self.prefix}{at}", shape.hidden, shape.intermediate
        is_first_unnormed = shape.is_pre_normed and index == 0
        parts = [(f"{place}{name}", hidden) for name in (names.q, names.k, names.v)]
        ups = 2 if shape.is_gated else 1
        return Layer(
            qkv=packer.merged(parts, hidden, shape.has_attention_bias),
            out=packer.split_input(f"{place}{names.out}", hidden, hidden, shape.has_attention_bias),
            attention_norm=None if is_first_unnormed else self.norm(f"{at}{names.attention_norm}"),
            up=packer.merged([(f"{place}{names.up}", ups * wide)], hidden, shape.has_mlp_bias),
            down=packer.split_input(f"{place}{names.down}", hidden, wide, shape.has_mlp_bias),
            mlp_norm=self.norm(f"{at}{names.mlp_norm}"),
            rope=self._rope(shape.ropes[index]) if shape.ropes else None,
            reach=shape.reach[index] if shape.reach else None,
        )

    def _rope(self, rope: Rope) -> RopeTable:
        if rope not in self._ropes:
            self._ropes[rope] = RopeTable(rope, self.shape.head_dim, self.folder.device)
        return self._ropes[rope]

    def labels(self, told: Labels) -> Score:
        """From pooled states [n, hidden] to [n, labels], in fp32."""
        hidden, count = self.shape.hidden, told.count
        if told.head == "pooler":
            first = self._dense(f"{self.prefix}pooler.dense", hidden)
            last = self._dense("classifier", count)
            return lambda x: last(torch.tanh(first(x)))
        if told.head == "dense":
            first = self._dense("classifier.dense", hidden)
            last = self._dense("classifier.out_proj", count)
            return lambda x: last(torch.tanh(first(x)))
        if told.head == "relu":
            first = self._dense("pre_classifier", hidden)
            last = self._dense("classifier", count)
            return lambda x: last(F.relu(first(x)))
        first = self._dense("head.dense", hidden, has_bias=told.has_bias)
        last, norm = self._dense("classifier", count), self._exact("head.norm")
        activate = ACTIVATIONS[told.activation]
        return lambda x: last(norm(activate(first(x))))

    def _exact(self, name: str) -> Norm:
        found = self.norm(name, has_prefix=False)
        bias = None if found.bias is None else found.bias.float()
        return Norm(found.weight.float(), bias, found.eps)

    def _dense(self, name: str, size: int, *, has_bias: bool = True) -> Score:
        weight = self.folder.get(f"{name}.weight", (size, self.shape.hidden)).float()
        bias = self.folder.get(f"{name}.bias", (size,)).float() if has_bias else None
        return lambda x: F.linear(x, weight, bias)
