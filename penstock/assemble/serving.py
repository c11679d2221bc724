"""A configuration as an HTTP server, from the first line to the last.

    try the port -> find the models -> load their text -> start the engines -> listen -> (signal) drain -> stop them

The first SIGTERM or SIGINT drains: new requests are refused with 503 and Retry-After, running ones end, at the latest
after `drain_timeout_s`. A second one, or the end of that time, closes what is open and ends the engines at once.
Whatever goes wrong on the way up ends the engines that were started and is raised.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.assemble import assemble
from penstock.assemble.config import Config, FleetConfig
from penstock.assemble.hash_keys import hash_key_of
from penstock.assemble.leaves import process_leaves
from penstock.assemble.presets import policy_tables
from penstock.assemble.remotes import Remotes
from penstock.cluster.fleets import Fleets
from penstock.cluster.keeper import Runtime
from penstock.core.errors import BadConfig
from penstock.engine.torch.hub import find_model
from penstock.gateway.app import Gateway, create_app
from penstock.gateway.server import Server, listen, url_of
from penstock.gateway.text import TextModel
from penstock.gateway.vectors import Use, use_of
from penstock.report.files import check_writable

STILL_S = 10.0  # silence of engines that load before people are told that they do
SAME_SIGNAL_S = 0.3  # people take longer to press Ctrl-C again


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What there is to tell once the server answers. `abouts`: what each replica runs on; `use`: of the first model."""

    url: str
    config: Config
    models: tuple[str, ...]
    abouts: tuple[str, ...]
    num_blocks: int
    max_context: int
    use: Use = "writes"


def localise(config: Config) -> Config:
    """Every model as a folder on this machine, fetched if need be; names stay. Raises BadModel, MissingExtra."""
    fleets = []
    for index, fleet in enumerate(config.fleet):
        if fleet.remote is not None:
            fleets.append(fleet)
            continue
        if fleet.executor.kind != "torch":
            raise BadConfig(
                f"fleet[{index}].executor.kind is {fleet.executor.kind!r}, which cannot serve text",
                hint="`penstock simulate` runs modelled executors",
            )
        if fleet.executor.vision is not None:
            raise BadConfig(
                f"fleet[{index}].executor.vision: real engines take text only",
                hint="leave it out, or run `penstock simulate`",
            )
        folder = find_model(
            fleet.model,
            revision=fleet.revision,
            endpoint=config.hub.endpoint,
            cache_dir=None if config.hub.cache_dir is None else config.hub.cache_dir.expanduser(),
            is_offline=config.hub.offline,
        )
        fleets.append(replace(fleet, model=str(folder), name=fleet.served_name))
    return replace(config, fleet=tuple(fleets))


def load_texts(config: Config) -> dict[str, TextModel]:
    """A text model for every name that is served from here. Raises BadModel."""
    texts: dict[str, TextModel] = {}
    for fleet in _own(config):
        text = TextModel.load(Path(fleet.model), max_context=fleet.executor.max_context)
        texts.update(dict.fromkeys(_names(fleet), text))
    return texts


def _own(config: Config) -> list[FleetConfig]:
    """Fleets that are not foreign servers."""
    return [fleet for fleet in config.fleet if fleet.remote is None]


def _names(fleet: FleetConfig) -> tuple[str, ...]:
    return (fleet.served_name, *fleet.aliases)


def run(
    config: Config,
    *,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_ready: Callable[[Ready], None] = lambda ready: None,
) -> bool:
    """Serve until told to stop; whether everything that was running could end. Raises PenstockError."""
    listen(config.gateway.host, config.gateway.port).close()  # fail before any model is loaded
    if config.log.dir is not None:
        check_writable(config.log.dir / "fleet.jsonl", "event logs to")
    if _own(config):
        on_phase(f"looking for {', '.join(fleet.model for fleet in _own(config))}")
    config = localise(config)
    for fleet in _own(config):
        on_phase(f"model {fleet.served_name} is in {fleet.model}; reading its tokenizer")
    texts = load_texts(config)
    with asyncio.Runner(loop_factory=_fast_loop()) as runner:
        try:
            return runner.run(serve(config, texts, on_phase=on_phase, on_ready=on_ready))
        except asyncio.CancelledError:
            return False  # a signal while the engines were starting


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop


