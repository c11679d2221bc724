"""Workload files for tests: written in a line, read back as what a run would play."""

from __future__ import annotations

from pathlib import Path

from penstock.core.types import Request
from penstock.traffic import Trace, Workflow, open_trace

LENGTHS = 'lengths = {kind = "lognormal", prompt_median = 300, output_median = 60}\n'
FIXED = 'lengths = {kind = "fixed", prompt = 100, output = 20}\n'
POISSON = 'arrivals = {kind = "poisson", rate_per_s = 5.0}\n'


def workload(folder: Path, text: str, name: str = "workload.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def opened(folder: Path, text: str, **options: object) -> Trace:
    return open_trace(workload(folder, text), **options)  # type: ignore[arg-type]


def requests_of(trace: Trace) -> list[Request]:
    """All requests, those of workflows too."""
    found: list[Request] = []
    for _, item in trace:
        found += [item] if isinstance(item, Request) else [call.request for call in item.calls]
    return found


def workflows_of(trace: Trace) -> list[Workflow]:
    return [item for _, item in trace if isinstance(item, Workflow)]
