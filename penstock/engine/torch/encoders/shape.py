"""BERT and its relatives: what their configuration files and tensor names mean. Reads no weights, imports no torch.

    bert         learnt positions, token types; norms behind attention and MLP; a pooler before the labels
    roberta      XLM-R and CamemBERT too: positions begin behind the padding's id; one token type
    mpnet        as roberta without token types; scores get a learnt bias for each distance, the same in all layers
    distilbert   as bert without token types and pooler
    modernbert   rotary positions, norms before attention and MLP, gated MLPs; windows in two of three layers

All see both sides of a position. With `...ForSequenceClassification` a model has labels: it tells numbers about a text,
or about a pair of texts, and gives no embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from penstock.core.errors import BadModel
from penstock.engine.torch.families.shape import STORED, Shape
from penstock.engine.torch.positions import Rope, read_rope
from penstock.engine.torch.reading import Config, Reader

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
LabelHead = Literal["pooler", "dense", "relu", "normed"]
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
LABELLED = "ForSequenceClassification"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How tensors are called. `attention_norm` and `mlp_norm` stand behind their part, or before it if pre-normed."""

    words: str = "embeddings.word_embeddings"
    embedding_norm: str = "embeddings.LayerNorm"
    layer: str = "encoder.layer"
    q: str = "attention.self.query"
    k: str = "attention.self.key"
    v: str = "attention.self.value"
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"


BERT = Names()
MPNET = replace(
    BERT,
    q="attention.attn.q",
    k="attention.attn.k",
    v="attention.attn.v",
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
)
DISTIL = replace(
    BERT,
    layer="transformer.layer",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)
MODERN = Names(
    words="embeddings.tok_embeddings",
    embedding_norm="embeddings.norm",
    layer="layers",
    q="attn.Wqkv",
    k="attn.Wqkv",
    v="attn.Wqkv",
    out="attn.Wo",
    attention_norm="attn_norm",
    up="mlp.Wi",
    down="mlp.Wo",
    mlp_norm="mlp_norm",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """`count` numbers about a text. `pools`: of which state they are made."""

    count: int
    head: LabelHead
    pools: Literal["cls", "mean"] = "cls"
    activation: Activation = "gelu"
    has_bias: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderShape:
    """`num_positions` None: rotary. `reach`: by layer, how far to each side it sees, None = everything."""

    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    norm_eps: float
    max_context: int
    activation: Activation
    names: Names
    num_positions: int | None = None
    first_position: int = 0
    num_types: int = 0
    num_buckets: int | None = None
    is_pre_normed: bool = False
    is_gated: bool = False
    has_attention_bias: bool = True
    has_mlp_bias: bool = True
    has_norm_bias: bool = True
    ropes: tuple[Rope, ...] = ()
    reach: tuple[int | None, ...] = ()
    labels: Labels | None = None
    stored_dtype: str = "fp32"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    def as_shape(self) -> Shape:
        """What is asked of every model."""
        return Shape(
            family=self.family,
            vocab_size=self.vocab_size,
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            norm_eps=self.norm_eps,
            max_context=self.max_context,
            rope=self.ropes[0] if self.ropes else Rope(),
            windows=(None,) * self.num_layers,
            is_tied=True,
            has_head=False,
            stored_dtype=self.stored_dtype,
        )


def is_encoder(config: Config) -> bool:
    return config.get("model_type") in FAMILIES


def read_encoder(config: Config, where: str) -> EncoderShape:
    """Read a parsed config.json. Raises BadModel."""
    read = Reader(config, where)
    told = config.get("position_embedding_type", "absolute")
    if told != "absolute":
        raise BadModel(f"{where}: position_embedding_type {told!r} is not supported")
    for key in ("is_decoder", "add_cross_attention"):
        if config.get(key):
            raise BadModel(f"{where}: {key} is not supported in an encoder")
    shape = FAMILIES[str(config["model_type"])](read)
    if shape.hidden % shape.num_heads:
        raise BadModel(f"{where}: {shape.num_heads} heads do not divide a width of {shape.hidden}")
    return shape


def _encoder(read: Reader, family: str, **facts: object) -> EncoderShape:
    """From the keys that the families share."""
    stored = read.config.get("dtype") or read.config.get("torch_dtype") or "float32"
    told = str(read.config.get("hidden_activation") or read.config.get("hidden_act") or "gelu")
    if told not in ACTIVATIONS:
        raise BadModel(
            f"{read.where}: hidden_act {told!r} is not supported",
            hint=f"supported are {', '.join(ACTIVATIONS)}",
        )
    first = int(str(facts.get("first_position", 0)))
    positions = read.integer("max_position_embeddings", 512)
    shared: dict[str, object] = {
        "vocab_size": read.integer("vocab_size"),
        "hidden": read.integer("hidden_size"),
        "intermediate": read.integer("intermediate_size"),
        "num_layers": read.integer("num_hidden_layers"),
        "num_heads": read.integer("num_attention_heads"),
        "norm_eps": read.number("layer_norm_eps", 1e-12),
        "max_context": positions - first,
        "num_positions": positions,
        "activation": ACTIVATIONS[told],
        "names": BERT,
        "stored_dtype": STORED.get(str(stored), "fp32"),
    }
    return EncoderShape(family=family, **{**shared, **facts})  # type: ignore[arg-type]


def _bert(read: Reader) -> EncoderShape:
    return _encoder(
        read, "bert", num_types=read.integer("type_vocab_size", 2), labels=_labels(read, "pooler")
    )


def _roberta(read: Reader) -> EncoderShape:
    padding = read.config.get("pad_token_id", 1)
    if not isinstance(padding, int):
        raise BadModel(f"{read.where}: pad_token_id must be an integer, got {padding!r}")
    return _encoder(
        read,
        "roberta",
        first_position=padding + 1,
        num_types=read.integer("type_vocab_size", 2),
        labels=_labels(read, "dense"),
    )


def _mpnet(read: Reader) -> EncoderShape:
    if read.integer("relative_attention_num_buckets", 32) != 32:
        raise BadModel(f"{read.where}: relative_attention_num_buckets must be 32")
    return _encoder(
        read,
        "mpnet",
        first_position=2,  # behind a padding id that its code fixes
        num_buckets=32,
        names=MPNET,
        labels=_labels(read, "dense"),
    )


DISTIL_KEYS = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_act": "activation",
}


