"""Foreign servers of a configuration: each is looked at once, and what they serve becomes fleets.

A fleet with a name is that model on all of its servers, each of which may call it otherwise (`remote.models`; one
that serves a single model needs no word). A fleet without a name becomes one fleet for every model that its servers
list, each with the servers that list it. Servers that do not answer are no error as long as the names are known: they
are looked for from then on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from penstock.assemble.config import Config, FleetConfig
from penstock.cluster.foreign import RemoteConfig
from penstock.cluster.remote import RemoteReplica
from penstock.cluster.server import Server
from penstock.cluster.told_blocks import ToldBlocks
from penstock.core.errors import BadConfig
from penstock.gateway.text import TextModel


class Remotes:
    """The servers of all fleets; make it inside a running loop. `hash_key` as in gateway.app.create_app."""

    def __init__(self, hash_key: bytes = b"") -> None:
        self._hash_key = hash_key
        self._servers: dict[str, Server] = {}

    async def expand(self, config: Config, on_phase: Callable[[str], None]) -> Config:
        """The configuration with a name and a model for every server. Raises BadConfig."""
        told = [
            (url, fleet.remote)
            for fleet in config.fleet
            if fleet.remote
            for url in fleet.remote.urls
        ]
        if not told:
            return config
        on_phase(f"looking at {', '.join(url for url, _ in told)}")
        for url, remote in told:
            if url not in self._servers:
                self._servers[url] = Server(url, remote)
        servers = list(self._servers.values())
        await asyncio.gather(*(server.look() for server in servers))
        for server in servers:
            if not server.is_alive:
                on_phase(f"the server at {server.url} does not answer yet")
        fleets = [each for fleet in config.fleet for each in self._fleets_of(fleet)]
        _refuse_twins(fleets)
        return replace(config, fleet=tuple(fleets))

    def _fleets_of(self, fleet: FleetConfig) -> Sequence[FleetConfig]:
        remote = fleet.remote
        if remote is None:
            return [fleet]
        servers = [self._servers[url] for url in remote.urls]
        if fleet.name is not None:
            models = {each.url: self._called(each, fleet.name, remote) for each in servers}
            return [replace(fleet, remote=replace(remote, models=models))]
        names = list(dict.fromkeys(name for server in servers for name in server.models))
        if not names:
            raise BadConfig(
                f"none of {', '.join(remote.urls)} says which models it serves",
                hint="start them first, or say it with fleet.N.name",
            )
        return [
            _narrowed(fleet, name, [each.url for each in servers if name in each.models])
            for name in names
        ]

    def _called(self, server: Server, name: str, remote: RemoteConfig) -> str:
        """What a server calls the model of a named fleet. Raises BadConfig when it does not serve it."""
        told = remote.models.get(server.url)
        if told is None and name not in server.models and len(server.models) == 1:
            told = next(iter(server.models))
        if told is None:
            told = name
        if server.models and told not in server.models:
            raise BadConfig(
                f"the server at {server.url} does not serve {told!r}, but {', '.join(server.models)}",
                hint='say what it calls the model with remote.models = {"URL" = "NAME"}',
            )
        return told

    def ports(self, fleet: FleetConfig) -> list[RemoteReplica]:
        """A replica for each server of an expanded fleet; from here on the servers are watched."""
        remote = fleet.remote
        assert remote is not None
        ports = []
        for number, url in enumerate(remote.urls):
            server = self._servers[url]
            name = f"{fleet.served_name}-{number}"
            endpoint = remote.kv_events.get(url)
            theirs, blocks = remote.models[url], None
            if endpoint is not None:
                adapter = partial(_adapter_of, server, theirs)
                blocks = ToldBlocks(endpoint, self._hash_key, adapter)
            ports.append(RemoteReplica(name, server, theirs, remote, blocks))
            server.start()
        return ports

    def texts(self, config: Config) -> dict[str, TextModel]:
        """The text models by which prompts for foreign servers are compared, by name. Raises BadModel."""
        texts: dict[str, TextModel] = {}
        for fleet in config.fleet:
            if fleet.remote is not None and fleet.remote.tokenizer is not None:
                text = TextModel.load(fleet.remote.tokenizer.expanduser())
                texts.update(dict.fromkeys((fleet.served_name, *fleet.aliases), text))
        return texts

    async def close(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers.values()))


def _adapter_of(server: Server, name: str) -> str | None:
    return name if name in server.adapters else None


def _narrowed(fleet: FleetConfig, name: str, urls: Sequence[str]) -> FleetConfig:
    assert fleet.remote is not None
    events = {url: at for url, at in fleet.remote.kv_events.items() if url in urls}
    models = dict.fromkeys(urls, name)
    remote = replace(fleet.remote, urls=tuple(urls), models=models, kv_events=events)
    return replace(fleet, name=name, remote=remote)


def _refuse_twins(fleets: Sequence[FleetConfig]) -> None:
    taken: set[str] = set()
    for fleet in fleets:
        for name in (fleet.served_name, *fleet.aliases):
            if name in taken:
                raise BadConfig(
                    f"two models would be called {name!r}",
                    hint="name the fleets, or take the servers into one",
                )
            taken.add(name)
