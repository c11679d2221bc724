"""One foreign server, watched: whether it is up, what it serves, how busy it is.

    look: GET /health, or /v1/models where there is no such path       -> up or not
          /v1/models when it comes up                                  -> names and context of its models
          /metrics as long as it is offered                            -> load (cluster.foreign)

Up: it is looked at every `probe_s`. Down after `max_failures` looks in a row that failed, or at once when a request
finds nobody there; then it is looked at less and less often, twice the time each, up to `back_off_s`. The first good
look brings it back. Watchers hear of every look.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from penstock.cluster.foreign import Load, RemoteConfig, read_load
from penstock.core.errors import PenstockError
from penstock.net.upstream import Upstream

MISSING = (404, 405, 501)
_log = logging.getLogger("penstock.cluster")


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


class Server:
    """Make it inside a running loop; `look` once before the first use, `start` to go on looking."""

    def __init__(self, url: str, config: RemoteConfig) -> None:
        self.url = url
        self.is_alive = False
        self.load = Load()
        self.models: dict[str, int | None] = {}  # and the context that each allows
        self.adapters: frozenset[str] = frozenset()  # those of them that are adapters of others
        self.upstream = Upstream(
            url,
            api_key=config.key(),
            connect_timeout_s=config.connect_timeout_s,
            idle_timeout_s=config.idle_timeout_s,
        )
        self._config = config
        self._path = "/health"
        self._has_metrics = True
        self._num_failures = 0
        self._watchers: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._is_closed = False

    @property
    def is_suspect(self) -> bool:
        """Whether the last look failed: others are asked first."""
        return self._num_failures > 0

    def watch(self, on_look: Callable[[], None]) -> None:
        self._watchers.append(on_look)

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep_looking())

    async def close(self) -> None:
        """May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self.upstream.close()

    def miss(self) -> None:
        """A request found nobody there."""
        self._fall("a request could not reach it")
        self._tell()
        self.doubt()

    def doubt(self) -> None:
        """A request went wrong there: look at it now."""
        self._hurry.set()

    async def look(self) -> bool:
        """One look; whether the server is up."""
        try:
            await self._look()
        except PenstockError as error:
            self._num_failures += 1
            if not self.is_alive or self._num_failures >= self._config.max_failures:
                self._fall(error.message)
        else:
            self._num_failures = 0
            if not self.is_alive:
                _log.info("the server at %s is up: %s", self.url, ", ".join(self.models))
            self.is_alive = True
        self._tell()
        return self.is_alive

    def _fall(self, why: str) -> None:
        if self.is_alive:
            _log.warning("the server at %s is down: %s", self.url, why)
        self.is_alive = False
        self.load = Load()

    def _tell(self) -> None:
        for on_look in self._watchers:
            on_look()

    async def _look(self) -> None:
        status, body = await self._get(self._path)
        if status in MISSING and self._path == "/health":
            self._path = "/v1/models"
            status, body = await self._get(self._path)
        if status != 200:
            raise PenstockError(f"{self._path} answered with status {status}")
        if not self.is_alive:
            await self._learn_models()
            self._has_metrics = True
        if self._has_metrics:
            status, body = await self._get("/metrics")
            self._has_metrics = status == 200
            self.load = read_load(body) if self._has_metrics else Load()

    async def _learn_models(self) -> None:
        status, body = await self._get("/v1/models")
        if status != 200:
            raise PenstockError(f"/v1/models answered with status {status}")
        try:
            told = msgspec.json.decode(body, type=_Models)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise PenstockError("/v1/models is no list of models") from None
        self.models = {model.id: model.max_model_len for model in told.data}
        self.adapters = frozenset(model.id for model in told.data if model.parent is not None)

    async def _get(self, path: str) -> tuple[int, bytes]:
        return await self.upstream.get(path, self._config.probe_timeout_s)

    async def _keep_looking(self) -> None:
        pause_s = self._config.probe_s
        while True:
            self._hurry.clear()
            try:
                async with asyncio.timeout(pause_s):
                    await self._hurry.wait()
            except TimeoutError:
                pass
            if await self.look():
                pause_s = self._config.probe_s
            else:
                pause_s = min(2 * pause_s, self._config.back_off_s)
