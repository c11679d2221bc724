"""A run: one log, or the logs of one deployment in a folder, told in one order of time.

Each process of a deployment counts time on a clock of its own. The headers' anchors place all of them on the wall
clock, and all instants are moved to the clock of the first log; how far apart the wall clocks of several hosts were
nobody knows, so the notes say that they were trusted. Latencies are not touched by that: they use instants of one
process.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from penstock.core.events import Event, Header
from penstock.report.log import LogReader, log_paths, read_log

INSTANTS = ("at", "arrived_at", "admitted_at", "first_token_at", "last_token_at")


class Run:
    """Iterate for its events, headers first, as often as you like. Raises BadTrace and SchemaMismatch as a log does."""

    def __init__(self, path: Path | str, name: str = "") -> None:
        self.paths = log_paths(path)
        self.name = name or Path(path).name.removesuffix(".jsonl")
        self._readers = [read_log(each) for each in self.paths]
        self.headers = [reader.header() for reader in self._readers]

    def __iter__(self) -> Iterator[Event]:
        if len(self._readers) == 1:
            yield from self._readers[0]
            return
        zero = self.headers[0].wall_at - self.headers[0].loop_at
        streams = [
            _moved(reader, header.wall_at - header.loop_at - zero)
            for reader, header in zip(self._readers, self.headers, strict=True)
        ]
        yield from heapq.merge(*streams, key=instant)

    def wall_at(self, at: float) -> float:
        """The world's time of an instant of this run, in seconds since 1970."""
        header = self.headers[0]
        return header.wall_at + at - header.loop_at

    def notes(self) -> list[str]:
        """After an iteration: what a reader must know about the logs."""
        told = []
        if len(self.paths) > 1:
            told.append(
                f"{len(self.paths)} logs were put in one order by the wall clocks in their headers; "
                "latencies do not depend on it"
            )
        for reader in self._readers:
            if reader.is_truncated:
                told.append(
                    f"the last line of {reader.path} was cut off: its process was killed, or still writes"
                )
            if reader.unknown:
                names = ", ".join(
                    f"{count} {kind}" for kind, count in sorted(reader.unknown.items())
                )
                told.append(f"{reader.path} holds records this version does not know: {names}")
        return told


def instant(event: Event) -> float:
    return event.loop_at if isinstance(event, Header) else event.at


def _moved(reader: LogReader, by_s: float) -> Iterator[Event]:
    """The events of a log, later by `by_s`."""
    for event in reader:
        if isinstance(event, Header):
            yield replace(event, loop_at=event.loop_at + by_s)
            continue
        fields: Any = event
        changed = {
            name: getattr(event, name) + by_s
            for name in INSTANTS
            if getattr(event, name, None) is not None
        }
        if event.kind == "completed":
            changed["ends"] = tuple(end + by_s for end in event.ends)
        yield replace(fields, **changed)
