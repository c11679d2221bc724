"""Laws of lengths fitted to pairs of (prompt, output) tokens.

- "empirical": the pairs themselves, up to MOST_PAIRS of them picked at random; keeps how outputs depend on prompts.
- "lognormal": means, deviations and correlation of the logarithms (the most likely ones).
- "zipf": per side the most likely exponent of a Zipf law cut below its largest length: the root of
  E[log n | exponent] = mean log n, which falls with the exponent.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import BadConfig, BadTrace
from penstock.traffic.lengths import DrawnLengths, Empirical, Lognormal, Pairs, Zipf
from penstock.traffic.process import generator

LengthsKind = Literal["empirical", "lognormal", "zipf"]
MOST_PAIRS = 20_000
EXPONENTS = (-1.0, 10.0)


def fit_lengths(pairs: Pairs, *, kind: LengthsKind = "empirical", seed: int = 0) -> DrawnLengths:
    """A law of lengths for pairs of at least 1. Raises BadTrace without any, BadConfig for an unknown kind."""
    if not len(pairs):
        raise BadTrace("there are no lengths to fit")
    if kind == "empirical":
        if len(pairs) > MOST_PAIRS:
            chosen = generator(seed, "fit", "pairs").permutation(len(pairs))[:MOST_PAIRS]
            pairs = pairs[np.sort(chosen)]
        return Empirical.of((prompt, output) for prompt, output in pairs.tolist())
    if kind == "lognormal":
        return _lognormal(np.log(pairs))
    if kind == "zipf":
        most = pairs.max(axis=0) + 1
        prompt, output = (zipf_exponent(pairs[:, i], int(most[i])) for i in (0, 1))
        return Zipf(
            prompt_exponent=prompt,
            output_exponent=output,
            prompt_below=max(2, int(most[0])),
            output_below=max(2, int(most[1])),
        )
    raise BadConfig(f"no law of lengths is named {kind!r}", hint=", ".join(get_args(LengthsKind)))


def _lognormal(logs: NDArray[np.float64]) -> Lognormal:
    mean, sigma = logs.mean(axis=0), logs.std(axis=0)
    spread = (logs - mean).prod(axis=1).mean()
    correlation = spread / sigma.prod() if sigma.prod() > 0 else 0.0
    return Lognormal(
        prompt_median=float(np.exp(mean[0])),
        output_median=float(np.exp(mean[1])),
        prompt_sigma=float(sigma[0]),
        output_sigma=float(sigma[1]),
        correlation=float(np.clip(correlation, -1, 1)),
    )


def zipf_exponent(values: NDArray[np.int64], below: int) -> float:
    """The most likely exponent of a Zipf law on 1 .. below-1, by bisection."""
    logs = np.log(np.arange(1, max(2, below), dtype=np.float64))
    wanted = float(np.log(values).mean())
    low, high = EXPONENTS
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(-middle * logs)
        low, high = (
            (middle, high) if (weights * logs).sum() / weights.sum() > wanted else (low, middle)
        )
    return (low + high) / 2
