"""A trainable decoder of the Qwen3 shape whose parameters carry exactly the names Hugging Face gives them.

Dense layers, grouped-query attention with normalised queries and keys, rotary positions, SwiGLU, tied embeddings.
It is plain autograd code for training; serving has its own forward in `engine`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder, under the names `config.json` uses."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rotary_table(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of shape (length, head_dim / 2) in fp32."""
    half = shape.head_dim // 2
    inverse = shape.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inverse
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of the last dimension against each other (the 'rotate half' convention)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Norm(nn.Module):
    """Root-mean-square normalisation; the scale is applied in the dtype of the input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, head = shape.hidden_size, shape.head_dim
        self.heads, self.kv_heads, self.head = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            head,
        )
        self.q_proj = nn.Linear(width, self.heads * head, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(self.heads * head, width, bias=False)
        self.q_norm = Norm(head, shape.rms_norm_eps)
        self.k_norm = Norm(head, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(rows, length, self.heads, self.head)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(rows, length, self.kv_heads, self.head)).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.head).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.heads // self.kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        flat = mixed.transpose(1, 2).reshape(rows, length, self.heads * self.head)
        written: Tensor = self.o_proj(flat)
        return written


class Gated(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        written: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return written


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Gated(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Trunk(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)


class _MeanLoss(torch.autograd.Function):
    """Cross-entropy through the output matrix; the gradients are made on the way forward, in the logits' memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ weight.t()).float()
        rows = torch.arange(len(targets), device=targets.device)
        total = logits.logsumexp(-1)
        loss = (total - logits[rows, targets]).mean()
        slope = logits.sub_(total[:, None]).exp_()
        slope[rows, targets] -= 1.0
        slope = slope.to(hidden.dtype)
        ctx.save_for_backward(
            (slope @ weight).div_(len(targets)), (slope.t() @ hidden).div_(len(targets))
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        return hidden * outer[0], (weight * outer[0]).float(), None


class Decoder(nn.Module):
    """Token ids of shape (rows, length) in, logits or losses in nats out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self._start()

    def _start(self) -> None:
        """Small normal weights; the matrices that write to the residual stream begin at zero."""
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
            else:
                fan = self.shape.hidden_size
                nn.init.normal_(weight, std=0.02 if "embed" in name else 0.5 / math.sqrt(fan))

    def hidden(self, ids: Tensor) -> Tensor:
        x: Tensor = self.model.embed_tokens(ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = rotary_table(self.shape, ids.shape[1], ids.device)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        x = self.model.norm(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(ids), self.model.embed_tokens.weight)

    def mean_loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, made for training: half the memory and time of `token_losses(...).mean()`."""
        hidden = self.hidden(ids).flatten(0, 1)
        weight = self.model.embed_tokens.weight.to(hidden.dtype)
        loss: Tensor = _MeanLoss.apply(hidden, weight, targets.flatten())  # type: ignore[no-untyped-call]
        return loss

    def token_losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of every target, shaped like `targets`."""
        logits = self(ids).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
            targets
        )

    def parameter_count(self) -> int:
        return sum(weight.numel() for weight in self.parameters())