async def serve(
    config: Config,
    texts: Mapping[str, TextModel],
    *,
    on_phase: Callable[[str], None],
    on_ready: Callable[[Ready], None],
) -> bool:
    """Start the engines of a localised configuration and serve; see `run`."""
    hash_key = hash_key_of(config)
    remotes = Remotes(hash_key)
    try:
        config = await remotes.expand(config, on_phase)
        texts = {**texts, **remotes.texts(config)}
    except BaseException:
        await remotes.close()
        raise
    leaves, processes = process_leaves(config, remotes)
    num_engines = sum(fleet.replicas for fleet in _own(config))
    if num_engines:
        on_phase(f"starting {num_engines} engine(s)")
    with Stopper(processes, config.serve.drain_timeout_s, on_phase) as stopper:
        with Waiting(processes, on_phase):
            service = await assemble(config, leaves)
        try:
            _narrow(texts, config, service)
            foreign = [
                name for fleet in config.fleet if fleet.remote is not None for name in _names(fleet)
            ]
            app = create_app(service, texts, config.gateway, hash_key=hash_key, foreign=foreign)
            _tell_policies(app, config)
            app.state.recent = None if leaves.recent is None else leaves.recent.events
            listener = listen(config.gateway.host, config.gateway.port)
            first = service.models()[0]
            use = "writes" if first in foreign else use_of(texts[first])
            ready = _ready(url_of(listener), config, service, processes, use)
            stopper.server = server = Announced(app, lambda: on_ready(ready))
            gc.collect()
            gc.freeze()  # what was loaded stays: no pause of a stream while all of it is looked through
            await server._serve([listener])  # serve() would take the signals
        finally:
            if stopper.is_forced:
                processes.kill()
            await service.stop()
    return not stopper.is_forced


def _narrow(texts: Mapping[str, TextModel], config: Config, service: Fleets) -> None:
    """A replica may hold less context than its model was made for. Where they lend, their fleet knows how much."""
    for fleet in _own(config):
        if fleet.lends:
            continue
        holds = min(report.max_context for report in service.fleet(fleet.served_name).reports())
        for name in _names(fleet):
            texts[name].context_tokens = min(texts[name].context_tokens, holds)


def _tell_policies(app: Gateway, config: Config) -> None:
    """Which policies serve which model, for /metrics."""
    for fleet in config.fleet:
        tables = policy_tables(fleet.policy, fleet.cache.prefix)
        if fleet.remote is not None:
            tables = {"route": tables["route"]}
        names = {slot: str(table["name"]) for slot, table in tables.items()}
        app.meter.tell_policies(fleet.served_name, names)


def _ready(url: str, config: Config, service: Fleets, processes: Runtime, use: Use) -> Ready:
    reports = service.reports()
    return Ready(
        url=url,
        config=config,
        models=tuple(service.models()),
        abouts=(*(engine.link.about for engine in processes.engines), *_behind(config)),
        num_blocks=sum(report.total_blocks for report in reports),
        max_context=max(report.max_context for report in reports),
        use=use,
    )


def _behind(config: Config) -> list[str]:
    remotes = [fleet.remote for fleet in config.fleet if fleet.remote is not None]
    urls = dict.fromkeys(url for remote in remotes for url in remote.urls)
    return [f"the server(s) at {', '.join(urls)}"] if urls else []


class Waiting:
    """Says every STILL_S which engines are still loading: weights of tens of gigabytes take minutes."""

    def __init__(self, processes: Runtime, on_phase: Callable[[str], None]) -> None:
        self._processes, self._on_phase = processes, on_phase
        self._waited_s = 0.0

    def __enter__(self) -> None:
        self._arm()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(STILL_S, self._tell)

    def _tell(self) -> None:
        self._waited_s += STILL_S
        open_ones = [each.spec.name for each in self._processes.engines if not each.link.is_alive]
        self._on_phase(f"still loading after {self._waited_s:g} s: {', '.join(open_ones)}")
        self._arm()


class Announced(Server):
    """A server that says when it answers."""

    def __init__(self, gateway: Gateway, on_started: Callable[[], None]) -> None:
        super().__init__(gateway)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


class Stopper:
    """Turns signals into the two steps of stopping; a context of the serving task."""

    def __init__(
        self, processes: Runtime, drain_timeout_s: float, on_phase: Callable[[str], None]
    ) -> None:
        self.server: Server | None = None
        self.is_forced = False
        self._on_phase = on_phase
        self._processes, self._timeout_s = processes, drain_timeout_s
        self._draining_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Stopper:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.stop)
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Once: drain. Twice, or before there is anything to drain: end.

        A signal to a whole process group may reach us a second time through a parent that passes it on (make does),
        so one that follows within SAME_SIGNAL_S is the first one again.
        """
        at = self._loop.time()
        if self.server is None or not self.server.started:
            self._processes.kill()
            assert self._task is not None
            self._task.cancel()
        elif self._draining_since is None:
            self._draining_since = at
            self._on_phase(
                f"draining: running requests have {self._timeout_s:g} s; a second signal stops at once"
            )
            self._timer = self._loop.call_later(self._timeout_s, self._force)
            self.server.stop()
        elif at - self._draining_since > SAME_SIGNAL_S:
            self._force()

    def _force(self) -> None:
        if not self.is_forced:
            self.is_forced = True
            self._on_phase("stopping at once")
            self._processes.kill()
            assert self.server is not None
            self.server.stop()
