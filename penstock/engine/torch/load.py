"""From a folder's tensors to a Decoder: which tensor goes where, merged with its neighbours, cut to a rank's shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.core.errors import BadModel
from penstock.engine.torch.checkpoints.join import Apart, Weight, expanded, joined, rows_of
from penstock.engine.torch.decoder import Decoder, Layer, Rank
from penstock.engine.torch.families import Latent, Shape
from penstock.engine.torch.heads import GroupedHeads, Heads, LatentHeads
from penstock.engine.torch.kernels import gelu_mul, silu_mul
from penstock.engine.torch.linear import for_head, for_router
from penstock.engine.torch.load_mixture import load_mixture
from penstock.engine.torch.mlp import Mixture, Mlp, PlainMlp, relu_mul
from penstock.engine.torch.norms import LayerNorm, Norm, RmsNorm, Scaled, Unnormed
from penstock.engine.torch.ports import Linear, LinearMethod, Mask, QuantisedMethod, ShardSpec
from penstock.engine.torch.positions import Rope
from penstock.engine.torch.quantised import Quantised
from penstock.engine.torch.rope import RopeTable
from penstock.engine.torch.weights import WeightFolder

LATENT_EPS = 1e-6  # of the norms of latents, whatever the model's other norms have
Sized = tuple[str, int]  # the name of a part, and how many outputs it has as a whole


class Packer:
    """Reads and packs one model's layers with this rank's shards.

    Weights that are stored in few bits go to `quantised` as they are. Where that is None they are dequantised first.
    """

    def __init__(
        self,
        folder: WeightFolder,
        shape: Shape,
        method: LinearMethod,
        rank: Rank,
        quantised: QuantisedMethod | None = None,
        *,
        has_experts: bool = True,
    ) -> None:
        """Without `has_experts` those of mixtures are left to others (elastic/)."""
        self.folder, self.shape, self.method, self.rank = folder, shape, method, rank
        self.quantised, self.has_experts = quantised, has_experts
        self._ropes: dict[Rope, RopeTable] = {}

    def shard(self, dim: Literal["none", "out", "in"]) -> ShardSpec:
        return ShardSpec(dim, self.rank.rank, self.rank.world)

    def merged(self, parts: Sequence[Sized], width: int, has_bias: bool) -> Linear:
        """Layers that read the same input, as one."""
        shard = self.shard("out")
        weights = self._read(parts, "weight", (width,), shard)
        biases = self._read(parts, "bias", (), shard) if has_bias else None
        return self.pack(weights, None if biases is None else torch.cat(_floats(biases)), shard)

    def pack(
        self,
        parts: Sequence[Weight],
        bias: Tensor | None,
        shard: ShardSpec,
        method: LinearMethod | None = None,
    ) -> Linear:
        """One layer of the rows of all parts. `method`: instead of that of most layers."""
        if self.quantised is None:
            dtype = self.folder.dtype
            parts = [
                expanded(part, dtype) if isinstance(part, Quantised) else part for part in parts
            ]
        whole = joined(parts)
        biases = (
            [None] * len(whole)
            if bias is None
            else torch.split(bias, [part.shape[0] for part in whole])
        )
        method = method or self.method
        layers = [
            self._packed(method, part, one, shard) for part, one in zip(whole, biases, strict=True)
        ]
        return layers[0] if len(layers) == 1 else Apart(tuple(layers))

    def _packed(
        self, method: LinearMethod, weight: Weight, bias: Tensor | None, shard: ShardSpec
    ) -> Linear:
        if isinstance(weight, Tensor):
            return method.pack(weight, bias, shard)
        assert self.quantised is not None
        return self.quantised.pack_quantised(weight, bias)

    def _read(
        self, parts: Sequence[Sized], kind: str, width: tuple[int, ...], shard: ShardSpec
    ) -> list[Weight]:
        """Parts of one name are rows of one tensor, in order."""
        sizes: dict[str, int] = {}
        for name, size in parts:
            sizes[name] = sizes.get(name, 0) + size
        found: list[Weight] = []
        starts = dict.fromkeys(sizes, 0)
        for name, size in parts:
            rows = range(starts[name], starts[name] + size)
            found.append(self.folder.weight(f"{name}.{kind}", (sizes[name], *width), shard, rows))
            starts[name] = rows.stop
        return found

    def split_input(self, name: str, size: int, width: int, has_bias: bool) -> Linear:
        """A layer whose partial sums are added over ranks: only the first rank adds the bias."""
        shard = self.shard("in")
        weight = self.folder.weight(f"{name}.weight", (size, width), shard)
        bias = self.folder.get(f"{name}.bias", (size,)) if has_bias else None
        return self.pack([weight], bias if self.rank.rank == 0 else None, shard)

    def whole(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """A layer that every rank has whole."""
        return self.pack([weight], bias, self.shard("none"))

    def tied(self, embedding: Tensor, spec: ShardSpec) -> Weight:
        """The head that is the embedding, which is in few bits where both the file and its method have it so."""
        name = f"{self.folder.prefix}embed_tokens.weight"
        if self.quantised is not None and self.folder.is_quantised(name):
            return self.folder.weight(name, (self.shape.vocab_size, self.shape.hidden), spec)
        each = len(embedding) // spec.world
        is_whole = spec.dim == "none"
        return embedding if is_whole else embedding[spec.rank * each : (spec.rank + 1) * each]

    def router(self, weight: Weight) -> Linear:
        """What decides between experts: whole, and as it is stored."""
        return self.pack([weight], None, self.shard("none"), for_router(self.method))

    def mlp(
        self, names: tuple[str | None, str, str], width: int, has_bias: bool = False
    ) -> PlainMlp:
        """`names` of gate (None: there is none), up and down; `width` between them."""
        gate, up, down = names
        parts = [(up, width)] if gate is None else [(gate, width), (up, width)]
        hidden = self.shape.hidden
        return PlainMlp(
            self.merged(parts, hidden, has_bias),
            self.split_input(down, hidden, width, has_bias),
            self._activate(gate is not None),
        )

    def _activate(self, is_gated: bool) -> Callable[[Tensor], Tensor]:
        if self.shape.activation == "gelu_tanh":
            return gelu_mul if is_gated else partial(F.gelu, approximate="tanh")
        if self.shape.activation == "relu":
            return relu_mul if is_gated else F.relu
        return silu_mul if is_gated else F.silu

    def weight_of_norm(self, name: str, width: int) -> Tensor:
        weight = self.folder.get(f"{name}.weight", (width,))
        return weight.float() + 1 if self.shape.norm == "rms_offset" else weight

    def norm(self, name: str, scale: float = 1.0) -> Norm:
        """`scale`: of what it puts out."""
        shape = self.shape
        weight = self.weight_of_norm(name, shape.hidden)
        weight = weight if scale == 1.0 else weight * scale
        if shape.norm == "layer":
            bias = self.folder.get(f"{name}.bias", (shape.hidden,))
            return LayerNorm(weight, bias, shape.norm_eps)
        return RmsNorm(weight, shape.norm_eps)

    def rope(self, layer: int, head_dim: int) -> RopeTable:
        """Layers that turn positions alike share a table."""
        rope = self.shape.rope_of(layer)
        if rope not in self._ropes:
            self._ropes[rope] = RopeTable(rope, head_dim, self.folder.device)
        return self._ropes[rope]


def load_decoder(
    folder: WeightFolder,
    shape: Shape,
    method: LinearMethod,
    rank: Rank,
    quantised: QuantisedMethod | None = None,
    *,
    has_experts: bool = True,
) -> Decoder:
    """Read and pack all layers; the attention backend is set afterwards, from the memory left. Raises BadModel."""
    packer = Packer(folder, shape, method, rank, quantised, has_experts=has_experts)
    prefix = folder.prefix
    embedding = folder.get(f"{prefix}embed_tokens.weight", (shape.vocab_size, shape.hidden))
    layers = [
        _load_layer(packer, index, f"{prefix}layers.{index}.") for index in range(shape.num_layers)
    ]
    head, is_split = _load_head(packer, embedding)
    final_norm = packer.norm(f"{prefix}{shape.names.final_norm}", shape.logit_scale)
    if has_experts:
        folder.check_layers(shape.num_layers)
    scale = shape.embedding_scale
    if scale is not None:  # rounded like the embeddings that it multiplies
        scale = float(torch.tensor(scale, dtype=folder.dtype))
    return Decoder(
        shape=shape,
        rank=rank,
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        head=head,
        is_head_split=is_split,
        embedding_scale=scale,
    )


def _load_head(packer: Packer, embedding: Tensor) -> tuple[Linear, bool]:
    """(the head, whether ranks have parts of it)"""
    shape, rank = packer.shape, packer.rank
    if not shape.has_head:
        return packer.whole(embedding[:1]), False
    is_split = rank.world > 1 and shape.vocab_size % rank.world == 0
    spec = packer.shard("out" if is_split else "none")
    name = (
        "language_model.lm_head" if packer.folder.prefix == "language_model.model." else "lm_head"
    )
    if shape.is_tied:
        weight = packer.tied(embedding, spec)
    else:
        whole = (shape.vocab_size, shape.hidden)
        weight = packer.folder.weight(f"{name}.weight", whole, spec)
    bias = None
    if shape.has_head_bias:
        bias = packer.folder.get(f"{name}.bias", (shape.vocab_size,), spec)
    return packer.pack([weight], bias, spec, for_head(packer.method)), is_split


def _load_layer(packer: Packer, index: int, prefix: str) -> Layer:
    shape, names = packer.shape, packer.shape.names

    def before(name: str) -> Norm:
        return Unnormed() if shape.is_post_normed else packer.norm(f"{prefix}{name}")

    def behind(name: str | None) -> Norm | None:
        if name is not None:
            return packer.norm(f"{prefix}{name}")
        return None if shape.part_scale == 1.0 else Scaled(shape.part_scale)

    mlp = _load_mlp(packer, index, prefix)
    early = shape.experts is not None and shape.experts.is_early
    return Layer(
        attention_norm=before(names.attention_norm),
        attention=_load_heads(packer, index, prefix),
        mlp_norm=None if names.mlp_norm is None else before(names.mlp_norm),
        mlp=mlp,
        early=mlp.router if isinstance(mlp, Mixture) and early else None,
        attention_post=behind(names.attention_post),
        mlp_post=behind(names.mlp_post),
    )


def _load_heads(packer: Packer, index: int, prefix: str) -> Heads:
    if packer.shape.latent is not None:
        return load_latent_heads(packer, packer.shape.latent, index, f"{prefix}self_attn.")
    shape, names, dim = packer.shape, packer.shape.names, packer.shape.head_dim
    query, key = shape.num_heads * dim, shape.num_kv_heads * dim
    qk_norm = None
    if shape.has_qk_norm or shape.has_wide_norm:
        widths = (query, key) if shape.has_wide_norm else (dim, dim)
        q_weight, k_weight = (
            packer.weight_of_norm(f"{prefix}self_attn.{name}", width)
            for name, width in zip(("q_norm", "k_norm"), widths, strict=True)
        )
        qk_norm = (q_weight, k_weight, shape.norm_eps)
    parts = [(names.q, query), (names.k, key), (names.v, key)]
    return GroupedHeads(
        layer=index,
        num_heads=shape.num_heads // packer.rank.world,
        num_kv_heads=shape.num_kv_heads // packer.rank.world,
        head_dim=dim,
        mask=Mask("causal", shape.windows[index], shape.score_cap),
        scale=shape.scale,
        rope=packer.rope(index, dim),
        qkv=packer.merged(
            [(f"{prefix}{name}", size) for name, size in parts], shape.hidden, shape.has_qkv_bias
        ),
        qk_norm=None if shape.has_wide_norm else qk_norm,
        wide_norm=qk_norm if shape.has_wide_norm else None,
        out=packer.split_input(f"{prefix}{names.out}", shape.hidden, query, shape.has_out_bias),
    )


def load_latent_heads(packer: Packer, told: Latent, index: int, prefix: str) -> LatentHeads:
    """The names are DeepSeek's. What all heads share, every rank has whole."""
    shape, get, shard = packer.shape, packer.folder.get, packer.shard("out")
    stored = packer.folder.weight
    hidden, heads = shape.hidden, shape.num_heads // packer.rank.world
    query_down, name, width = None, "q_proj", hidden
    if told.query_rank is not None:
        name, width = "q_b_proj", told.query_rank
        weight = stored(f"{prefix}q_a_proj.weight", (width, hidden))
        norm = get(f"{prefix}q_a_layernorm.weight", (width,))
        query_down = (packer.whole(weight), norm, LATENT_EPS)
    each = told.plain + told.rotated
    query = stored(f"{prefix}{name}.weight", (shape.num_heads * each, width), shard)
    places = torch.arange(heads * each).view(heads, each)
    plain, rotated = torch.split(places, [told.plain, told.rotated], 1)
    query_rows = torch.cat((plain.flatten(), _unlaced(rotated).flatten()))
    down = stored(f"{prefix}kv_a_proj_with_mqa.weight", (told.cached, hidden))
    latent, key = torch.split(torch.arange(told.cached), [told.width, told.rotated])
    down_rows = torch.cat((latent, _unlaced(key[None])[0]))
    each = told.plain + told.value
    up = get(f"{prefix}kv_b_proj.weight", (shape.num_heads * each, told.width), shard)
    to_key, to_value = torch.split(up.view(heads, each, told.width), [told.plain, told.value], 1)
    return LatentHeads(
        layer=index,
        num_heads=heads,
        latent=told,
        mask=Mask("causal", shape.windows[index], shape.score_cap),
        scale=shape.scale,
        rope=packer.rope(index, told.rotated),
        query_down=query_down,
        query=packer.pack([rows_of(query, query_rows)], None, shard),
        down=packer.whole(rows_of(down, down_rows)),
        norm=(get(f"{prefix}kv_a_layernorm.weight", (told.width,)), LATENT_EPS),
        to_latent=to_key.contiguous(),
        to_value=to_value.transpose(1, 2).contiguous(),
        out=packer.split_input(
            f"{prefix}o_proj", hidden, shape.num_heads * told.value, has_bias=False
        ),
    )


