"""Model shapes: the numbers of a transformer that decide what a step costs.

With hidden h, q heads H, kv heads K of width d, ffn f:

    attention  h*H*d (q) + 2*h*K*d (k, v) + H*d*h (o)      mlp  3*h*f, or 2*h*f without a gate
    KV bytes a token = 2 * layers * K * d * kv_item_bytes   flops a token = 2 * (weights it passes)
    flops of a (query, key) pair in one layer = 4 * H * d

Embedding look-up costs nothing; the LM head is charged only for rows that sample.

In a mixture of experts the mlp is a router and E experts of 3*h*f_e weights each; a token passes k of them, and
besides them one of 3*h*f_s weights that all tokens pass, where there is such a one. So `layer_params` is what a token
multiplies and `stored_layer_params` what memory holds. How many experts' weights a step reads depends on its tokens:
cost.coverage. Where only some layers have experts, numbers "of one layer" are means over all layers.

With latent attention (rank r, rotated part t; per head plain part n and value v) a position leaves one vector:

    KV bytes a token = layers * (r + t) * kv_item_bytes     flops of a pair = 2 H (r + t) + 2 H r

Layers with a window read the last positions only. Steps are priced from sums over their jobs, so a window of w is
counted at the mean context c of the jobs: such a layer reads min(c, w). Memory is counted whole: blocks of positions
that have left a window are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """`query_rank`: of the bottleneck before the queries, None = there is none."""

    rank: int
    rotated: int
    plain: int
    value: int
    query_rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder. `weight_item_bytes` and `kv_item_bytes`: bytes of a stored weight and of a cached number.

    experts, top_k, expert_ffn   None in dense models, whose mlp has width `ffn`
    expert_layers   how many layers have experts; None = all of them
    shared_ffn      width of the expert that every token takes; None = there is none
    mlp_matrices    3, or 2 where there is no gate
    latent          None: keys and values for each kv head
    window, window_layers   positions that a layer with a window sees, and how many layers have one
    small_params    weights of the whole model that are in no matrix above: norms beyond two a layer, more biases
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_context: int
    is_tied: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    weight_item_bytes: float = 2.0
    kv_item_bytes: float = 2.0
    experts: int | None = None
    top_k: int | None = None
    expert_ffn: int | None = None
    expert_layers: int | None = None
    shared_ffn: int | None = None
    mlp_matrices: int = 3
    latent: LatentShape | None = None
    window: int | None = None
    window_layers: int = 0
    small_params: int = 0

    def __post_init__(self) -> None:
        told = (self.experts, self.top_k, self.expert_ffn)
        if None in told and told != (None, None, None):
            raise ValueError("a mixture of experts needs experts, top_k and expert_ffn")
        if self.experts is not None and not 1 <= (self.top_k or 0) <= self.experts:
            raise ValueError(f"a token takes 1 to {self.experts} experts, not {self.top_k}")

    @property
    def is_uniform(self) -> bool:
        """Layers are alike, MLPs gated, keys and values those of kv heads: what tables of operators know."""
        is_mixed = self.expert_layers is not None or self.shared_ffn is not None
        return not is_mixed and self.mlp_matrices == 3 and self.latent is None

    @property
    def expert_share(self) -> float:
        """Of the layers, those that have experts."""
        if self.experts is None:
            return 0.0
        return 1.0 if self.expert_layers is None else self.expert_layers / self.layers

    @property
    def expert_params(self) -> int:
        """Of one expert; 0 in dense models."""
        return 3 * self.hidden * (self.expert_ffn or 0)

    @property
    def router_params(self) -> int:
        return self.hidden * (self.experts or 0)

    @property
    def attention_params(self) -> int:
        """Of one layer's projections."""
        told = self.latent
        if told is None:
            return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        queries = self.heads * (told.plain + told.rotated)
        entry = self.hidden if told.query_rank is None else told.query_rank
        narrow = 0 if told.query_rank is None else self.hidden * told.query_rank
        return (
            narrow
            + entry * queries
            + self.hidden * (told.rank + told.rotated)
            + told.rank * self.heads * (told.plain + told.value)
            + self.heads * told.value * self.hidden
        )

    @property
    def fixed_params(self) -> float:
        """Of one layer, those that every token passes, whichever experts it takes."""
        dense = self.mlp_matrices * self.hidden * self.ffn
        if self.experts is None:
            return self.attention_params + dense
        routed = self.router_params + 3 * self.hidden * (self.shared_ffn or 0)
        if self.expert_layers is None:
            return self.attention_params + routed
        share = self.expert_share
        return self.attention_params + share * routed + (1.0 - share) * dense

    @property
    def layer_params(self) -> float:
        """Matrix weights of one layer: what every token multiplies."""
        taken = (self.top_k or 0) * self.expert_params
        return self.fixed_params + (
            taken if self.expert_layers is None else self.expert_share * taken
        )

    @property
    def stored_layer_params(self) -> float:
        """All matrix weights of one layer."""
        idle = ((self.experts or 0) - (self.top_k or 0)) * self.expert_params
        return self.layer_params + (
            idle if self.expert_layers is None else self.expert_share * idle
        )

    @property
    def head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        small = 2 * self.hidden  # the two norms of a layer
        small += (self.heads + 2 * self.kv_heads) * self.head_dim if self.has_qkv_bias else 0
        small += 2 * self.head_dim if self.has_qk_norm else 0
        tables = self.head_params * (1 if self.is_tied else 2)
        stored = round(self.layers * self.stored_layer_params)
        return stored + self.layers * small + tables + self.hidden + self.small_params

    @property
    def weight_bytes(self) -> float:
        return self.params * self.weight_item_bytes

    @property
    def kv_bytes(self) -> float:
        """Of one position, over all layers."""
        if self.latent is not None:
            return self.layers * (self.latent.rank + self.latent.rotated) * self.kv_item_bytes
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_item_bytes

    def with_int8_kv(self) -> ModelShape:
        """Keys and values as whole numbers of a byte, and four bytes of scale for each vector."""
        told = self.latent
        numbers = self.head_dim if told is None else told.rank + told.rotated
        return replace(self, kv_item_bytes=1 + 4 / numbers)

    @property
    def kv_pieces(self) -> int:
        """Stretches of memory that a block of positions is: one a layer for keys and one for values, or for latents."""
        return self.layers * (2 if self.latent is None else 1)

    @property
    def pair_flops(self) -> int:
        """Of one query and one key that it sees, in one layer."""
        if self.latent is not None:
            return 2 * self.heads * (2 * self.latent.rank + self.latent.rotated)
        return 4 * self.heads * self.head_dim

    @property
    def flops_per_token(self) -> float:
        """Of one token through all layers and the LM head, attention scores not counted."""
        return 2 * (self.layers * self.layer_params + self.head_params)

    def seen(self, context: float, limit: float) -> float:
        """What layers see on average of `context` positions, where those with a window see `limit` at most.

        `limit` is of the same sum as `context`: for n jobs, n windows.
        """
        if self.window is None or limit >= context:
            return context
        share = self.window_layers / self.layers
        return (1.0 - share) * context + share * limit
