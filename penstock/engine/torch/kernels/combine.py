"""Attention over keys that were split: partial results become the result over all of them.

Holder j of some of the keys tells o_j, its keys' softmax times their values, and the log of the sum it divided by, l_j.
With l = log sum_j exp(l_j), the whole is sum_j exp(l_j - l) o_j: exact, in any order, for any split, and the same for
all schemes of heads, as each query head has one l. A holder without keys says -inf and adds nothing. Two become one at
a time: of o_a and o_b, the first weighs 1 / (1 + exp(l_b - l_a)).

Source: the online softmax (Milakov, Gimelshein 2018); as in DistAttention (Infinite-LLM) and split decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pairs of out [T, H, D] and lse [T, H] over keys that do not overlap -> the same over all of them.

    Sums are fp32; `out` has the type of the first one.
    """
    (first, lse), *others = parts
    total, lse = first.float(), lse.float()
    for out, other in others:
        other = other.float()
        weight = (other - lse).sigmoid_().nan_to_num_(0.0)  # nobody has a key: -inf - -inf
        total = torch.lerp(total, out.float(), weight[..., None])
        lse = torch.logaddexp(lse, other)
    return total.to(first.dtype), lse
