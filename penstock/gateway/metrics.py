"""What Prometheus is told: the gateway's own view of its callers, and the replicas' last reports.

Names follow those vLLM users have dashboards for, with our prefix. Time to first token and time per output token are
what the caller saw here (arrival of the body to the first Output; mean gap of the later tokens of a request), so they
hold tokenising, routing and queueing. Replica gauges are read from reports when scraped, one series a replica.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import UNSET, UnsetType
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.core.types import Report

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
TPOT_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10,
)  # fmt: skip
LATENCY_BUCKETS = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
)  # fmt: skip
TOKEN_BUCKETS = tuple(2**power for power in range(0, 18))


class ModelMeter:
    """The series of one model, looked up once."""

    __slots__ = (
        "prompt_tokens",
        "generated",
        "cached_tokens",
        "looked_up_tokens",
        "ttft",
        "tpot",
        "latency",
        "prompt_sizes",
        "output_sizes",
        "in_flight",
        "finished",
        "refused",
    )

    def __init__(self, meter: Meter, model: str) -> None:
        self.prompt_tokens = meter.prompt_tokens.labels(model)
        self.generated = 0  # a plain number: it is counted at every step of every stream
        self.cached_tokens = meter.cached_tokens.labels(model)
        self.looked_up_tokens = meter.looked_up_tokens.labels(model)
        self.ttft = meter.ttft.labels(model)
        self.tpot = meter.tpot.labels(model)
        self.latency = meter.latency.labels(model)
        self.prompt_sizes = meter.prompt_sizes.labels(model)
        self.output_sizes = meter.output_sizes.labels(model)
        self.in_flight = meter.in_flight.labels(model)
        self.finished: Callable[[str], Counter] = functools.cache(
            lambda reason: meter.finished.labels(model, reason)
        )
        self.refused: Callable[[str], Counter] = lambda code: meter.refused.labels(model, code)


class Meter:
    """All series of one gateway, in a registry of their own."""

    def __init__(self, reports: Callable[[], Sequence[Report]]) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, told: str, *more: str) -> Counter:
            return Counter(f"penstock:{name}", told, ("model_name", *more), registry=registry)

        def histogram(name: str, told: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(
                f"penstock:{name}", told, ("model_name",), buckets=buckets, registry=registry
            )

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of started requests.")
        self.looked_up_tokens = counter(
            "prefix_cache_queries", "Prompt tokens looked up in prefix caches."
        )
        self.cached_tokens = counter("prefix_cache_hits", "Prompt tokens found in prefix caches.")
        self.finished = counter("request_success", "Answers that ended.", "finished_reason")
        self.refused = counter("request_failure", "Requests that ended in an error.", "code")
        self.ttft = histogram(
            "time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS
        )
        self.tpot = histogram(
            "time_per_output_token_seconds", "Mean gap of later tokens, a request.", TPOT_BUCKETS
        )
        self.latency = histogram(
            "e2e_request_latency_seconds", "Arrival to last token.", LATENCY_BUCKETS
        )
        self.prompt_sizes = histogram(
            "request_prompt_tokens", "Prompt tokens, a request.", TOKEN_BUCKETS
        )
        self.output_sizes = histogram(
            "request_generation_tokens", "Tokens generated, an answer.", TOKEN_BUCKETS
        )
        self.in_flight = Gauge(
            "penstock:num_requests_in_flight",
            "Requests inside the gateway.",
            ("model_name",),
            registry=registry,
        )
        self._policies = Gauge(
            "penstock:policy_info",
            "The policy that fills each slot of a fleet; always 1.",
            ("model_name", "slot", "policy"),
            registry=registry,
        )
        self._models: dict[str, ModelMeter] = {}
        registry.register(_Live(reports, self._models))

    def of(self, model: str) -> ModelMeter:
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = ModelMeter(self, model)
        return known

    def tell_policies(self, model: str, policies: Mapping[str, str]) -> None:
        """Which policy fills each slot of the fleet behind `model`."""
        for slot, policy in policies.items():
            self._policies.labels(model, slot, policy).set(1)

    def models(self) -> Mapping[str, ModelMeter]:
        """Those that were asked for so far."""
        return self._models

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)


class _Live(Collector):
    """What is read when scraped: gauges of replicas, and the tokens counted so far."""

    def __init__(
        self, reports: Callable[[], Sequence[Report]], models: Mapping[str, ModelMeter]
    ) -> None:
        self._reports = reports
        self._models = models

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        reports = list(self._reports())
        yield _gauge("num_requests_running", "Jobs in the running batch.", reports, _running)
        yield _gauge("num_requests_waiting", "Jobs that wait.", reports, _waiting)
        yield _gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", reports, _usage)
        yield _gauge("replica_up", "1 while the replica is alive.", reports, _alive)
        yield _lanes(
            "lane_share", "Share of the device that a lane's step has; 0 = idle.", reports, 0
        )
        yield _lanes("lane_tokens", "Tokens of the step that a lane runs.", reports, 1)
        yield from _adapters(reports)
        yield from _brought(reports)
        generated = CounterMetricFamily(
            "penstock:generation_tokens", "Tokens generated.", labels=("model_name",)
        )
        for model, meter in self._models.items():
            generated.add_metric((model,), meter.generated)
        yield generated
        yield from _drafts(reports)


def _drafts(reports: Sequence[Report]) -> Iterable[Metric]:
    """Of replicas that verified guesses; the others have no such series."""
    told = [(each.replica, each.drafts) for each in reports if each.drafts is not UNSET]
    drafted = CounterMetricFamily(
        "penstock:spec_decode_num_draft_tokens", "Guesses verified.", labels=("engine",)
    )
    right = CounterMetricFamily(
        "penstock:spec_decode_num_accepted_tokens", "Guesses that were right.", labels=("engine",)
    )
    rate = GaugeMetricFamily(
        "penstock:spec_decode_acceptance_rate", "Right guesses, of all so far.", labels=("engine",)
    )
    for replica, counts in told:
        assert not isinstance(counts, UnsetType)
        drafted.add_metric((replica,), counts[0])
        right.add_metric((replica,), counts[1])
        rate.add_metric((replica,), counts[1] / counts[0])
    return (drafted, right, rate) if told else ()


def _gauge(
    name: str, told: str, reports: Sequence[Report], value: Callable[[Report], float]
) -> Metric:
    family = GaugeMetricFamily(f"penstock:{name}", told, labels=("engine",))
    for report in reports:
        family.add_metric((report.replica,), value(report))
    return family


def _lanes(name: str, told: str, reports: Sequence[Report], place: int) -> Metric:
    """Of replicas with several lanes; the others have no such series."""
    family = GaugeMetricFamily(f"penstock:{name}", told, labels=("engine", "lane"))
    for report in reports:
        for lane, said in enumerate(report.lanes):
            family.add_metric((report.replica, str(lane)), said[place])
    return family


def _adapters(reports: Sequence[Report]) -> Iterable[Metric]:
    """Of replicas that have any; the others have no such series."""
    resident = GaugeMetricFamily(
        "penstock:lora_adapters_resident", "Adapters in memory.", labels=("engine",)
    )
    loads = CounterMetricFamily(
        "penstock:lora_adapter_loads", "Adapters loaded into memory.", labels=("engine",)
    )
    evictions = CounterMetricFamily(
        "penstock:lora_adapter_evictions", "Adapters that made way for others.", labels=("engine",)
    )
    for report in reports:
        if report.adapters is not None:
            resident.add_metric((report.replica,), len(report.adapters.resident))
            loads.add_metric((report.replica,), report.adapters.num_loads)
            evictions.add_metric((report.replica,), report.adapters.num_evictions)
    return (resident, loads, evictions)


def _brought(reports: Sequence[Report]) -> Iterable[Metric]:
    """Of replicas that fetched cached blocks from somewhere; the others have no such series."""
    told = [(each.replica, each.brought) for each in reports if each.brought is not UNSET]
    families = [
        CounterMetricFamily(f"penstock:kv_fetch_{name}", about, labels=("engine", "place"))
        for name, about in (
            ("blocks", "Cached blocks brought to the device from there."),
            ("bytes", "Their bytes."),
            ("seconds", "What their copies took."),
            ("failures", "Blocks, or fetches from peers, that could not be had."),
            ("lost_blocks", "Cached blocks that were to be saved there and had to go before."),
        )
    ]
    for replica, places in told:
        assert not isinstance(places, UnsetType)
        for place, *numbers in places:
            for family, number in zip(families, numbers, strict=True):
                family.add_metric((replica, place), number)
    return families if told else ()


def _running(report: Report) -> float:
    return report.num_running


def _waiting(report: Report) -> float:
    return report.num_waiting


def _usage(report: Report) -> float:
    return 1 - report.free_blocks / report.total_blocks if report.total_blocks else 0.0


def _alive(report: Report) -> float:
    return float(report.is_alive)
