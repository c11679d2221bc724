"""Spans: received by a server that reads them with OpenTelemetry's own protocol classes, and read back from a file."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import BadConfig
from penstock.core.events import Event, Finished
from penstock.report.log import LogWriter
from penstock.report.runs import Run
from tests.report.events import played

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
pytest.importorskip(
    "opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed"
)

from penstock.report.otel import export

WALL_NS = 1_700_000_000 * 10**9
ASKS = [(0.02 * i, 20 + i, 5 + i) for i in range(25)]


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return played(ASKS, num_blocks=40, max_jobs=6)


@pytest.fixture
def run(events: list[Event], tmp_path: Path) -> Run:
    log = LogWriter(tmp_path / "run.jsonl")
    for event in events:
        log.emit(event)
    log.close()
    return Run(log.path)


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP/HTTP receiver and the spans it got."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert (
                self.path == "/v1/traces"
                and self.headers["Content-Type"] == "application/x-protobuf"
            )
            told = ExportTraceServiceRequest.FromString(body)
            received.extend(
                span
                for one in told.resource_spans
                for scope in one.scope_spans
                for span in scope.spans
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()
    server.server_close()


def value_of(span: Any, key: str) -> Any:
    (found,) = [each.value for each in span.attributes if each.key == key]
    return getattr(found, found.WhichOneof("value"))


def test_a_collector_gets_an_answer_a_span_with_its_phases_inside(
    run: Run, events: list[Event], collector: tuple[str, list[Any]]
) -> None:
    url, spans = collector
    assert export(run, url) == len(spans)
    roots = {
        value_of(span, "gen_ai.response.id"): span for span in spans if not span.parent_span_id
    }
    ends = {event.request: event for event in events if isinstance(event, Finished)}
    assert roots.keys() == ends.keys() and len({span.span_id for span in spans}) == len(spans)
    for name, end in ends.items():
        root = roots[name]
        assert root.name == "text_completion m" and root.kind == root.SPAN_KIND_SERVER
        assert root.start_time_unix_nano == WALL_NS + round(end.arrived_at * 1e9)
        assert end.last_token_at is not None and end.first_token_at is not None
        assert root.end_time_unix_nano == WALL_NS + round(end.last_token_at * 1e9)
        assert value_of(root, "gen_ai.usage.input_tokens") == end.num_prompt
        assert value_of(root, "gen_ai.usage.output_tokens") == end.num_output
        ttft_s = value_of(root, "gen_ai.response.time_to_first_chunk")
        assert ttft_s == pytest.approx(end.first_token_at - end.arrived_at)
        seconds = [
            each.value.double_value
            for each in root.attributes
            if each.key.startswith("penstock.seconds.")
        ]
        assert sum(seconds) == pytest.approx(end.last_token_at - end.arrived_at, abs=1e-9)
        children = [span for span in spans if span.parent_span_id == root.span_id]
        assert {span.trace_id for span in children} == {root.trace_id}
        ordered = sorted(
            children, key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano)
        )
        assert ordered[0].start_time_unix_nano == root.start_time_unix_nano
        assert max(span.end_time_unix_nano for span in ordered) == root.end_time_unix_nano
        for before, after in zip(ordered, ordered[1:], strict=False):
            assert before.end_time_unix_nano == after.start_time_unix_nano, "phases touch"
        assert sum(span.name == "preempted" for span in children) == end.num_preemptions


def test_the_file_holds_the_same_spans_and_twice_the_same(
    run: Run, collector: tuple[str, list[Any]], tmp_path: Path
) -> None:
    url, spans = collector
    export(run, url)
    num = export(run, str(tmp_path / "new" / "a.jsonl"))
    export(run, str(tmp_path / "b.jsonl"))
    text = (tmp_path / "new" / "a.jsonl").read_text()
    assert text == (tmp_path / "b.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    found = [
        span
        for line in lines
        for one in line["resourceSpans"]
        for scope in one["scopeSpans"]
        for span in scope["spans"]
    ]
    assert len(found) == num
    same = {
        (span.trace_id.hex(), span.span_id.hex(), span.name, span.end_time_unix_nano)
        for span in spans
    }
    assert same == {
        (each["traceId"], each["spanId"], each["name"], int(each["endTimeUnixNano"]))
        for each in found
    }


def test_nobody_listening_is_an_error_a_user_can_mend(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with pytest.raises(BadConfig, match="did not take the spans"):
        export(run, "http://127.0.0.1:9/v1/traces")
