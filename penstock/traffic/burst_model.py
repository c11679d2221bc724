"""BurstGPT's generator, fitted from any trace: bursty arrivals by the window, lengths, conversations, callers.

Theory. The gaps between requests are Gamma with a new (alpha, beta) every 60 s: mean alpha/beta seconds, coefficient of
variation 1/sqrt(alpha), so alpha < 1 is bursty. `published` is the generator as its authors ship it: (0.25, 2) first,
then the windows given, then (0.5, 2) for ever; prompt and output lengths by Zipf's law with exponent 1.1, cut below
1024. `fit_burstgpt` takes all of it from a trace.

Rules
- Two scalings. By rate: play the rows faster (`open_trace(speed=...)`, `Scaled`), windows shrink with everything else.
  Modelled: `times(factor)` divides the gaps and leaves the windows at 60 s, so that slow swings keep their period.
- What is fitted as an arrival is the first call of a conversation, or a call without one. Later turns follow at gaps
  from call to call (answer and thought together), lognormal; they are rows at fixed instants, as in a trace. Every
  turn draws its own lengths.
- A model is a table: `save` and `load` keep it as JSON, with the version of its layout.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from penstock.core.config import build
from penstock.core.errors import BadTrace, SchemaMismatch
from penstock.core.rng import stream
from penstock.traffic.arrivals import Renewal, arrivals_of, table_of_arrivals
from penstock.traffic.fit import Choice, Method, fit_arrivals, spread_seconds
from penstock.traffic.lengths import DrawnLengths, Zipf, lengths_of, table_of_lengths
from penstock.traffic.lengths_fit import LengthsKind, fit_lengths
from penstock.traffic.process import Floats
from penstock.traffic.renewal import Counts, Law
from penstock.traffic.rows import Row
from penstock.traffic.sample import Sample

WINDOW_S = 60.0
INITIAL, FALLBACK = (0.25, 2.0), (0.5, 2.0)  # (alpha, beta)
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations:
    """`share` of the arrivals open one; `turns[i]` is the weight of i + 2 turns; gaps are lognormal."""

    share: float
    turns: tuple[float, ...]
    gap_median_s: float
    gap_sigma: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of conversations is from 0 to 1, got {self.share}")
        if not self.turns or min(self.turns) < 0 or not sum(self.turns) > 0:
            raise ValueError("conversations need weights for their numbers of turns")
        if not self.gap_median_s > 0 or not self.gap_sigma >= 0:
            raise ValueError("the gaps of a conversation need a positive median and a sigma")

    @property
    def mean_turns(self) -> float:
        turns = math.fsum((i + 2) * weight for i, weight in enumerate(self.turns))
        return turns / math.fsum(self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstGptModel:
    """A generator of rows. `tenants` are weights of names, drawn per arrival."""

    arrivals: Renewal
    lengths: DrawnLengths
    conversations: Conversations | None = None
    tenants: Mapping[str, float] = field(default_factory=lambda: {"default": 1.0})

    @classmethod
    def published(
        cls, windows: Sequence[tuple[float, float]] = (), *, scale: float = 1.0
    ) -> BurstGptModel:
        """The authors' generator; `windows` are (alpha, beta), scale divides the gaps."""
        initial, *laws, rest = (
            Law.of_scale("gamma", alpha, 1 / beta / scale)
            for alpha, beta in (INITIAL, *windows, FALLBACK)
        )
        arrivals = Renewal(window_s=WINDOW_S, laws=(initial, *laws), rest=rest)
        return cls(arrivals=arrivals, lengths=Zipf())

    def times(self, factor: float) -> BurstGptModel:
        """Modelled scaling: `factor` times the arrivals in the same windows."""
        return replace(self, arrivals=self.arrivals.times(factor))

    def with_counts(self, counts: Counts) -> BurstGptModel:
        """The same laws with drawn ("renewal") or kept ("exact") counts per window."""
        return replace(self, arrivals=replace(self.arrivals, counts=counts))

    @property
    def mean_rate_per_s(self) -> float:
        """Rows a second, turns included."""
        talk = self.conversations
        more = 0.0 if talk is None else talk.share * (talk.mean_turns - 1)
        return self.arrivals.mean_rate_per_s * (1 + more)

    def rows(self, seed: int) -> Iterator[Row]:
        """Rows in time order; turns that come after the last arrival are still made."""
        sizes, chance = self.lengths.draws(seed), stream(seed, "traffic", "burst", "turns")
        later: list[tuple[float, int, Row]] = []
        for number, row in enumerate(self._starts(sizes, seed)):
            at_s = row.at_s or 0.0
            while later and later[0][0] <= at_s:
                yield heapq.heappop(later)[2]
            yield row
            if row.session is not None and self.conversations is not None:
                for turn in _turns(row, self.conversations, sizes, chance):
                    heapq.heappush(later, (turn.at_s or 0.0, number, turn))
        yield from (heapq.heappop(later)[2] for _ in range(len(later)))

    def _starts(self, sizes: Iterator[tuple[int, int]], seed: int) -> Iterator[Row]:
        chance = stream(seed, "traffic", "burst", "callers")
        names, weights = list(self.tenants), list(itertools.accumulate(self.tenants.values()))
        share = 0.0 if self.conversations is None else self.conversations.share
        for number, at_s in enumerate(self.arrivals.instants(seed)):
            tenant = names[0] if len(names) == 1 else chance.choices(names, cum_weights=weights)[0]
            row = Row(at_s, *next(sizes), tenant)
            if share and chance.random() < share:
                row = row._replace(session=f"conversation-{number}")
            yield row

    def table(self) -> dict[str, object]:
        """All of it as plain values."""
        talk = self.conversations
        return {
            "schema": SCHEMA,
            "arrivals": table_of_arrivals(self.arrivals),
            "lengths": table_of_lengths(self.lengths),
            "conversations": None
            if talk is None
            else {name: getattr(talk, name) for name in talk.__slots__},
            "tenants": dict(self.tenants),
        }

    @classmethod
    def of_table(cls, table: Mapping[str, object]) -> BurstGptModel:
        """Back from `table`. Raises SchemaMismatch or BadConfig."""
        if table.get("schema") != SCHEMA:
            raise SchemaMismatch(
                f"this model has layout {table.get('schema')!r}, not {SCHEMA}", hint="fit it again"
            )
        arrivals = arrivals_of(_mapping(table, "arrivals"))
        lengths, talk = lengths_of(_mapping(table, "lengths")), table.get("conversations")
        assert isinstance(arrivals, Renewal) and isinstance(lengths, DrawnLengths)
        return cls(
            arrivals=arrivals,
            lengths=lengths,
            conversations=build(Conversations, talk, "conversations")
            if isinstance(talk, Mapping)
            else None,
            tenants={
                str(name): float(weight) for name, weight in _mapping(table, "tenants").items()
            },
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.table()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> BurstGptModel:
        """Raises BadTrace when the file is no model."""
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadTrace(f"cannot read the model {path}: {error}") from None
        if not isinstance(table, dict):
            raise BadTrace(f"{path} is no fitted model")
        return cls.of_table(table)


def _turns(
    first: Row, talk: Conversations, sizes: Iterator[tuple[int, int]], chance: random.Random
) -> Iterator[Row]:
    """The turns after the first of one conversation."""
    at_s = first.at_s or 0.0
    for _ in range(chance.choices(range(1, len(talk.turns) + 1), talk.turns)[0]):
        at_s += round(talk.gap_median_s * math.exp(talk.gap_sigma * chance.gauss(0, 1)), 9)
        prompt, output = next(sizes)
        yield first._replace(at_s=at_s, num_prompt=prompt, num_output=output)


def _mapping(table: Mapping[str, object], name: str) -> Mapping[str, Any]:
    value = table.get(name)
    if not isinstance(value, Mapping):
        raise BadTrace(f"this is no fitted model: it lacks {name!r}", hint="fit it again")
    return value


def fit_conversations(sample: Sample) -> tuple[Floats, Conversations | None]:
    """(instants of first calls, the conversations seen)."""
    at = spread_seconds(sample.at_s)
    seen: dict[str, list[float]] = {}
    starts = []
    for at_s, session in zip(at.tolist(), sample.sessions, strict=True):
        if session is None or session not in seen:
            starts.append(at_s)
        if session is not None:
            seen.setdefault(session, []).append(at_s)
    talks = [times for times in seen.values() if len(times) > 1]
    if not talks:
        return np.array(starts), None
    gaps = np.concatenate([np.diff(times) for times in talks])
    logs = np.log(gaps[gaps > 0]) if (gaps > 0).any() else np.zeros(1)
    turns = np.bincount([len(times) - 2 for times in talks])
    return np.array(starts), Conversations(
        share=len(talks) / len(starts),
        turns=tuple(turns.astype(float).tolist()),
        gap_median_s=float(np.exp(logs.mean())),
        gap_sigma=float(logs.std()),
    )


def fit_burstgpt(
    sample: Sample,
    *,
    family: Choice = "best",
    method: Method = "mle",
    window_s: float = WINDOW_S,
    lengths: LengthsKind = "empirical",
    counts: Counts | None = None,
) -> BurstGptModel:
    """BurstGPT's generator with the windows, lengths, conversations and tenants of a trace."""
    starts, talk = fit_conversations(sample)
    tenants, weights = np.unique(np.array(sample.tenants), return_counts=True)
    return BurstGptModel(
        arrivals=fit_arrivals(
            starts, window_s=window_s, family=family, method=method, counts=counts
        ),
        lengths=fit_lengths(sample.pairs, kind=lengths),
        conversations=talk,
        tenants=dict(zip(tenants.tolist(), (weights / weights.sum()).tolist(), strict=True)),
    )
