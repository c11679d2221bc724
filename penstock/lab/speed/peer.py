"""An engine's process, and the lines it speaks. Every line is a JSON object; what is not JSON is skipped.

The process says hello when its imports are done, and answers one question after the other:

    <- {"hello": "llama.cpp", "weights": ["bf16", "int8", "int4"]}
    -> {"do": "prepare", "model": FOLDER, "weights": "int8", "scratch": FOLDER}
    <- {"ok": true}                             what had to be converted lies in the scratch folder; not timed
    -> {"do": "load", "model": FOLDER, "weights": "int8", "scratch": FOLDER, "threads": 1,
        "requests": 32, "longest": 640, "tokens": 12000}
    <- {"ok": true, "about": "version, format"}
    -> {"do": "generate", "prompts": [[17, 4, ...], ...], "tokens": [64, ...], "every": 8}
    <- {"request": 0, "tokens": 1}              as soon as request 0 has so many tokens: the first, every `every`-th
    <- {"request": 0, "tokens": 8}              (null: no others), and the last
    <- {"ok": true}                             when all have ended
    -> {"do": "quit"}

`requests` come at once at most, `longest` is the most of prompt and answer together of one, `tokens` of all of them at
once. Answers are greedy, of exactly so many tokens, ends of text ignored. What cannot be done is answered with
{"error": "why"}; then the next question may come. `load` may tell {"pids": [...]}: the processes whose time counts
where the driver is not to be charged for driving; else it is the process and all that it has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.core.clock import now
from penstock.lab.local_server import below

TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
HELLO_S, ANSWER_S, QUIT_S = 180.0, 900.0, 20.0
LINE_BYTES = 1 << 20


class PeerFailed(Exception):
    """The engine cannot do what was asked, or is gone. It is listed as not run, with this reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSpec:
    """`loads`: more for its `load`. `measures`: those it takes part in, None = all."""

    name: str
    command: tuple[str, ...]
    loads: dict[str, object] = field(default_factory=dict)
    measures: frozenset[str] | None = None

    @classmethod
    def parse(cls, told: str) -> PeerSpec:
        """NAME=COMMAND."""
        name, _, command = told.partition("=")
        if not name or not command.strip():
            raise ValueError(f"{told!r} is not NAME=COMMAND")
        return cls(name=name, command=tuple(shlex.split(command)))


@dataclass(frozen=True, slots=True)
class Mark:
    """A line's instant, and the processor time that the engine had used by then."""

    at: float
    cpu_s: float
    request: int
    tokens: int


class Peer:
    """One process. `said`: the file that gets what it writes to stderr."""

    def __init__(self, spec: PeerSpec, said: Path) -> None:
        self.spec, self.said = spec, said
        self.about = ""
        self.weights: tuple[str, ...] = ()
        self.load_reply: dict[str, Any] = {}
        self.began_at = self.hello_at = 0.0
        self._counted: list[int] | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises PeerFailed."""
        self.said.parent.mkdir(parents=True, exist_ok=True)
        self.began_at = now()
        try:
            with self.said.open("ab") as file:
                self._process = await asyncio.create_subprocess_exec(
                    *self.spec.command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=file,
                    limit=LINE_BYTES,
                )
        except OSError as error:
            raise PeerFailed(f"{self.spec.command[0]}: {error.strerror}") from None
        hello = await self._line(HELLO_S)
        self.hello_at = now()
        if "hello" not in hello:
            raise PeerFailed(f"it began with {hello} and no hello")
        self.about, self.weights = str(hello["hello"]), tuple(hello.get("weights", ()))

    async def prepare(self, question: dict[str, object]) -> None:
        await self.ask({"do": "prepare", **question}, lambda mark: None)

    async def load(self, question: dict[str, object]) -> None:
        reply = await self.ask({"do": "load", **question, **self.spec.loads}, lambda mark: None)
        self.about = str(reply.get("about", self.about))
        self.load_reply = reply
        self._counted = reply.get("pids")

    async def ask(
        self, question: dict[str, object], on_mark: Callable[[Mark], None]
    ) -> dict[str, Any]:
        """The reply that ends the question; marks on the way. Raises PeerFailed."""
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            await process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise PeerFailed(self._last_words()) from None
        while True:
            line = await self._line(ANSWER_S)
            if "request" in line:
                at = now()
                on_mark(Mark(at, self.cpu_s(), int(line["request"]), int(line["tokens"])))
            elif "error" in line:
                raise PeerFailed(str(line["error"]))
            elif line.get("ok"):
                return line

    async def _line(self, limit_s: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdout is not None
        while True:
            try:
                told = await asyncio.wait_for(process.stdout.readline(), limit_s)
            except TimeoutError:
                raise PeerFailed(f"no answer in {limit_s:g} s") from None
            if not told:
                raise PeerFailed(self._last_words())
            with contextlib.suppress(ValueError):
                found = json.loads(told)
                if isinstance(found, dict):
                    return found

    def _last_words(self) -> str:
        lines = self.said.read_text(errors="replace").strip().splitlines()
        return f"it ended: {lines[-1] if lines else 'it said nothing'}"

    def pids(self) -> list[int]:
        """Whose time counts."""
        assert self._process is not None
        if self._counted is not None:
            return self._counted
        return [self._process.pid, *below(self._process.pid)]

    def cpu_s(self) -> float:
        """Processor time used so far."""
        return sum(_ticks(self.pids())) * TICKS_S

    async def quit(self) -> None:
        """Ask it to end, and insist."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        children = below(process.pid)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(b'{"do": "quit"}\n')
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), QUIT_S)
        except TimeoutError:
            for pid in (*children, process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            await process.wait()


def _ticks(pids: list[int]) -> Iterator[int]:
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            yield int(fields[11]) + int(fields[12])
