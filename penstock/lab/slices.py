"""The requests of a validation: the first rows of a trace that a model's context can hold, read once and told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.core.errors import BadTrace
from penstock.core.types import Request
from penstock.traffic import Trace
from penstock.traffic.formats import WORKLOAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The requests of all runs. `rate_per_s` is that of the trace itself."""

    path: str
    sha256: str
    num_requests: int
    num_dropped: int
    num_cut: int
    prompt_tokens: int
    output_tokens: int
    rate_per_s: float
    max_context: int

    def __str__(self) -> str:
        num = self.num_requests
        return (
            f"{num} requests of {self.path} at {self.rate_per_s:.2f}/s, {self.prompt_tokens / num:.0f} prompt and "
            f"{self.output_tokens / num:.0f} answer tokens in the mean; context {self.max_context}: {self.num_dropped} "
            f"rows left out (no room for the prompt), {self.num_cut} answers cut to what the context leaves"
        )


def slice_of(trace: Trace) -> Slice:
    """Read the requests once. Raises BadTrace when they cannot be driven at a stated rate."""
    if trace.format == WORKLOAD:
        raise BadTrace(
            f"{trace.path} makes other requests with every seed, and every repeat has one of its own",
            hint="write one down first: penstock trace generate FILE.toml --out trace.jsonl",
        )
    requests = list(requests_of(trace))
    span_s = requests[-1][0] - requests[0][0]  # a trace without rows is refused by its reader
    if span_s <= 0:
        raise BadTrace(f"{trace.path} holds too few arrivals to have a rate")
    sizes = [
        (one.prompt.num_tokens, one.true_output or 0, one.sampling.max_tokens)
        for _, one in requests
    ]
    assert trace.max_context is not None
    return Slice(
        path=str(trace.path),
        sha256=trace.sha256(),
        num_requests=len(requests),
        num_dropped=sum(trace.meta.drops.values()),
        num_cut=sum(output > most for _, output, most in sizes),
        prompt_tokens=sum(prompt for prompt, _, _ in sizes),
        output_tokens=sum(min(output, most) for _, output, most in sizes),
        rate_per_s=(len(requests) - 1) / span_s,
        max_context=trace.max_context,
    )


def requests_of(trace: Trace) -> Iterator[tuple[float, Request]]:
    """Raises BadTrace when a trace holds more than plain requests."""
    for at_s, item in trace:
        if not isinstance(item, Request):
            raise BadTrace(
                f"{trace.path} holds conversations whose turns wait for answers",
                hint="give a trace of arrivals, such as Azure's",
            )
        yield at_s, item
