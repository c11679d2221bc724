"""How the tokens of one job are to be drawn: its sampling parameters, worked out once when the job is opened."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.types import Sampling
from penstock.engine.torch.chance import chance_of

COLDEST = 1e-5  # temperatures below this are greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """`heat` 0 is greedy. `top_k` is the vocabulary's size when all may be drawn. See chance.py for `chance`."""

    heat: float
    top_p: float
    min_p: float
    top_k: int
    chance: int
    is_shaped: bool  # has penalties, biases, a minimum length or a grammar
    is_limited: bool  # has top_p, top_k or min_p
    has_logprobs: bool
    is_plain: bool  # greedy, not shaped, no logprobs


def wishes_of(chosen: Sampling, *, vocab_size: int, seed: int, answer: int) -> Wishes:
    """`seed` is for those who gave none."""
    top_k = min(chosen.top_k or vocab_size, vocab_size)
    heat = 0.0 if chosen.temperature < COLDEST else chosen.temperature
    has_logprobs = chosen.logprobs is not None
    is_shaped = (
        bool(chosen.logit_bias)
        or chosen.min_tokens > 0
        or chosen.repetition_penalty != 1.0
        or chosen.presence_penalty != 0.0
        or chosen.frequency_penalty != 0.0
        or chosen.grammar is not None
    )
    return Wishes(
        heat=heat,
        top_p=chosen.top_p,
        min_p=chosen.min_p,
        top_k=top_k,
        chance=chance_of(seed if chosen.seed is None else chosen.seed, answer),
        is_shaped=is_shaped,
        is_limited=chosen.top_p < 1.0 or top_k < vocab_size or chosen.min_p > 0.0,
        has_logprobs=has_logprobs,
        is_plain=not (heat or is_shaped or has_logprobs),
    )
