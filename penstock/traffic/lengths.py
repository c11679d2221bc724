"""How long prompts and answers are: joint draws of (prompt, output) tokens, each a table `{kind = "lognormal", ...}`.

Rules: both are at least 1; draws are endless, made in blocks, and the same for the same seed. `empirical` draws whole
pairs, so that whatever the trace's prompts say about its outputs is kept; `histogram` and `zipf` draw the two apart.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from penstock.core.config import build
from penstock.core.errors import BadConfig, BadTrace
from penstock.traffic.process import BLOCK, generator
from penstock.traffic.rows import open_text

Pairs = NDArray[np.int64]
COLUMNS = (
    ("ContextTokens", "GeneratedTokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
    ("Request tokens", "Response tokens"),
    ("prompt_tokens", "output_tokens"),
    ("input_length", "output_length"),
)


@runtime_checkable
class Lengths(Protocol):
    """How long prompts and answers are."""

    def draws(self, seed: int) -> Iterator[tuple[int, int]]:
        """Endless (prompt, output) tokens; the same for the same seed."""
        ...


class DrawnLengths:
    """Lengths made in blocks. A kind gives `sample`."""

    __slots__ = ()
    kind: ClassVar[str]

    def sample(self, rng: np.random.Generator, num: int) -> Pairs:
        """`num` rows of (prompt, output)."""
        raise AssertionError(f"{type(self).__name__} draws nothing")

    def draws(self, seed: int) -> Iterator[tuple[int, int]]:
        rng = generator(seed, "lengths", self.kind)
        while True:
            yield from map(tuple, self.sample(rng, BLOCK).tolist())

    def first(self, num: int, seed: int) -> Pairs:
        """The first `num` of `draws`, at once."""
        rng = generator(seed, "lengths", self.kind)
        blocks = [self.sample(rng, BLOCK) for _ in range(-(-num // BLOCK))]
        return np.concatenate(blocks)[:num] if blocks else np.empty((0, 2), np.int64)


def clipped(prompt: NDArray[np.float64], output: NDArray[np.float64], most: int | None) -> Pairs:
    """Rounded, at least 1 and at most `most`."""
    both = np.stack([np.rint(prompt), np.rint(output)], axis=1)
    return np.asarray(np.clip(both, 1, most), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed(DrawnLengths):
    kind: ClassVar[str] = "fixed"
    prompt: int
    output: int

    def __post_init__(self) -> None:
        if min(self.prompt, self.output) < 1:
            raise ValueError("lengths must be at least 1")

    def sample(self, rng: np.random.Generator, num: int) -> Pairs:
        return np.tile(np.array([self.prompt, self.output], np.int64), (num, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal(DrawnLengths):
    """exp(normal): medians, sigmas of the logarithms and their correlation."""

    kind: ClassVar[str] = "lognormal"
    prompt_median: float
    output_median: float
    prompt_sigma: float = 1.0
    output_sigma: float = 1.0
    correlation: float = 0.0
    most: int | None = None

    def __post_init__(self) -> None:
        if min(self.prompt_median, self.output_median) < 1:
            raise ValueError("medians must be at least 1")
        if min(self.prompt_sigma, self.output_sigma) < 0 or not -1 <= self.correlation <= 1:
            raise ValueError("sigmas must be zero or more and the correlation from -1 to 1")

    def sample(self, rng: np.random.Generator, num: int) -> Pairs:
        first, second = rng.standard_normal((2, num))
        second = self.correlation * first + math.sqrt(1 - self.correlation**2) * second
        return clipped(
            self.prompt_median * np.exp(self.prompt_sigma * first),
            self.output_median * np.exp(self.output_sigma * second),
            self.most,
        )


@functools.cache
def zipf_ranks(exponent: float, below: int) -> NDArray[np.float64]:
    """Cumulative probabilities of 1 .. below-1."""
    weights = np.arange(1, below, dtype=np.float64) ** -exponent
    return np.asarray(np.cumsum(weights) / weights.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Zipf(DrawnLengths):
    """P(n) proportional to n^-exponent for 1 <= n < below, prompt and output apart (BurstGPT's modelled lengths)."""

    kind: ClassVar[str] = "zipf"
    prompt_exponent: float = 1.1
    output_exponent: float = 1.1
    prompt_below: int = 1024
    output_below: int = 1024

    def __post_init__(self) -> None:
        if min(self.prompt_below, self.output_below) < 2:
            raise ValueError("a truncated Zipf law needs room: below must be at least 2")

    def sample(self, rng: np.random.Generator, num: int) -> Pairs:
        prompts = zipf_ranks(self.prompt_exponent, self.prompt_below)
        outputs = zipf_ranks(self.output_exponent, self.output_below)
        uniform = rng.random((2, num))
        drawn = [np.searchsorted(prompts, uniform[0]), np.searchsorted(outputs, uniform[1])]
        return np.stack(drawn, axis=1).astype(np.int64) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram(DrawnLengths):
    """Two tables of weights, tokens -> weight, drawn apart (what ServeGen publishes)."""

    kind: ClassVar[str] = "histogram"
    prompt: dict[str, float]
    output: dict[str, float]

    def __post_init__(self) -> None:
        for name, weights in (("prompt", self.prompt), ("output", self.output)):
            if not weights or min(weights.values()) < 0 or not sum(weights.values()) > 0:
                raise ValueError(f"the histogram of {name} needs weights that add up to something")

    @classmethod
    def of(cls, prompt: Mapping[int, float], output: Mapping[int, float]) -> Histogram:
        return cls(
            prompt={str(tokens): weight for tokens, weight in prompt.items()},
            output={str(tokens): weight for tokens, weight in output.items()},
        )

    def sample(self, rng: np.random.Generator, num: int) -> Pairs:
        uniform = rng.random((2, num))
        drawn = [
            weighted(np.array([int(key) for key in table]), list(table.values()), uniform[i])
            for i, table in enumerate((self.prompt, self.output))
        ]
        return np.maximum(np.stack(drawn, axis=1).astype(np.int64), 1)


def weighted(
    values: NDArray[np.int64], weights: Iterable[float], uniform: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Values drawn by weight from uniform draws (inverse of the cumulative weights)."""
    cumulative = np.cumsum(np.fromiter(weights, np.float64))
    found = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return np.asarray(values[np.minimum(found, len(values) - 1)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Empirical(DrawnLengths):
    """Whole pairs drawn with replacement: `pairs`, or the rows of a CSV with two columns of token counts."""

    kind: ClassVar[str] = "empirical"
    pairs: tuple[tuple[int, int], ...] = ()
    path: Path | None = None

    def __post_init__(self) -> None:
        if bool(self.pairs) == (self.path is not None):
            raise ValueError("empirical lengths need either pairs or a path")
        if any(min(pair) < 1 for pair in self.pairs):
            raise ValueError("lengths must be at least 1")

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Empirical:
        return cls(pairs=tuple(pairs))

    def table(self) -> Pairs:
        """All pairs, one a row."""
        return table_of_pairs(self.pairs) if self.path is None else read_pairs(self.path)

    def sample(self, rng: np.random.Generator, num: int) -> Pairs:
        table = self.table()
        return table[rng.integers(len(table), size=num)]


@functools.lru_cache(maxsize=8)
def table_of_pairs(pairs: tuple[tuple[int, int], ...]) -> Pairs:
    return np.array(pairs, np.int64)


@functools.lru_cache(maxsize=8)
def read_pairs(path: Path) -> Pairs:
    """The two token columns of a CSV; rows with an empty side are left out. Raises BadTrace."""
    with open_text(path) as file:
        reader = csv.DictReader(file)
        names = set(reader.fieldnames or ())
        chosen = next((pair for pair in COLUMNS if names.issuperset(pair)), None)
        if chosen is None:
            known = "; ".join(", ".join(pair) for pair in COLUMNS)
            raise BadTrace(
                f"{path} has no two columns of token counts", hint=f"columns that are read: {known}"
            )
        try:
            rows = [(int(row[chosen[0]]), int(row[chosen[1]])) for row in reader]
        except (TypeError, ValueError):
            raise BadTrace(f"{path} has a row whose token counts are no integers") from None
    found = np.array([pair for pair in rows if min(pair) >= 1], np.int64)
    if not len(found):
        raise BadTrace(f"{path} has no row with both a prompt and an answer")
    return found


KINDS: dict[str, type[DrawnLengths]] = {
    each.kind: each for each in (Fixed, Lognormal, Zipf, Histogram, Empirical)
}


def lengths_of(table: Mapping[str, object], where: str = "lengths") -> Lengths:
    """Read `{kind = "zipf", prompt_exponent = 1.1}`. Raises BadConfig naming the key at fault."""
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise BadConfig(f"{where}.kind is {kind!r}", hint=f"write one of {known}")
    rest = {key: value for key, value in table.items() if key != "kind"}
    return build(KINDS[kind], rest, where)


def table_of_lengths(lengths: DrawnLengths) -> dict[str, object]:
    """The table that `lengths_of` reads back to an equal object."""
    assert dataclasses.is_dataclass(lengths)
    table: dict[str, object] = {"kind": lengths.kind}
    for each in dataclasses.fields(lengths):
        value = getattr(lengths, each.name)
        if value is None or value == ():
            continue
        table[each.name] = str(value) if isinstance(value, Path) else value
    return table
