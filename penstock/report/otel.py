"""A run as OpenTelemetry traces: a span an answer with its phases as children, at the wall-clock instants of the log.

Attributes follow OpenTelemetry's conventions for generative AI (gen_ai.*); what they have no name for is penstock.*,
among it the seconds of each cause (penstock.seconds.CAUSE, see report.causes). Ids are made of the log's anchor and the
request, so that exporting twice gives the same traces. A URL is an OTLP/HTTP collector ("/v1/traces" is added to an
address without a path); anything else is a file of OTLP JSON lines, which the collector's file receiver reads. Needs
the extra `otel`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from base64 import b64decode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import penstock
from penstock.core.errors import BadConfig, missing_extra
from penstock.core.events import Event
from penstock.report.causes import Explanation
from penstock.report.explain import Explainer
from penstock.report.phases import Phases, Walk
from penstock.report.runs import Run, instant

BATCH = 512  # spans of one export
NANOSECONDS = 1_000_000_000
SAMPLED = 1
OPERATIONS = {"generate": "text_completion", "embed": "embeddings", "score": "text_completion"}
HTTP = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
ENCODER = "opentelemetry.exporter.otlp.proto.common.trace_encoder"
IDS = ("traceId", "spanId", "parentSpanId")


def export(run: Run, target: str) -> int:
    """Send a run's spans to a URL or write them to a file; how many. Raises MissingExtra and BadConfig."""
    if target.startswith(("http://", "https://")):
        parts = urlsplit(target)
        whole = target if parts.path.strip("/") else f"{target.rstrip('/')}/v1/traces"
        return _export(run, _module(HTTP).OTLPSpanExporter(endpoint=whole), target)
    _module(ENCODER)  # before the file is emptied
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            return _export(run, FileExporter(file), target)
    except OSError as error:
        raise BadConfig(f"cannot write the spans {path}: {error.strerror or error}") from None


