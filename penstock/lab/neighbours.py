"""How much of this machine's processor time others took while we measured.

    share = (busy time of all cores + time stolen by the host's other guests - time of our processes) / (cores * time)

From /proc/stat and /proc/PID/stat, in ticks of 10 ms, so a measurement should last seconds. Interrupts that serve us
count as others'. Elsewhere than on Linux nothing is known, and a measurement is then neither clean nor marked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

PROC = Path("/proc")
BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal; idle and iowait are not
OWN = (11, 12)  # utime and stime, counted after the name in parentheses


class Watch:
    """Counts from its making to `share()`. `pids` is asked at both ends: processes may be started in between."""

    def __init__(self, pids: Callable[[], Sequence[int]], proc: Path = PROC) -> None:
        self._pids, self._proc = pids, proc
        self._began = self._read()

    def share(self) -> float | None:
        """The share of the machine that others took; None where the system does not tell."""
        began, ended = self._began, self._read()
        if began is None or ended is None or ended[1] <= began[1]:
            return None
        busy, total = ended[0] - began[0], ended[1] - began[1]
        own = sum(ticks - began[2].get(pid, 0) for pid, ticks in ended[2].items())
        return max(0.0, (busy - own) / total)

    def _read(self) -> tuple[int, int, dict[int, int]] | None:
        """(busy ticks, all ticks, ticks of each of our processes)"""
        try:
            first = (self._proc / "stat").read_text().splitlines()[0]
        except OSError:
            return None
        ticks = [int(each) for each in first.split()[1:9]]
        own = {pid: self._own(pid) for pid in {os.getpid(), *self._pids()}}
        return sum(ticks[i] for i in BUSY), sum(ticks), own

    def _own(self, pid: int) -> int:
        try:
            told = (self._proc / str(pid) / "stat").read_text()
        except OSError:
            return 0  # it has ended
        fields = told.rpartition(")")[2].split()
        return sum(int(fields[i]) for i in OWN)
