"""The trainable twin of LLaDA: a decoder without a causal mask, and the objective that it learns from.

    t ~ U(0, 1)    p = (1 - 1e-3) t + 1e-3    each token masked with p    loss = cross-entropy of masked tokens / p

as LLaDA trains; the rows of a batch take evenly spaced t, which changes the spread of the loss and not its mean. In
every second row the tokens before a random place stay as they are, as when LLaDA learns to answer a prompt.

Against `decoder.Decoder`: queries and keys are not normalised, and every position sees every other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.learn.local.decoder import Decoder, Shape, rotate

LEAST = 1e-3


class SeesAll(nn.Module):
    """Attention of Llama's shape without a mask."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.head = shape.num_attention_heads, shape.head_dim
        width, inner = shape.hidden_size, shape.num_attention_heads * shape.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (
            each(x).view(rows, length, self.heads, self.head).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        written: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return written


class MaskedDecoder(Decoder):
    """The last id of the vocabulary is the mask."""

    def __init__(self, shape: Shape) -> None:
        assert shape.num_attention_heads == shape.num_key_value_heads, "LLaDA shares no keys"
        super().__init__(shape)
        for layer in self.model.layers:
            layer.self_attn = SeesAll(shape)
        self._start()

    @property
    def mask_id(self) -> int:
        return self.shape.vocab_size - 1

    def masked_logits(self, ids: Tensor, is_masked: Tensor) -> Tensor:
        """Of masked positions alone, in the order of `ids[is_masked]`."""
        hidden = self.hidden(ids.masked_fill(is_masked, self.mask_id))[is_masked]
        return F.linear(hidden, self.model.embed_tokens.weight).float()

    def diffusion_loss(self, ids: Tensor, noise: Noise) -> Tensor:
        """An upper bound of the negative log-likelihood of a token, in nats, as its mean over the batch."""
        logits = self.masked_logits(ids, noise.is_masked)
        losses = F.cross_entropy(logits, ids[noise.is_masked], reduction="none")
        share = noise.share.expand_as(noise.is_masked)[noise.is_masked]
        return (losses / share).sum() / noise.may_be.sum()


class Noise(NamedTuple):
    """`share` [rows, 1]: p. `may_be`: positions that could have been masked."""

    is_masked: Tensor
    share: Tensor
    may_be: Tensor


def drawn_noise(ids: Tensor, generator: torch.Generator) -> Noise:
    """Which positions of ids [rows, length] are masked; at least one is."""
    rows, length = ids.shape
    place = torch.randperm(rows, generator=generator)
    t = (place + torch.rand(1, generator=generator)) / rows
    share = ((1 - LEAST) * t + LEAST)[:, None]
    first = torch.randint(length, (rows,), generator=generator)
    first[::2] = 0
    may_be = torch.arange(length) >= first[:, None]
    is_masked = may_be & (torch.rand(rows, length, generator=generator) < share)
    is_masked[0, -1] = True
    return Noise(is_masked, share, may_be)
