"""The account of one run: its figures, its digest and, if asked for, its log file. A sink of events.

A long run can have the account kept by a second process: after FORK_AFTER events this one forks, the child goes on from
what was counted so far, and from then on only encoded lines go through a pipe. The child sees what the log holds, and
numbers survive JSON exactly, so both ways give the same account, bit for bit. The pipe holds PIPE_BYTES and then makes
the sender wait, so memory stays bounded. A child whose parent is gone ends by itself.

Why a fork: the child needs the counts, the running hash and the open file, and has them at no cost. Used on Linux with
two processors or more; elsewhere the account is kept here.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import PenstockError
from penstock.core.events import Event, Header
from penstock.report.log import MANY, Digest, LineDecoder, LogWriter, encode_lines
from penstock.report.metrics import Metrics
from penstock.report.summary import Figures

FORK_AFTER = 4_000  # events: shorter runs end before a second process pays
PIPE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounted:
    """What there is to say about a run."""

    figures: Figures
    digest: str
    num_events: int


class Account:
    """`emit` events, then `close`. `may_fork`: a long run may use a second process."""

    def __init__(
        self, *, log_path: Path | None = None, has_gaps: bool = True, may_fork: bool = False
    ) -> None:
        self._digest, self._metrics = Digest(), Metrics(has_gaps=has_gaps)
        self._writer = None if log_path is None else LogWriter(log_path, flush_after_s=None)
        self._events: list[Event] = []  # not yet encoded: many at a time cost less
        self._left = FORK_AFTER // MANY if may_fork and can_fork() else None
        self._child: _Child | None = None

    def emit(self, event: Event) -> None:
        events = self._events
        if self._child is not None:
            events.append(event)
            if len(events) == MANY:
                self._hand_over()
            return
        if type(event) is Header:
            self._begin(event)
            return
        self._metrics.emit(event)
        events.append(event)
        if len(events) == MANY:
            self._hand_over()

    def close(self) -> Accounted:
        """The account. Nothing is to be emitted afterwards."""
        self._hand_over()
        if self._child is not None:
            return self._child.result()
        if self._writer is not None:
            self._writer.close()
        return Accounted(
            figures=self._metrics.figures(),
            digest=self._digest.hexdigest(),
            num_events=self._digest.num_events,
        )

    def abandon(self) -> None:
        """The run failed: keep the log, forget the rest."""
        with contextlib.suppress(PenstockError):
            self.close()

    def _begin(self, header: Header) -> None:
        self._digest.emit(header)
        if self._writer is not None:
            self._writer.emit(header)

    def _hand_over(self) -> None:
        events = self._events
        told, num = encode_lines(events), len(events)
        events.clear()
        if self._child is not None:
            self._child.send(told)
            return
        self._take(told, num)
        if self._left is not None:
            self._left -= 1
            if not self._left:
                self._left = None
                self._child = self._fork()

    def _take(self, lines: bytes, num: int) -> None:
        self._digest.write(lines, num)
        if self._writer is not None:
            self._writer.write(lines, num)

    # ---------------------------------------------------------------- the second process

    def _fork(self) -> _Child | None:
        """None: the system has no room for another process, and the account is kept here."""
        lines_out, lines_in = os.pipe()
        told_out, told_in = os.pipe()
        with contextlib.suppress(OSError):  # the system may not allow that much
            fcntl.fcntl(lines_in, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            pid = os.fork()
        except OSError:
            for each in (lines_out, lines_in, told_out, told_in):
                os.close(each)
            return None
        if pid:
            os.close(lines_out)
            os.close(told_in)
            return _Child(pid, lines_in, told_out)
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's end is what ends this one
            gc.freeze()
            os.close(lines_in)
            os.close(told_out)
            self._keep(lines_out)
            with os.fdopen(told_in, "wb") as told:
                kept = self.close()  # told apart: compiled, it could not be made again of itself
                pickle.dump((kept.figures, kept.digest, kept.num_events), told)
            code = 0
        except Exception:  # noqa: BLE001 - the parent can only say that this one has ended
            traceback.print_exc()
        finally:
            os._exit(code)

    def _keep(self, source: int) -> None:
        """The child's life: count what comes until the parent closes."""
        decode, count = LineDecoder().decode, self._metrics.emit
        for lines in _whole_lines(source):
            events = lines.split(b"\n")
            events.pop()
            self._take(lines, len(events))
            for line in events:
                event = decode(line)
                if event is not None:
                    count(event)


class _Child:
    """The second process, seen from the first."""

    def __init__(self, pid: int, lines: int, told: int) -> None:
        self._pid, self._lines, self._told = pid, lines, told

    def send(self, lines: bytes) -> None:
        view = memoryview(lines)
        try:
            while view:
                written = os.write(self._lines, view)  # see tests/lab/test_compiling.py
                view = view[written:]
        except BrokenPipeError:
            raise self._lost() from None

    def result(self) -> Accounted:
        os.close(self._lines)
        with os.fdopen(self._told, "rb") as told:
            found = told.read()
        os.waitpid(self._pid, 0)
        if not found:
            raise self._lost()
        figures, digest, num_events = pickle.loads(found)  # noqa: S301 - our own fork said it
        assert isinstance(figures, Figures)
        return Accounted(figures=figures, digest=digest, num_events=num_events)

    def _lost(self) -> PenstockError:
        return PenstockError(
            "the process that kept the figures of this run has ended",
            hint="the system may be short of memory or of room on the disk; free some and run it again",
        )


def can_fork() -> bool:
    """Whether a second process would have a processor to run on, and is cheap to have."""
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1


def _whole_lines(source: int) -> Iterator[bytes]:
    rest = b""
    while chunk := os.read(source, PIPE_BYTES):
        end = chunk.rfind(b"\n") + 1
        if end:
            yield rest + chunk[:end]
            rest = chunk[end:]
        else:
            rest += chunk