class FileExporter:
    """Writes OTLP JSON, a line an export. It is protobuf's JSON but for ids, which are hex and not base64."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._encode = _module(ENCODER).encode_spans
        self._dict_of = _module("google.protobuf.json_format").MessageToDict
        self._success = _module("opentelemetry.sdk.trace.export").SpanExportResult.SUCCESS

    def export(self, spans: Sequence[Any]) -> Any:
        told = self._dict_of(self._encode(spans), use_integers_for_enums=True)
        for resource in told["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    span |= {name: b64decode(span[name]).hex() for name in IDS if name in span}
        self._file.write(json.dumps(told, separators=(",", ":")) + "\n")
        return self._success

    def shutdown(self) -> None:
        self._file.flush()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "opentelemetry", "otel") from None


def _export(run: Run, exporter: Any, target: str) -> int:
    success = _module("opentelemetry.sdk.trace.export").SpanExportResult.SUCCESS
    held: list[Any] = []
    num = 0

    def send() -> None:
        nonlocal num
        if held and exporter.export(tuple(held)) is not success:
            raise BadConfig(
                f"{target} did not take the spans",
                hint="is a collector listening there for OTLP over HTTP? Its usual address is http://localhost:4318",
            )
        num += len(held)
        held.clear()

    def keep(span: Any) -> None:
        held.append(span)
        if len(held) >= BATCH:
            send()

    spans = Spans(run, keep)
    try:
        last_at = 0.0
        for event in run:
            spans.emit(event)
            last_at = instant(event)
        spans.close(last_at)
        send()
    finally:
        exporter.shutdown()
    return num


class Spans:
    """Implements core.ports.Log: makes the SDK's spans of a run's answers as they end."""

    def __init__(self, run: Run, on_span: Callable[[Any], None]) -> None:
        sdk = _module("opentelemetry.sdk.trace")
        self._trace = _module("opentelemetry.trace")
        self._span_of = sdk.ReadableSpan
        self._resource = _module("opentelemetry.sdk.resources").Resource({
            "service.name": "penstock",
            "service.version": penstock.__version__,
            "penstock.run": run.name,
        })  # fmt: skip
        scope = _module("opentelemetry.sdk.util.instrumentation").InstrumentationScope
        self._scope = scope("penstock", penstock.__version__)
        header = run.headers[0]
        self._loop_at, self._wall_ns = header.loop_at, round(header.wall_at * NANOSECONDS)
        self._anchor = f"{run.headers[0].wall_at!r}/{run.headers[0].seed}"
        self._on_span = on_span
        self._told: dict[tuple[str, str, int], Explanation] = {}
        self._explainer = Explainer(self._on_explained)
        self._phases = Phases(lambda walk: None, self._on_end)

    def emit(self, event: Event) -> None:
        self._explainer.emit(event)
        self._phases.emit(event)

    def close(self, at: float) -> None:
        """Answers that the log does not see the end of get a span up to here."""
        for told in self._explainer.unfinished():
            self._on_explained(told)
        self._phases.close(at)

    def _on_explained(self, told: Explanation) -> None:
        self._told[told.who, told.request, told.answer] = told

    def _on_end(self, walk: Walk) -> None:
        answer = walk.seq - walk.event.seq
        told = self._told.pop((walk.who, walk.event.request, answer), None)
        begin = walk.event.at if told is None else told.offered_at
        assert walk.end_at is not None
        name = f"{walk.who}/{walk.event.request}/{answer}"
        trace_id = self._id(walk.event.request, 16)
        root = self._context(trace_id, name)
        operation = OPERATIONS.get(walk.event.request_kind, walk.event.request_kind)
        self._make(
            f"{operation} {walk.event.model}",
            root,
            None,
            (begin, walk.end_at),
            _attributes(walk, told, operation),
            self._status(walk),
            self._links(walk, trace_id, answer),
        )
        spans = walk.spans()
        if begin < walk.event.at:
            spans.insert(0, ("routing", begin, walk.event.at))
        for place, (phase, start, end) in enumerate(spans):
            context = self._context(trace_id, f"{name}/{place}")
            self._make(phase, context, root, (start, end), {"penstock.phase": phase}, None)

    def _make(
        self,
        name: str,
        context: Any,
        parent: Any,
        ends: tuple[float, float],
        attributes: dict[str, object],
        status: Any,
        links: tuple[Any, ...] = (),
    ) -> None:
        start, end = (self._wall_ns + round((at - self._loop_at) * NANOSECONDS) for at in ends)
        kind = self._trace.SpanKind
        more = {} if status is None else {"status": status}
        span = self._span_of(
            name=name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            links=links,
            kind=kind.SERVER if parent is None else kind.INTERNAL,
            instrumentation_scope=self._scope,
            start_time=start,
            end_time=max(start, end),
            **more,
        )
        self._on_span(span)

    def _links(self, walk: Walk, trace_id: int, answer: int) -> tuple[Any, ...]:
        """To the part of the answer that is at another replica: they are of one trace."""
        told = (("continues", walk.moved_from), ("continued_by", walk.moved_to))
        return tuple([
            self._trace.Link(
                self._context(trace_id, f"{who}/{walk.event.request}/{answer}"),
                {"penstock.link": how, "penstock.replica": who},
            )
            for how, who in told
            if who is not None
        ])  # fmt: skip

    def _status(self, walk: Walk) -> Any:
        if walk.finished is None or walk.finished.reason != "error":
            return None
        return self._trace.Status(self._trace.StatusCode.ERROR, "the answer ended with an error")

    def _context(self, trace_id: int, name: str) -> Any:
        flags = self._trace.TraceFlags(SAMPLED)
        return self._trace.SpanContext(
            trace_id, self._id(name, 8), is_remote=False, trace_flags=flags
        )

    def _id(self, name: str, size: int) -> int:
        """Never 0, which the protocol reserves."""
        digest = hashlib.blake2b(f"{self._anchor}/{name}".encode(), digest_size=size).digest()
        return int.from_bytes(digest, "big") or 1


def _attributes(walk: Walk, told: Explanation | None, operation: str) -> dict[str, object]:
    event, done = walk.event, walk.finished
    found: dict[str, object] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "penstock",
        "gen_ai.request.model": event.model,
        "gen_ai.response.model": event.model,
        "gen_ai.request.max_tokens": event.max_tokens,
        "gen_ai.request.choice.count": event.n,
        "gen_ai.usage.input_tokens": event.num_prompt,
        "gen_ai.response.id": event.request,
        "penstock.tenant": event.tenant,
        "penstock.priority": event.priority,
        "penstock.replica": walk.who,
    }
    if walk.left is not None:
        found["penstock.left"] = walk.left
    if done is not None:
        found |= {
            "gen_ai.usage.output_tokens": done.num_output,
            "gen_ai.usage.cache_read.input_tokens": done.num_cached,
            "gen_ai.response.finish_reasons": (done.reason,),
            "penstock.preemptions": done.num_preemptions,
        }
        if done.reason == "error":
            found["error.type"] = "error"
    if told is not None:
        found |= {f"penstock.seconds.{cause}": value for cause, value in told.parts.items()}
        if told.ttft_s is not None:
            found["gen_ai.response.time_to_first_chunk"] = told.ttft_s
        if told.why_routed:
            found["penstock.why.routed"] = told.why_routed
    return found