def _distilbert(read: Reader) -> EncoderShape:
    named = {ours: read.config[key] for ours, key in DISTIL_KEYS.items() if key in read.config}
    read = Reader({**read.config, **named}, read.where)
    return _encoder(read, "distilbert", names=DISTIL, norm_eps=1e-12, labels=_labels(read, "relu"))


def _modernbert(read: Reader) -> EncoderShape:
    layers = read.integer("num_hidden_layers")
    kinds = _kinds(read, layers)
    rotates = {
        "full_attention": _rope(read, "full_attention", "global_rope_theta", 160_000.0),
        "sliding_attention": _rope(read, "sliding_attention", "local_rope_theta", 10_000.0),
    }
    side = read.integer("local_attention", 128) // 2
    has_bias = read.flag("attention_bias")
    return _encoder(
        read,
        "modernbert",
        names=MODERN,
        norm_eps=read.number("norm_eps", 1e-5),
        max_context=read.integer("max_position_embeddings", 8192),
        num_positions=None,
        is_pre_normed=True,
        is_gated=True,
        has_attention_bias=has_bias,
        has_mlp_bias=read.flag("mlp_bias"),
        has_norm_bias=read.flag("norm_bias"),
        ropes=tuple(rotates[kind] for kind in kinds),
        reach=tuple(side if kind == "sliding_attention" else None for kind in kinds),
        labels=_modern_labels(read),
    )


def _kinds(read: Reader, layers: int) -> list[str]:
    told = read.config.get("layer_types")
    if told is None:
        every = read.integer("global_attn_every_n_layers", 3)
        return ["sliding_attention" if at % every else "full_attention" for at in range(layers)]
    if not isinstance(told, list) or len(told) != layers:
        raise BadModel(f"{read.where}: layer_types must list {layers} layers, got {told!r}")
    return [str(kind) for kind in told]


def _rope(read: Reader, kind: str, older: str, silent: float) -> Rope:
    told = read.config.get("rope_parameters")
    table = told.get(kind) if isinstance(told, Mapping) else None
    if isinstance(table, Mapping):
        theta = table.get("rope_theta") or silent
        table = {**table, "rope_theta": theta}
    else:
        table = {"rope_theta": read.number(older, silent)}
    context = read.integer("max_position_embeddings", 8192)
    return read_rope({"rope_parameters": table}, context, read.where)


def _labels(read: Reader, head: LabelHead) -> Labels | None:
    listed = read.config.get("architectures")
    name = str(listed[0]) if isinstance(listed, list) and listed else ""
    if not name.endswith(LABELLED):
        return None
    told = read.config.get("id2label")
    count = len(told) if isinstance(told, Mapping) and told else read.integer("num_labels", 2)
    return Labels(count=count, head=head)


def _modern_labels(read: Reader) -> Labels | None:
    found = _labels(read, "normed")
    if found is None:
        return None
    pools = read.config.get("classifier_pooling", "cls")
    act = str(read.config.get("classifier_activation", "gelu"))
    if pools not in ("cls", "mean") or act not in ACTIVATIONS:
        raise BadModel(f"{read.where}: classifier_pooling {pools!r} with {act!r} is not supported")
    return replace(
        found,
        pools=pools,
        activation=ACTIVATIONS[act],
        has_bias=read.flag("classifier_bias"),
    )


FAMILIES: dict[str, Callable[[Reader], EncoderShape]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "mpnet": _mpnet,
    "distilbert": _distilbert,
    "modernbert": _modernbert,
}
