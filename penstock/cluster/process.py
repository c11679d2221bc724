"""Replicas in processes of their own: started, watched, started again.

Each process gets its spec on stdin and a private channel; it is up when its replica says hello. What it writes is
logged line by line with its name in front, and the last lines are kept to say why it could not start.

A process that ends without being told to is started again (cluster.keeper); one that stands still or breaks its channel
is ended and started again. A process that has not said hello after `start_timeout_s` is ended too.

Engines of a deployment (cluster.deployment) outlive this process: those that the server before left serve on where they
are what would be started, and are ended where not; what they write goes to files that are read as they grow.
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
from typing import IO

import penstock
from penstock.cluster.deployment import Deployment, Outlive
from penstock.cluster.doorway import Survivor, end_behind, find_like
from penstock.cluster.keeper import Keeper
from penstock.cluster.link import ReplicaLink
from penstock.cluster.silence import Patience
from penstock.cluster.spec import ReplicaSpec
from penstock.cluster.tail import Tail
from penstock.core.errors import PenstockError, ReplicaLost
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
        deployment: Deployment | None = None,
    ) -> None:
        self.spec, self.link = spec, link
        self._start_timeout_s, self._worker = start_timeout_s, worker
        self._deployment = deployment
        self._process: asyncio.subprocess.Process | Survivor | None = None
        self._stdin: asyncio.StreamWriter | None = None
        self._folder: Path | None = None
        self._last: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader: asyncio.Task[None] | None = None
        self._tail: Tail | None = None
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
        if self._tail is not None:
            self._tail.close()
            self._tail = None
        self._clean()

    def kill(self) -> None:
        """End the process now."""
        self._keeper.is_stopping = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    # ---------------------------------------------------------------- one process

    async def _launch(self) -> None:
        self._last.clear()
        if self._deployment is not None and await self._take_over(self._deployment):
            return
        endpoint = self._attach()
        try:
            process = await self._spawn()
        except OSError as error:  # no memory, no processes left: a restart tries again later
            self.link.lose("its process did not start")
            self._unlink()
            raise ReplicaLost(
                f"the engine process of {self.spec.name} cannot be started: {error.strerror or error}",
                hint="free memory or processes on this machine",
            ) from None
        self._process, self._stdin = process, process.stdin
        if process.stdout is not None:
            self._reader = asyncio.create_task(self._read(process.stdout))
        order: dict[str, object] = {"spec": self.spec.to_json(), "endpoint": endpoint}
        if self._deployment is not None:
            path, for_s = self._deployment.socket(self.spec.name), self._deployment.outlive.for_s
            order["door"] = {"path": str(path), "for_s": for_s}
        assert self._stdin is not None
        self._stdin.write(json.dumps(order).encode() + b"\n")
        await self._until_ready(process)

    def _attach(self) -> str:
        """Give the link a new channel; its other end."""
        endpoint, self._folder = private_endpoint()
        self.link.attach(ZmqChannel.bind(endpoint, Codec(Message)))
        return endpoint

    async def _take_over(self, deployment: Deployment) -> bool:
        """Serve by the engine that the server before left, if there is one that would be started anyway."""
        name = self.spec.name
        survivor = await find_like(deployment.socket(name), self.spec)
        if survivor is None:
            return False
        self._process, self._stdin = survivor, None
        endpoint = self._attach()
        try:
            self._follow(deployment.log(name))
            await survivor.serve_at(endpoint)
            await self._until_ready(survivor)
        except (PenstockError, OSError) as error:
            self.link.lose("it was not taken over")
            survivor.kill()
            await survivor.wait()
            self._unlink()
            _log.warning("[%s] the engine of the server before is of no use: %s", name, error)
            return False
        _log.info("[%s] the engine of the server before goes on, process %d", name, survivor.pid)
        return True

    async def _spawn(self) -> asyncio.subprocess.Process:
        with contextlib.ExitStack() as files:
            out: IO[bytes] | int = asyncio.subprocess.PIPE
            if self._deployment is not None:
                path = self._deployment.log(self.spec.name)
                self._follow(path)
                out = files.enter_context(path.open("ab"))
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._worker,
                stdin=asyncio.subprocess.PIPE,
                stdout=out,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # what the terminal or a group sends is for the parent to coordinate
                env=_environment(),
            )

    def _follow(self, path: Path) -> None:
        if self._tail is not None:
            self._tail.close()
        self._tail = Tail(path, self._tell_line)

    async def _until_ready(self, process: asyncio.subprocess.Process | Survivor) -> None:
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
        lines = "\n".join(f"    {line}" for line in self._last)
        return f"its last lines were:\n{lines}" if lines else "it said nothing"

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stdout.readline()
            except ValueError:  # a line longer than the buffer
                continue
            if not line:
                return
            self._tell_line(line.decode(errors="replace").rstrip())

    def _tell_line(self, line: str) -> None:
        self._last.append(line)
        _log.info("[%s] %s", self.spec.name, line)

    async def _drain_reader(self) -> None:
        if self._tail is not None:
            self._tail.read()
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
        if self._stdin is not None:
            self._stdin.close()


class Processes:
    """Leaves of a server: every replica in a process of its own."""

    def __init__(
        self,
        *,
        max_restarts: int = 5,
        start_timeout_s: float = START_TIMEOUT_S,
        patience: Patience | None = None,
        worker: str = WORKER,
        outlive: Outlive | None = None,
    ) -> None:
        self._max_restarts, self._worker = max_restarts, worker
        self._deployment = None if outlive is None else Deployment(outlive)
        self._strangers: asyncio.Task[None] | None = None
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
            deployment=self._deployment,
        )
        self.engines.append(engine)
        if self._deployment is not None:
            await asyncio.sleep(0)  # all that start together are known now
            if self._strangers is None:
                self._strangers = asyncio.create_task(self._end_strangers(self._deployment))
            await self._strangers
        link.expect_beats(self._patience)
        await engine.start()

    async def _end_strangers(self, deployment: Deployment) -> None:
        """Engines of the server before that nobody asks for now: their memory is needed."""
        asked = {deployment.socket(engine.spec.name) for engine in self.engines}
        strange = [path for path in deployment.sockets() if path not in asked]
        await asyncio.gather(*(end_behind(path) for path in strange))

    async def stop(self) -> None:
        await asyncio.gather(*(engine.stop() for engine in self.engines))
        if self._deployment is not None:
            self._deployment.close()
            self._deployment = None

    def kill(self) -> None:
        """End all processes now."""
        for engine in self.engines:
            engine.kill()


def _ending(process: asyncio.subprocess.Process | Survivor) -> str:
    code = process.returncode
    if code is None:
        return "is still running"
    if isinstance(process, Survivor):
        return "has ended"
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
