"""From a trace to a workload that is like it: fit BurstGPT's generator, see how true it is, write it down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

from penstock.core.errors import BadConfig
from penstock.traffic.burst_model import BurstGptModel, fit_burstgpt
from penstock.traffic.fidelity import Fidelity, compare
from penstock.traffic.lengths_fit import LengthsKind
from penstock.traffic.sample import Sample
from penstock.traffic.trace import Trace


def fit_trace(
    trace: Trace,
    *,
    window_s: float = 60.0,
    lengths: str = "empirical",
    num_seeds: int = 5,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[BurstGptModel, Fidelity]:
    """The model, and its figures over `num_seeds` samples beside the trace's. Raises BadTrace, BadConfig, MissingExtra.

    `on_progress` hears how many samples were drawn.
    """
    if lengths not in get_args(LengthsKind):
        known = ", ".join(get_args(LengthsKind))
        raise BadConfig(f"no law of lengths is named {lengths!r}", hint=f"known are {known}")
    if num_seeds < 1 or not window_s > 0:
        raise BadConfig("a fit needs at least one seed and a window of positive length")
    traced = Sample.of_trace(trace)
    model = fit_burstgpt(traced, window_s=window_s, lengths=cast(LengthsKind, lengths))
    drawn = []
    for seed in range(num_seeds):
        drawn.append(Sample.of_rows(model.rows(seed), end_s=traced.end_s))
        if on_progress is not None:
            on_progress(seed + 1)
    return model, compare(traced, drawn, range(num_seeds))


def write_fit(model: BurstGptModel, path: Path, *, span_s: float) -> list[Path]:
    """Write `path`: the model (.json), or a workload of `span_s` seconds (.toml) with the model beside it."""
    if path.suffix not in (".json", ".toml"):
        raise BadConfig(f"cannot tell what {path} is to be", hint="end it in .json or .toml")
    kept = path if path.suffix == ".json" else path.with_suffix(".model.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(kept)
        if kept == path:
            return [path]
        text = f'duration_s = {span_s!r}\n\n[model]\nkind = "burstgpt"\npath = "{kept.name}"\n'
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadConfig(f"cannot write {path}: {error.strerror or error}") from None
    return [path, kept]
