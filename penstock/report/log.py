"""Sinks of events, and reading them back. One JSON line an event, `kind` first; the first record is a Header.

A sink implements core.ports.Log: `emit(event)`. LogWriter writes a file, Digest names a run, Memory keeps, Null
forgets, Fanout gives to several; report.account keeps all that a simulation tells. A sink never fails its caller: a
full disk ends the log, not the service.

What a crash costs: lines are handed to the system once 64 KiB have gathered or half a second has passed, so killing the
process loses at most those; a line cut in half is recognised by its missing newline and left out. The header is
written to a temporary name and renamed, so a log is never found without one; an older log of that name is kept as
`NAME.1`, `NAME.2`, ...
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import msgspec.structs

from penstock.core.errors import BadTrace, SchemaMismatch
from penstock.core.events import Event, Header, Opened
from penstock.core.ports import Log
from penstock.core.schema import check_schema

FLUSH_BYTES = 1 << 16
MANY = 256  # lines hashed or handed over together
FLUSH_AFTER_S = 0.5
LOG_NAME = re.compile(r"\.jsonl(\.\d+)?$")
KINDS: dict[str, type[Event]] = {
    str(msgspec.structs.fields(cls)[0].default): cls for cls in get_args(Event)
}
_log = logging.getLogger("penstock.report")
encode = msgspec.json.Encoder().encode
encode_lines = msgspec.json.Encoder().encode_lines  # many at once cost a fifth less


class Null:
    """Forgets."""

    def emit(self, event: Event) -> None:
        pass


class Memory:
    """Keeps every event, for tests and short runs."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


class Fanout:
    """Gives every event to each of its sinks, in order."""

    def __init__(self, *sinks: Log) -> None:
        self._emits = [sink.emit for sink in sinks]

    def emit(self, event: Event) -> None:
        for emit in self._emits:
            emit(event)


