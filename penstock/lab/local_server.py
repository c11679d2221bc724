"""A real `penstock serve` in a process of its own, for measurements on this machine.

    with LocalServer(["default"], folder) as server:
        ...  server.url, server.pids(), server.engine_log()

It is started with the command line a user types; what it says goes to a file in the folder, and so do its event logs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock.core.errors import StepFailed
from penstock.core.events import Opened
from penstock.report.log import LogReader
from penstock.report.made import MadeReplica, made_of

READY = re.compile(r"ready at (http://\S+?)/v1 ")
KEY = "PENSTOCK_API_KEY"  # would lock the server that we measure
START_S, STOP_S, LOOK_S = 300.0, 30.0, 0.1


class LocalServer:
    """See the module's text. `arguments` follow `penstock serve`; port and log folder are added."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self.arguments = ["serve", *arguments, "--port", "0", "--log", str(folder / "logs")]
        self.said = folder / "serve.txt"
        self.url = ""

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self.said.open("wb") as file:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and package
                [sys.executable, "-m", "penstock", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if name != KEY},
            )
        try:
            self.url = self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait(self) -> str:
        for _ in range(int(START_S / LOOK_S)):
            found = READY.search(self.said.read_text(errors="replace"))
            if found is not None:
                return found[1]
            try:
                self._process.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                continue
            break
        told = self.said.read_text(errors="replace").strip().splitlines()[-6:]
        raise StepFailed(
            "the server to be measured did not start: " + " | ".join(told or ["it said nothing"]),
            hint=f"try it by itself: penstock {' '.join(self.arguments)}",
        )

    def stop(self) -> None:
        """Ask it to end, and insist. Its logs are whole afterwards."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def pids(self) -> list[int]:
        """The server's process and all below it."""
        return [self._process.pid, *below(self._process.pid)]

    def engine_logs(self) -> list[Path]:
        """The event logs of its replicas."""
        logs = sorted((self._folder / "logs").glob("*.jsonl"))
        return [path for path in logs if not path.name.startswith("fleet-")]

    def made(self) -> MadeReplica:
        """What its first replica was made of; logs are sure to say so once it has ended."""
        for event in LogReader(self.engine_logs()[0]):
            if isinstance(event, Opened):
                made = made_of(event)
                assert isinstance(made, MadeReplica)
                return made
        raise StepFailed("the server's log does not say what its replica was made of")


def below(pid: int) -> list[int]:
    """Processes started by `pid`, and by those; empty where the system does not tell."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *below(child)]
    return found
