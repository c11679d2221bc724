"""Replicas in processes of their own: started, watched, started again.

Each process gets its spec on stdin and a private channel; it is up when its replica says hello. What it writes is
logged line by line with its name in front, and the last lines are kept to say why it could not start.

A process that ends without being told to is started again (cluster.keeper); one that stands still or breaks its channel
is ended and started again. A process that has not said hello after `start_timeout_s` is ended too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from collections import deque
from pathlib import Path

import penstock
from penstock.cluster.keeper import Keeper
from penstock.cluster.link import ReplicaLink
from penstock.cluster.silence import Patience
from penstock.cluster.spec import ReplicaSpec
from penstock.core.errors import ReplicaLost
from penstock.core.messages import Message
from penstock.net.codec import Codec
from penstock.net.zmq import ZmqChannel, private_endpoint

STOP_TIMEOUT_S = 5.0
START_TIMEOUT_S = 600.0  # large models load for minutes
TAIL_LINES = 12
SPINS = "1000"
WORKER = "penstock.cluster.worker"
_log = logging.getLogger("penstock.engine")


class EngineProcess:
    """One replica's process and its successors."""

    def __init__(
        self,
        spec: ReplicaSpec,
        link: ReplicaLink,
        *,
        max_restarts: int,
        start_timeout_s: float = START_TIMEOUT_S,
        worker: str = WORKER,
    ) -> None:
        self.spec, self.link = spec, link
        self._start_timeout_s, self._worker = start_timeout_s, worker
        self._process: asyncio.subprocess.Process | None = None
        self._folder: Path | None = None
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader: asyncio.Task[None] | None = None
        self._keeper = Keeper(
            link,
            what="engine process",
            launch=self._launch,
            until_over=self._until_over,
            max_restarts=max_restarts,
        )

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Bring the process up, once; raise why it cannot. From then on it is kept up."""
        await self._launch()
        self._keeper.begin()

    async def stop(self) -> None:
        """Wait for a process that was told to stop, and end it if it does not."""
        self._keeper.stop()
        process = self._process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self.kill()
                await process.wait()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        self._clean()

    def kill(self) -> None:
        """End the process now."""
        self._keeper.is_stopping = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    # ---------------------------------------------------------------- one process

    async def _launch(self) -> None:
        self._tail.clear()
        endpoint, self._folder = private_endpoint()
        channel = ZmqChannel.bind(endpoint, Codec(Message))
        self.link.attach(channel)
        try:
            process = await self._spawn()
        except OSError as error:  # no memory, no processes left: a restart tries again later
            self.link.lose("its process did not start")
            self._unlink()
            raise ReplicaLost(
                f"the engine process of {self.spec.name} cannot be started: {error.strerror or error}",
                hint="free memory or processes on this machine",
            ) from None
        self._process = process
        self._reader = asyncio.create_task(self._read(process))
        assert process.stdin is not None
        order = {"spec": self.spec.to_json(), "endpoint": endpoint}
        process.stdin.write(json.dumps(order).encode() + b"\n")
        await self._until_ready(process)

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._worker,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # what the terminal or a group sends is for the parent to coordinate
            env=_environment(),
        )

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        ready = asyncio.ensure_future(self.link.ready())
        ended = asyncio.ensure_future(process.wait())
        try:
            await self._wait_for_either(ready, ended)
            if not ready.done():  # what it said last may be on its way
                await asyncio.wait((ready,), timeout=1.0)
            if ready.done() and not isinstance(ready.exception(), ReplicaLost):
                ready.result()
                return
            await asyncio.wait((ended,), timeout=1.0)
            await self._drain_reader()
            raise ReplicaLost(
                f"the engine process of {self.spec.name} {_ending(process)} before it was ready",
                hint=self._last_lines(),
            )
        except BaseException:
            self.link.lose("it did not start")
            if process.returncode is None:
                process.kill()
            raise
        finally:
            ready.cancel()
            ended.cancel()
            self._unlink()

    async def _wait_for_either(
        self, ready: asyncio.Future[None], ended: asyncio.Future[int]
    ) -> None:
        """Raises ReplicaLost when neither comes in time."""
        done, _ = await asyncio.wait(
            (ready, ended), timeout=self._start_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            raise ReplicaLost(
                f"the engine process of {self.spec.name} was not ready after {self._start_timeout_s:g} s",
                hint=f"where it needs longer, set serve.start_timeout_s; {self._last_lines()}",
            )

    def _last_lines(self) -> str:
        lines = "\n".join(f"    {line}" for line in self._tail)
        return f"its last lines were:\n{lines}" if lines else "it said nothing"

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line longer than the buffer
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._tail.append(text)
            _log.info("[%s] %s", self.spec.name, text)

    async def _drain_reader(self) -> None:
        if self._reader is not None:
            await asyncio.wait((self._reader,), timeout=1.0)

    # ---------------------------------------------------------------- and its successors

    async def _until_over(self) -> str:
        """Wait for the end of the process; end it when its channel is gone."""
        process = self._process
        assert process is not None
        ended = asyncio.ensure_future(process.wait())
        gone = asyncio.ensure_future(self.link.gone())
        try:
            await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and not self._keeper.is_stopping:
                await asyncio.wait((ended,), timeout=1.0)  # it may be on its way out
                if not ended.done():
                    process.kill()
            await ended
        finally:
            ended.cancel()
            gone.cancel()
        if not self._keeper.is_stopping:
            self._clean()
        return _ending(process)

    def _unlink(self) -> None:
        """Both ends are connected, or never will be: the file system need not know the endpoint any more."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _clean(self) -> None:
        self._unlink()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


class Processes:
    """Leaves of a server: every replica in a process of its own."""

    def __init__(
        self,
        *,
        max_restarts: int = 5,
        start_timeout_s: float = START_TIMEOUT_S,
        patience: Patience | None = None,
        worker: str = WORKER,
    ) -> None:
        self._max_restarts, self._worker = max_restarts, worker
        self._patience = patience or Patience()
        self._start_timeout_s = start_timeout_s
        self.engines: list[EngineProcess] = []

    async def start(self, spec: ReplicaSpec, link: ReplicaLink) -> None:
        """Return when the replica answers on its link. Raises why it cannot."""
        engine = EngineProcess(
            spec,
            link,
            max_restarts=self._max_restarts,
            start_timeout_s=self._start_timeout_s,
            worker=self._worker,
        )
        self.engines.append(engine)
        link.expect_beats(self._patience)
        await engine.start()

    async def stop(self) -> None:
        await asyncio.gather(*(engine.stop() for engine in self.engines))

    def kill(self) -> None:
        """End all processes now."""
        for engine in self.engines:
            engine.kill()


def _ending(process: asyncio.subprocess.Process) -> str:
    code = process.returncode
    if code is None:
        return "is still running"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _environment() -> dict[str, str]:
    """The child finds this very package, wherever it was imported from, and its threads do not wait spinning.

    OpenMP's threads spin for milliseconds between two parallel regions unless told otherwise, on the very cores that
    the HTTP process and the engine's loop need; SPINS bridge the gap between two kernels of a step and no more.
    """
    root = str(Path(penstock.__file__).parent.parent)
    known = os.environ.get("PYTHONPATH")
    is_told = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    waits = {} if is_told else {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": SPINS}
    return {
        **os.environ,
        **waits,
        "PYTHONPATH": root if not known else f"{root}{os.pathsep}{known}",
    }