class Digest:
    """A running BLAKE2b over the lines of a log: equal digests are equal runs, bit for bit.

    The wall-clock anchor of headers is left out: it says when a run took place, not what happened. Lines are gathered,
    since hashing many at once is cheaper.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._events: list[Event] = []
        self._num_hashed = 0

    @property
    def num_events(self) -> int:
        return self._num_hashed + len(self._events)

    def emit(self, event: Event) -> None:
        if isinstance(event, Header):
            event = msgspec.structs.replace(event, wall_at=0.0)
        self._events.append(event)
        if len(self._events) == MANY:
            self.flush()

    def write(self, lines: bytes, num: int) -> None:
        """Take `num` lines that somebody else has encoded. Headers are to be emitted."""
        self.flush()
        self._hash.update(lines)
        self._num_hashed += num

    def flush(self) -> None:
        self._hash.update(encode_lines(self._events))
        self._num_hashed += len(self._events)
        self._events.clear()

    def hexdigest(self) -> str:
        self.flush()
        return self._hash.hexdigest()


class LogWriter:
    """Writes a log file. The first event must be a Header. `close()` writes what is left.

    With a running loop, a timer of it flushes `flush_after_s` after the first unwritten event; None = only by size.
    """

    def __init__(self, path: Path | str, flush_after_s: float | None = FLUSH_AFTER_S) -> None:
        self.path = Path(path)
        self._file: int | None = None
        self._lines = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._flush_after_s = flush_after_s
        self._is_broken = False

    def emit(self, event: Event) -> None:
        if self._is_broken:
            return
        if self._file is None:
            assert isinstance(event, Header), "a log begins with its header"
            self._open(event)
            return
        self._lines += encode(event)
        self._lines += b"\n"
        if len(self._lines) >= FLUSH_BYTES:
            self.flush()
        elif self._timer is None and self._flush_after_s is not None:
            self._arm(self._flush_after_s)

    def write(self, lines: bytes, num: int) -> None:
        """Take `num` lines that somebody else has encoded, after the header."""
        if not self._is_broken:
            self._lines += lines
            self.flush()

    def flush(self) -> None:
        """Hand all lines to the system."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._file is None or not self._lines:
            return
        try:
            view = memoryview(self._lines)
            while view:
                written = os.write(self._file, view)
                view = view[written:]
            view.release()
        except OSError as error:
            self._give_up(error)
        self._lines = bytearray()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._is_broken = True  # whatever comes after is not written

    def _arm(self, after_s: float) -> None:
        try:
            self._timer = asyncio.get_running_loop().call_later(after_s, self._on_timer)
        except RuntimeError:
            self._flush_after_s = None  # no loop runs here: size alone decides

    def _on_timer(self) -> None:
        self._timer = None
        self.flush()

    def _open(self, header: Header) -> None:
        draft = self.path.with_name(self.path.name + ".new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(encode(header) + b"\n")
            if self.path.exists():
                self.path.rename(_free_name(self.path))
            draft.rename(self.path)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._is_broken = True
        _log.warning(
            "the event log %s ends here: %s. All goes on without it; free some space and start again to log.",
            self.path,
            error.strerror or error,
        )


def _free_name(path: Path) -> Path:
    number = 1
    while (older := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return older


class LineDecoder:
    """Reads single lines. `unknown` counts those of kinds that this version does not know, which decode to None."""

    def __init__(self) -> None:
        self.unknown: Counter[str] = Counter()
        self._decoders = {kind: msgspec.json.Decoder(cls).decode for kind, cls in KINDS.items()}

    def decode(self, line: bytes) -> Event | None:
        """Raises msgspec.MsgspecError for a damaged line, ValueError for one that is no event."""
        kind = _kind_of(line)
        decode = self._decoders.get(kind)
        if decode is not None:
            return decode(line)
        if not kind:
            raise ValueError("no event")
        self.unknown[kind] += 1
        return None


class LogReader:
    """Iterate for typed events, as often as you like.

    After an iteration `is_truncated` says that the last line was cut off, `unknown` counts records of kinds that this
    version does not know (a newer minor version may add some). Raises SchemaMismatch for another major version and
    BadTrace for a file that is no log.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.is_truncated = False
        self._lines = LineDecoder()

    @property
    def unknown(self) -> Counter[str]:
        return self._lines.unknown

    def __iter__(self) -> Iterator[Event]:
        return self._read(b"")

    def of(self, who: str) -> Iterator[Event]:
        """The events of one mechanism; the others are passed over without being read."""
        return (event for event in self._read(b'"who":' + encode(who)) if event.who == who)

    def births(self) -> list[Opened]:
        """How the mechanisms of this log began."""
        found = self._read(b'"kind":"opened"')
        return [event for event in found if isinstance(event, Opened)]

    def _read(self, needle: bytes) -> Iterator[Event]:
        """The events whose lines hold `needle`, after a look at the header."""
        self.is_truncated = False
        self._lines.unknown.clear()
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise BadTrace(f"cannot open the log {self.path}: {error.strerror or error}") from None
        with file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self.is_truncated = True
                    return
                if number == 1:
                    self._check_header(line)
                if needle in line:
                    event = self._decode(line, number)
                    if event is not None:
                        yield event
            if file.tell() == 0:
                raise BadTrace(f"the log {self.path} is empty")

    def header(self) -> Header:
        """The first record."""
        return next(event for event in self if isinstance(event, Header))

    def _decode(self, line: bytes, number: int) -> Event | None:
        try:
            return self._lines.decode(line)
        except msgspec.MsgspecError as error:
            raise BadTrace(f"line {number} of the log {self.path} is damaged: {error}") from None
        except ValueError:
            raise BadTrace(f"line {number} of the log {self.path} is no event") from None

    def _check_header(self, line: bytes) -> None:
        if _kind_of(line) != "header":
            raise BadTrace(
                f"{self.path} is no Penstock log",
                hint="a log is JSON lines and begins with a record of kind header",
            )
        try:
            schema = msgspec.json.decode(line).get("schema")
        except msgspec.MsgspecError as error:
            raise BadTrace(f"the header of the log {self.path} is damaged: {error}") from None
        if not isinstance(schema, int):
            raise SchemaMismatch(f"the log {self.path} does not state its schema version")
        check_schema(f"the log {self.path}", schema)


def _kind_of(line: bytes) -> str:
    """The kind of a record, read from the start of its line; "" when it has none."""
    if not line.startswith(b'{"kind":"'):
        return ""
    return line[9 : line.find(b'"', 9)].decode("ascii", "replace")


def read_log(path: Path | str) -> LogReader:
    """A reader of one log file."""
    return LogReader(path)


def log_paths(path: Path | str) -> list[Path]:
    """The log files at `path`: itself, or all of a folder by name, older ones included. Raises BadTrace for none."""
    path = Path(path)
    found = [path]
    if path.is_dir():
        found = [each for each in sorted(path.iterdir()) if LOG_NAME.search(each.name)]
    if not found:
        raise BadTrace(f"there are no logs (*.jsonl) in {path}")
    return found
