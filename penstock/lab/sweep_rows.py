"""A result of a sweep as one flat row: what it was run with, and every figure under a name of its own.

Names: a quantity, then which part of it, then its unit: ttft_p99_s, output_tokens_per_s. Figures by tenant and class
are JSON texts (`tenants`, `classes`), since their names are the trace's; the class that attained least has columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from penstock.lab.grid import Spot
from penstock.lab.points import Result

Row = dict[str, object]
LATENCIES = {"ttft_s": "ttft", "tpot_s": "tpot", "itl_s": "itl", "e2e_s": "e2e", "queue_s": "queue"}
KNOWN = {
    "schema", "is_simulation", "seed", "sources", "trace", "played", "figures", "digest", "num_events", "energy",
}  # fmt: skip


def row_of(spot: Spot, offered_per_s: float, result: Result) -> Row:
    """The row of one result."""
    point, load = result.point, spot.load
    row: Row = {
        "variant": spot.variant,
        "load_kind": None if load is None else load[0],
        "load": None if load is None else load[1],
        "offered_per_s": offered_per_s,
        "seed": point.seed,
        **{axis.name: typed(value) for axis, value in spot.values},
        "error": result.error,
    }
    if result.value is not None:
        row |= _figures(result.value)
    return row | {
        "config": point.settings["config"],
        "trace": point.settings["trace"],
        "trace_sha256": point.inputs["trace"],
        "key": result.key,
        "cpu_s": result.cpu_s,
        **{f"version_{name}": version for name, version in point.versions.items()},
    }


def typed(text: str) -> int | float | str:
    """A value of an axis as the number that it is, or the text: JSON has neither nan nor infinity."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def _figures(value: Mapping[str, object]) -> Row:
    figures = value["figures"]
    assert isinstance(figures, dict)
    row = _group(figures["all"])
    row |= _worst(figures["classes"])
    row |= {name: figures[name] for name in ("duration_s", "num_steps")}
    row |= {name: json.dumps(figures[name]) for name in ("classes", "tenants", "errors")}
    row |= _sources(value["sources"], figures)
    row |= _energy(value.get("energy"), figures["all"])
    row |= {"digest": value["digest"], "num_events": value["num_events"]}
    for name, found in value.items():
        if name not in KNOWN:
            row |= _flat(name, found)
    return row


def _group(group: Mapping[str, object]) -> Row:
    row: Row = {}
    for name, found in group.items():
        if isinstance(found, dict):
            stem = LATENCIES.get(name, name)
            row |= {_part(stem, part): number for part, number in found.items()}
        else:
            row[name] = found
    return row


def _part(stem: str, part: str) -> str:
    return f"{stem}_num" if part == "num" else f"{stem}_{part}_s"


def _worst(classes: Mapping[str, Mapping[str, object]]) -> Row:
    """The class that attained least; with one class it is that of all."""
    attained = {name: float(str(each["attainment"] or 0.0)) for name, each in classes.items()}
    worst = min(attained, key=lambda name: attained[name], default=None)
    return {
        "worst_class": None if worst is None else attained[worst],
        "worst_class_name": worst,
        "num_classes": len(classes),
    }


def _sources(sources: object, figures: Mapping[str, object]) -> Row:
    """What the hardware costs, where all of its prices are known, and whose step times these are."""
    assert isinstance(sources, list)
    price_h = _sum([source["price_h"] for source in sources])
    duration_s, group = figures["duration_s"], figures["all"]
    assert isinstance(duration_s, float) and isinstance(group, dict)
    tokens = group["output_tokens"]
    return {
        "price_h": price_h,
        "usd_per_million_tokens": price_h * duration_s / 3600 / tokens * 1e6
        if price_h is not None and tokens
        else None,
        "cost_model": "+".join(sorted({source["cost_model"] for source in sources})),
        "cost_digest": "+".join(sorted({source["digest"] for source in sources})),
    }


def _energy(fleets: object, group: Mapping[str, object]) -> Row:
    """What all fleets draw; None where that of any is not known."""
    if not isinstance(fleets, list) or not fleets:
        return {}
    joules, watts = (_sum([fleet[name] for fleet in fleets]) for name in ("joules", "mean_watts"))
    tokens = group["output_tokens"]
    assert isinstance(tokens, int)
    return {
        "joules": joules,
        "mean_watts": watts,
        "joules_per_million_tokens": joules / tokens * 1e6
        if joules is not None and tokens
        else None,
    }


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _flat(name: str, found: object) -> Row:
    """What other parts add to a simulation's outcome: scalars under their path, lists as JSON."""
    if isinstance(found, dict):
        row: Row = {}
        for key, value in found.items():
            row |= _flat(f"{name}_{key}", value)
        return row
    return {name: json.dumps(found) if isinstance(found, list) else found}
