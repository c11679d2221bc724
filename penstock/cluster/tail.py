"""Reads the lines that are added to a file, as they come: of a process that may outlive its reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

LOOK_S = 0.2
MOST_BYTES = 1 << 20  # of one look


class Tail:
    """Lines that come after it was made; `on_line` hears each, without its end. Needs a running loop."""

    def __init__(self, path: Path, on_line: Callable[[str], None]) -> None:
        path.touch(mode=0o600)
        self._file = path.open("rb")
        self._file.seek(0, 2)
        self._on_line, self._rest = on_line, b""
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def read(self) -> None:
        """What has come by now."""
        while told := self._file.read(MOST_BYTES):
            *lines, self._rest = (self._rest + told).split(b"\n")
            for line in lines:
                self._on_line(line.decode(errors="replace").rstrip())

    def close(self) -> None:
        self._timer.cancel()
        self.read()
        self._file.close()

    def _look(self) -> None:
        self.read()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)
