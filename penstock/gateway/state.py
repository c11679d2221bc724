"""What `penstock top` shows, as JSON: replicas as they last reported, counts of each model, and what moved lately.

It is for people and scripts of the operator, so it asks for a key where keys are set, and its fields are those of
core.types.Report and core.events: they may grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
from prometheus_client import Counter, Gauge

import penstock
from penstock.core.clock import wall_anchor
from penstock.core.events import Event, Header
from penstock.core.ports import Service
from penstock.gateway.metrics import Meter, ModelMeter

PATH = "/internal/state"
COUNTS = ("in_flight", "prompt_tokens", "generated_tokens", "cached_tokens", "looked_up_tokens")


class State:
    """`recent` is set by whoever runs the fleets; None: nothing is told."""

    def __init__(self, service: Service, meter: Meter) -> None:
        self._service, self.meter, self.is_draining = service, meter, False
        self.recent: Callable[[], Sequence[Event]] | None = None

    def snapshot(self) -> dict[str, object]:
        loop_at, wall_at = wall_anchor()
        reports = self._service.reports()
        events = [] if self.recent is None else self.recent()
        return {
            "version": penstock.__version__,
            "at": wall_at,
            "is_draining": self.is_draining,
            "models": self._models(),
            "replicas": [
                {**_plain(report), "age_s": max(0.0, loop_at - report.at)} for report in reports
            ],
            "recent": [{**_plain(event), "ago_s": loop_at - _at(event)} for event in events],
        }

    def _models(self) -> list[dict[str, object]]:
        """Those that were called, and those that nobody has called yet."""
        called = self.meter.models()
        told = [_model(name, meter) for name, meter in called.items()]
        idle = [name for name in self._service.models() if name not in called]
        return told + [{"name": name} | dict.fromkeys(COUNTS, 0) for name in idle]


def _plain(thing: msgspec.Struct) -> Mapping[str, object]:
    told: dict[str, object] = msgspec.to_builtins(thing)
    told.pop("jobs", None)  # as many as there are jobs
    return told


def _at(event: Event) -> float:
    return event.loop_at if isinstance(event, Header) else event.at


def _model(name: str, meter: ModelMeter) -> dict[str, object]:
    return {
        "name": name,
        "in_flight": _value(meter.in_flight),
        "prompt_tokens": _value(meter.prompt_tokens),
        "generated_tokens": meter.generated,
        "cached_tokens": _value(meter.cached_tokens),
        "looked_up_tokens": _value(meter.looked_up_tokens),
    }


def _value(counted: Counter | Gauge) -> float:
    return float(next(iter(counted.collect())).samples[0].value)
