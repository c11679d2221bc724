"""A run as a trace for ui.perfetto.dev and chrome://tracing, in the JSON format that both read.

A process a replica: its lanes as threads with a slice for every launch (steps that ran as one are one slice and say
so), counters for running, waiting and free KV blocks, and an asynchronous track for every answer with its phases in it.
Fleets are processes with their routing decisions and movements. A part of an answer that has moved away says where it
goes on, on a track of the same name. Times are microseconds since the first event; `metadata` has the wall
clock of that instant.

Events are written in the order of time: a launch is known when it ends, so what begins after it is held back till then.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from penstock.core.errors import BadConfig
from penstock.core.events import Completed, Event, Header, Routed, Stepped
from penstock.core.moving import Migrated
from penstock.report.phases import Phases, Walk
from penstock.report.runs import instant

Record = dict[str, object]
MIGRATED = ("request", "source", "target", "mode", "outcome", "why", "pause_s")
MICROSECONDS = 1e6


class TraceWriter:
    """Implements core.ports.Log. `close` ends what is under way and writes what was held back."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._phases = Phases(self._on_phase, self._on_end)
        self._pids: dict[str, int] = {}
        self._lanes: set[tuple[str, int]] = set()
        self._flights: dict[tuple[str, int], Stepped] = {}
        self._last_end: dict[tuple[str, int], float] = {}
        self._held: list[tuple[float, int, Record]] = []
        self._zero: float | None = None
        self._wall: float | None = None
        self._now = 0.0
        self._num_put = 0
        self.num_events = 0
        file.write('{"displayTimeUnit":"ms","traceEvents":[')

    def emit(self, event: Event) -> None:
        at = instant(event)
        if self._zero is None:
            self._zero = self._now = at
            if isinstance(event, Header):
                self._wall = event.wall_at
        self._now = max(self._now, at)
        self._phases.emit(event)
        if isinstance(event, Stepped):
            self._on_stepped(event)
        elif isinstance(event, Completed):
            self._on_completed(event)
        elif isinstance(event, Routed):
            args = {
                "request": event.request,
                "replica": event.replica or "refused",
                "why": event.why,
            }
            self._put(
                event.at, self._record("i", "route", event.who, args=args) | {"s": "p", "tid": 0}
            )
        elif isinstance(event, Migrated):
            args = {name: getattr(event, name) for name in MIGRATED}
            self._put(
                event.at, self._record("i", "move", event.who, args=args) | {"s": "p", "tid": 0}
            )
        self._flush(min((each.at for each in self._flights.values()), default=at))

    def close(self) -> None:
        self._phases.close(self._now)
        self._flush(float("inf"))
        self._file.write(
            "]"
            + (f',"metadata":{{"wall_at":{self._wall}}}' if self._wall is not None else "")
            + "}\n"
        )

    # ------------------------------------------------------------------ events

    def _on_stepped(self, event: Stepped) -> None:
        counts = {"running": event.num_running, "waiting": event.num_waiting}
        self._put(event.at, self._record("C", "answers", event.who, args=counts))
        self._put(
            event.at,
            self._record("C", "free KV blocks", event.who, args={"blocks": event.free_blocks}),
        )
        if event.plan is not None:
            self._flights[event.who, event.plan] = event

    def _on_completed(self, event: Completed) -> None:
        launch = self._flights.pop((event.who, event.plan), None)
        if launch is None:
            return
        end, lane = event.ends[-1], (event.who, launch.lane)
        start = max(launch.at, self._last_end.get(lane, launch.at))
        self._last_end[lane] = end
        tokens = sum([tokens for _, tokens in launch.chunks])
        num = len(launch.chunks)
        name = f"{num} x decode" if tokens == num else f"{tokens} tokens of {num}"
        args: dict[str, object] = {
            "answers": num,
            "tokens of a step": tokens,
            "steps": event.steps_run,
            "started": len(launch.admitted),
            "preempted": len(launch.evicted),
            "why": launch.why,
        }
        if event.steps_run > 1:
            name += f", {event.steps_run} steps"
        record = self._record("X", name, event.who, args=args)
        record |= {"tid": launch.lane + 1, "dur": round((end - start) * MICROSECONDS, 3)}
        if lane not in self._lanes:
            self._lanes.add(lane)
            self._name("thread_name", f"lane {launch.lane}", record["pid"], launch.lane + 1)
        self._put(start, record)

    def _on_phase(self, walk: Walk) -> None:
        name, at = walk.phases[-1]
        if len(walk.phases) == 1:
            args = {"tenant": walk.event.tenant, "prompt tokens": walk.event.num_prompt}
            self._put(at, self._async("b", self._title(walk), walk, args))
        else:
            self._put(at, self._async("e", walk.phases[-2][0], walk))
        self._put(at, self._async("b", name, walk))

    def _on_end(self, walk: Walk) -> None:
        assert walk.end_at is not None
        done = walk.finished
        told: dict[str, object] = {"reason": walk.left or "unfinished"}
        if walk.moved_to is not None:
            told["goes on at"] = walk.moved_to
        if walk.moved_from is not None:
            told["came from"] = walk.moved_from
        if done is not None:
            told |= {
                "reason": done.reason,
                "output tokens": done.num_output,
                "preemptions": done.num_preemptions,
            }
        self._put(walk.end_at, self._async("e", walk.phase, walk))
        self._put(walk.end_at, self._async("e", self._title(walk), walk, told))

    # ------------------------------------------------------------------ records

    @staticmethod
    def _title(walk: Walk) -> str:
        answer = walk.seq - walk.event.seq
        return walk.event.request if walk.event.n == 1 else f"{walk.event.request}.{answer}"

    def _async(
        self, phase: str, name: str, walk: Walk, args: dict[str, object] | None = None
    ) -> Record:
        return self._record(phase, name, walk.who, args=args) | {
            "cat": "request",
            "id2": {"local": hex(walk.seq)},
        }

    def _record(self, phase: str, name: str, who: str, *, args: object = None) -> Record:
        record: Record = {"ph": phase, "name": name, "pid": self._pid(who)}
        return record if args is None else record | {"args": args}

    def _pid(self, who: str) -> int:
        pid = self._pids.get(who)
        if pid is None:
            pid = self._pids[who] = len(self._pids) + 1
            self._name("process_name", who, pid, 0)
        return pid

    def _name(self, kind: str, name: str, pid: object, tid: int) -> None:
        self._write({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}})

    def _put(self, at: float, record: Record) -> None:
        self._num_put += 1
        heapq.heappush(self._held, (at, self._num_put, record))

    def _flush(self, upto: float) -> None:
        zero = self._zero or 0.0
        while self._held and self._held[0][0] <= upto:
            at, _, record = heapq.heappop(self._held)
            self._write(record | {"ts": round((at - zero) * MICROSECONDS, 3)})

    def _write(self, record: Record) -> None:
        self._file.write(
            (",\n" if self.num_events else "\n") + json.dumps(record, separators=(",", ":"))
        )
        self.num_events += 1


def write_trace(run: Iterable[Event], path: Path | str) -> int:
    """Write a run, give the number of trace events. Raises BadConfig when the file cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            writer = TraceWriter(file)
            for event in run:
                writer.emit(event)
            writer.close()
    except OSError as error:
        raise BadConfig(f"cannot write the trace {path}: {error.strerror or error}") from None
    return writer.num_events