def _floats(parts: Sequence[Weight]) -> list[Tensor]:
    assert all(isinstance(part, Tensor) for part in parts), "a bias is never in few bits"
    return [part for part in parts if isinstance(part, Tensor)]


def _unlaced(rows: Tensor) -> Tensor:
    """Rows [H, R] that turn as neighbours (2i, 2i + 1), in the order in which (i, i + R/2) turn."""
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), 1)


def _load_mlp(packer: Packer, index: int, prefix: str) -> Mlp:
    shape, names = packer.shape, packer.shape.names
    mixed = shape.experts
    if mixed is not None and mixed.layers[index]:
        return load_mixture(packer, mixed, index, f"{prefix}{mixed.block}.")
    gate = None if names.gate is None else f"{prefix}{names.gate}"
    told = (gate, f"{prefix}{names.up}", f"{prefix}{names.down}")
    return packer.mlp(told, shape.intermediate, shape.has_mlp_bias)


def check_split(shape: Shape, world: int, where: str) -> None:
    """Raises BadModel unless heads and MLPs divide over `world` ranks."""
    mixed = shape.experts
    if shape.has_wide_norm and world > 1:
        raise BadModel(f"{where}: norms over all heads cannot be split over {world} processes")
    for what, size in (
        ("attention heads", shape.num_heads),
        ("key/value heads", shape.num_kv_heads if shape.latent is None else 0),
        ("MLP width", shape.intermediate if mixed is None or not all(mixed.layers) else 0),
        ("width of an expert", mixed.width if mixed else 0),
        ("width of the shared expert", (mixed.shared_width or 0) if mixed else 0),
    ):
        if size % world:
            raise BadModel(
                f"{where}: {size} {what} do not divide over {world} processes",
                hint="choose a tensor_parallel that divides all of heads, kv heads and MLP width",
            )
