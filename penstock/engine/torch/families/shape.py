"""Everything about a model but its weights, as one flat shape that one decoder runs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from penstock.engine.torch.positions import STILL, Rope

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
STORED = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}

NormKind = Literal["rms", "rms_offset", "layer"]
Activation = Literal["silu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixtures of a model: a token takes `top_k` of `count` experts of `width`.

    is_normed      the weights of a token's experts are scaled to sum to one
    scores         how the router's numbers become weights; with "sigmoid" the best two of a group speak for it, not one
    is_corrected   a bias is added to what experts are chosen by, and not to what they weigh
    scaling        their weights are multiplied by this
    groups         (g, n): experts lie in g groups, and a token takes them from the n groups with the likeliest experts
    is_early       the router reads the stream as it enters the layer, before any norm
    is_exact       the router computes in fp32 whatever the model does
    layers         one entry a layer; False = a plain MLP
    shared_width   of the expert that every token takes; None = there is none
    is_gated       that expert has a gate of its own
    block, router, gate, up, down, shared   how the tensors are called
    """

    count: int
    top_k: int
    width: int
    is_normed: bool
    layers: tuple[bool, ...]
    scores: Literal["softmax", "sigmoid"] = "softmax"
    is_corrected: bool = False
    scaling: float = 1.0
    groups: tuple[int, int] | None = None
    is_early: bool = False
    is_exact: bool = False
    shared_width: int | None = None
    is_gated: bool = True
    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Keys and values of all heads made from one vector a position: multi-head latent attention.

    width        of that vector, which is what the cache holds
    rotated      numbers of a key that carry the position; all heads share them, and the cache holds them too
    plain        numbers of a head's query and key without position
    value        width of a head's value
    query_rank   width of the bottleneck before the queries; None = there is none
    """

    width: int
    rotated: int
    plain: int
    value: int
    query_rank: int | None = None

    @property
    def cached(self) -> int:
        """Numbers that a position leaves in the cache of a layer."""
        return self.width + self.rotated


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How the tensors of a layer are called; None = the model has no such part.

    Parts of one name lie in one tensor, one below the other. Without `mlp_norm` attention and MLP read the same norm
    and their results are added at once.
    """

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    out: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_post: str | None = None  # norms of what a part adds to the stream
    mlp_post: str | None = None
    final_norm: str = "norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """`windows` has one entry a layer; None = sees all positions.

    local_rope     of layers that have a window; None = the same as of the others
    turns          one entry a layer: False = positions are not told to it; () = all layers turn
    is_post_normed parts read the stream as it is, and only what they put out is normed
    has_wide_norm  queries and keys are normed over all heads together
    part_scale     what a part puts out is multiplied by this; logit_scale the same of logits
    norm           "rms"; "rms_offset": weights are stored less one, and multiply before anything is rounded; "layer":
                   the mean is taken off first and a bias added
    score_scale    of queries times keys; None = head_dim ** -0.5
    score_cap      scores are squeezed into (-cap, cap) by a tanh; logit_cap the same of logits
    has_head       False: nobody may ask for logits
    """

    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    rope: Rope
    windows: tuple[int | None, ...]
    local_rope: Rope | None = None
    turns: tuple[bool, ...] = ()
    is_post_normed: bool = False
    has_wide_norm: bool = False
    part_scale: float = 1.0
    logit_scale: float = 1.0
    is_tied: bool = False
    has_head: bool = True
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False
    has_head_bias: bool = False
    has_qk_norm: bool = False
    norm: NormKind = "rms"
    activation: Activation = "silu"
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float | None = None
    latent: Latent | None = None
    experts: Experts | None = None
    names: Names = Names()
    stored_dtype: str = "fp32"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    @property
    def is_parallel(self) -> bool:
        """Attention and MLP of a layer read the same norm."""
        return self.names.mlp_norm is None

    def rope_of(self, layer: int) -> Rope:
        if self.turns and not self.turns[layer]:
            return STILL
        is_local = self.windows[layer] is not None and self.local_rope is not None
        return self.local_rope if is_local and self.local_rope else self.rope

    def serving(self, context: int) -> Shape:
        """The shape for texts of at most `context` positions, which decides how some models turn positions."""
        return replace(self, rope=self.rope.serving(context))

    def kv_bytes_per_token(self, dtype: str) -> int:
        """`dtype` of the cache; "int8" has a scale of four bytes for each vector."""
        vectors, numbers = 2 * self.num_kv_heads, self.head_dim
        if self.latent is not None:
            vectors, numbers = 1, self.latent.cached
        each = numbers + 4 if dtype == "int8" else numbers * DTYPE_BYTES[dtype]
        return self.num_layers * vectors * each
