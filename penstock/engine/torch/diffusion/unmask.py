"""Which masked positions are revealed, and as what.

    token       argmax of the logits; with a temperature T > 0 argmax of logits / T + Gumbel noise
    confidence  softmax probability (of the logits as they are) of that token

Logits are made for the masked positions of active blocks only, in slices of at most `row_cap` rows, and each slice is
reduced to (token, confidence) before the next is made: their memory does not grow with the number of answers. A row is
reduced by itself, so neither the cap nor the neighbours change what comes out, but for the rounding of products of
other sizes. Noise is drawn row by row from a stream of the answer's own.

Of an active block with m masked positions and s steps left, ceil(m / s) are revealed, those of highest confidence,
equal ones by position. `threshold` reveals all above it besides: fewer steps, and the same text as one by one as long
as (n + 1) (1 - threshold) <= 1 for n at a time (Fast-dLLM). The mask token itself is never revealed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """Chance of one answer; `temperature` > 0."""

    temperature: float
    stream: torch.Generator


class Guesses(NamedTuple):
    """One entry a row."""

    tokens: Tensor  # int64
    confidence: Tensor  # float32


def guess(
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    *,
    mask_id: int,
    row_cap: int,
    noise: Sequence[Noise | None] = (),
) -> Guesses:
    """Token and confidence of rows [R, hidden]. `noise`: one entry a row; none = no row has any."""
    tokens, confidence = [], []
    for first in range(0, len(hidden), row_cap):
        logits = logits_of(hidden[first : first + row_cap])
        logits[:, mask_id] = -torch.inf
        best, chosen = logits.max(-1)
        total = logits.logsumexp(-1)
        told = noise[first : first + row_cap]
        for row, one in enumerate(told):
            if one is not None:
                chosen[row] = _drawn(logits[row], one)
        if any(one is not None for one in told):
            best = logits.gather(1, chosen[:, None])[:, 0]
        tokens.append(chosen)
        confidence.append((best - total).exp())
        del logits
    return Guesses(torch.cat(tokens), torch.cat(confidence))


def _drawn(logits: Tensor, noise: Noise) -> Tensor:
    """argmax(logits / T - log(e)) with e exponential."""
    spread = torch.empty(len(logits)).exponential_(generator=noise.stream).to(logits.device)
    return (logits / noise.temperature - spread.log()).argmax()


def revealed(confidence: Tensor, steps_left: int, threshold: float | None) -> list[int]:
    """Places among a block's masked positions, ascending, that this step reveals."""
    count = -(-len(confidence) // steps_left)
    if threshold is not None:
        count = max(count, int((confidence >= threshold).sum()))
    order = confidence.argsort(descending=True, stable=True)
    found: list[int] = order[:count].sort().values.tolist()
    return found
