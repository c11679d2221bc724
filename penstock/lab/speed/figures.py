"""From samples to figures: what an engine does in a second, and how often another one's that is.

    one thread      time = processor seconds of the engine's processes      figure from the median of the repeats
    more threads    time = seconds of the clock                             figure from their 5th percentile
    prefix          seconds of the clock always: a wait                     as above

A figure is tokens a second, or seconds of what is timed whole. Its spread is that of the repeats. A ratio is ours by
theirs (of seconds: theirs by ours, so that above 1 is always better for us), of the figures; its spread is that of the
ratios within each repeat, whose two turns are neighbours in time.

The share of the roof: bytes that a token must read, by its time, by the most that a plain read got between the same
turns (others only ever make a read slower, and a share larger that is taken of a slower one).
The bytes are nominal: every matrix once at its width, the keys and values of the context at sixteen bits; scales are
not counted, and the head of int4 counts eight bits.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.cost.shapes import ModelShape
from penstock.lab.speed.asks import Sample
from penstock.lab.speed.turns import OURS

BITS = {"bf16": 16.0, "int8": 8.0, "int4": 4.0}
HEAD_BITS = {"bf16": 16.0, "int8": 8.0, "int4": 8.0}
WHOLE = ("prefix", "start")  # measures whose figure is seconds
LOW = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """`value`, `low` and `high` in `unit`; `of` repeats. `others`: the most that others took of the machine."""

    engine: str
    weights: str
    threads: int
    measure: str
    unit: str
    value: float
    low: float
    high: float
    of: int
    others: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Ours by theirs: above 1 we are better."""

    peer: str
    weights: str
    threads: int
    measure: str
    value: float
    low: float
    high: float


def percentile(values: Iterable[float], share: float) -> float:
    """Linear between the two that are nearest."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def is_whole(measure: str) -> bool:
    return measure.partition(" ")[0] in WHOLE


def time_of(sample: Sample) -> float:
    """Seconds a unit of work."""
    by_clock = sample.threads > 1 or sample.measure.startswith("prefix")
    return max(1e-9, sample.wall_s if by_clock else sample.cpu_s) / sample.work


def centre(samples: Sequence[Sample]) -> float:
    """Seconds a unit of work, of all repeats."""
    if samples[0].threads == 1:
        return statistics.median([time_of(sample) for sample in samples])
    units = [unit for sample in samples for unit in sample.units_s]
    return percentile(units or [time_of(sample) for sample in samples], LOW)


def figure(samples: Sequence[Sample]) -> Figure:
    first = samples[0]
    times = [time_of(sample) for sample in samples]
    middle = centre(samples)
    spread = sorted([*times, middle])
    if is_whole(first.measure):
        unit, value, low, high = "s", middle, spread[0], spread[-1]
    else:
        unit, value, low, high = "tokens/s", 1 / middle, 1 / spread[-1], 1 / spread[0]
    others = [sample.others for sample in samples if sample.others is not None]
    return Figure(
        engine=first.engine,
        weights=first.weights,
        threads=first.threads,
        measure=first.measure,
        unit=unit,
        value=value,
        low=low,
        high=high,
        of=len(samples),
        others=max(others) if others else None,
    )


Key = tuple[int, str, str]  # threads, weights, measure


def grouped(samples: Iterable[Sample]) -> dict[Key, dict[str, list[Sample]]]:
    """By what was measured, then by engine, in the order of the run."""
    found: dict[Key, dict[str, list[Sample]]] = {}
    for sample in samples:
        key = (sample.threads, sample.weights, sample.measure)
        found.setdefault(key, {}).setdefault(sample.engine, []).append(sample)
    return found


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> Ratio:
    """Of two engines that were measured alike."""
    first = theirs[0]
    other = {sample.repeat: time_of(sample) for sample in theirs}
    pairs = [other[one.repeat] / time_of(one) for one in ours if one.repeat in other]
    middle = centre(theirs) / centre(ours)
    spread = sorted([*pairs, middle])
    return Ratio(
        peer=first.engine,
        weights=first.weights,
        threads=first.threads,
        measure=first.measure,
        value=middle,
        low=spread[0],
        high=spread[-1],
    )


def ratios(samples: Iterable[Sample]) -> list[Ratio]:
    """Of Penstock's replica to everybody else."""
    found = []
    for by_engine in grouped(samples).values():
        ours = by_engine.get(OURS)
        if ours is not None:
            found += [ratio(ours, each) for name, each in by_engine.items() if name != OURS]
    return found


def token_bytes(shape: ModelShape, weights: str, context: int) -> float:
    """What one token of one stream must read."""
    body = shape.layers * shape.layer_params * BITS[weights]
    head = shape.head_params * HEAD_BITS[weights]
    return (body + head) / 8 + shape.kv_bytes * context


def roof_shares(
    samples: Iterable[Sample], reads: Mapping[Key, Mapping[int, float]], needed: Mapping[str, float]
) -> dict[tuple[str, int, str], tuple[float, float, float]]:
    """(middle, least, most) share of the roof by (engine, threads, weights).

    `reads`: bytes a second of a plain read, by repeat; `needed`: bytes of a token by width.
    """
    found = {}
    for key, by_engine in grouped(samples).items():
        threads, weights, measure = key
        if measure != "decode" or key not in reads:
            continue
        roof = max(reads[key].values())
        for engine, some in by_engine.items():
            shares = [needed[weights] / (time_of(one) * roof) for one in some]
            middle = needed[weights] / (centre(some) * roof)
            ordered = sorted([*shares, middle])
            found[engine, threads, weights] = (middle, ordered[0], ordered[-1])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """All figures of one or several runs."""

    model: str
    machine: Mapping[str, str]
    abouts: Mapping[str, str]
    figures: list[Figure]
    ratios: list[Ratio]
    roofs: dict[tuple[str, int, str], tuple[float, float, float]]
    read_bytes_s: dict[int, float]
    absent: list[Mapping[str, Any]]


def digest(runs: Sequence[Mapping[str, Any]]) -> Digest:
    """Of what `Run.to_dict` gave, of the same model; a measure that is in several runs is taken from the last."""
    latest: dict[Key, list[Sample]] = {}
    reads: dict[Key, dict[int, float]] = {}
    for run in runs:
        some = [_sample(told) for told in run["samples"]]
        for key, by_engine in grouped(some).items():
            latest[key] = [one for each in by_engine.values() for one in each]
        for threads, weights, measure, repeat, speed in run["reads"]:
            which = "cpu_bytes_s" if threads == 1 else "wall_bytes_s"
            reads.setdefault((threads, weights, measure), {})[repeat] = speed[which]
    samples = [one for each in latest.values() for one in each]
    last = runs[-1]
    shape, sizes = _shape(last["shape"]), last["sizes"]
    context = sizes["context"] + sizes["steps"] // 2
    needed = {weights: token_bytes(shape, weights, context) for weights in BITS}
    by_threads: dict[int, list[float]] = {}
    for (threads, _, _), speeds in reads.items():
        by_threads.setdefault(threads, []).extend(speeds.values())
    measured = {(one.engine, one.threads, one.weights, one.measure) for one in samples}
    absent = [told for run in runs for told in run["absent"] if _absent_key(told) not in measured]
    return Digest(
        model=last["model"],
        machine=last["machine"],
        abouts={name: about for run in runs for name, about in run["abouts"].items()},
        figures=[figure(some) for each in grouped(samples).values() for some in each.values()],
        ratios=ratios(samples),
        roofs=roof_shares(samples, reads, needed),
        read_bytes_s={threads: max(speeds) for threads, speeds in by_threads.items()},
        absent=absent,
    )


def _absent_key(told: Mapping[str, Any]) -> tuple[str, int, str, str]:
    return told["engine"], told["threads"], told["weights"], told["measure"]


def _sample(told: Mapping[str, Any]) -> Sample:
    return Sample(**{**told, "units_s": tuple(told["units_s"])})


def _shape(told: Mapping[str, Any]) -> ModelShape:
    from penstock.cost.model_shape import LatentShape

    latent = told["latent"]
    return ModelShape(**{**told, "latent": None if latent is None else LatentShape(**latent)})
