"""The adapters that a fleet was told of while it runs, beyond those that its replicas were made with.

All of its replicas know them: those that are there when it is told, and those that come later, before they get a
request (`introduce`). A replica that starts again is told by its link.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import cast

from penstock.core.errors import PenstockError
from penstock.core.ports import AdapterPort, ReplicaPort

_log = logging.getLogger("penstock.cluster")


class ToldAdapters:
    """One fleet's, by key, with their folders."""

    def __init__(self, ports: Mapping[str, ReplicaPort]) -> None:
        self._ports = ports
        self._folders: dict[str, str] = {}

    async def take(self, adapter: str, folder: str) -> None:
        """Tell all replicas of it; if one refuses, none has it. Raises why."""
        self._folders[adapter] = folder
        told = await asyncio.gather(
            *(
                cast(AdapterPort, port).take_adapter(adapter, folder)
                for port in self._ports.values()
            ),
            return_exceptions=True,
        )
        errors = [each for each in told if isinstance(each, BaseException)]
        if errors:
            self.drop(adapter)
            raise errors[0]

    def drop(self, adapter: str) -> None:
        self._folders.pop(adapter, None)
        for port in self._ports.values():
            cast(AdapterPort, port).drop_adapter(adapter)

    async def introduce(self, port: ReplicaPort) -> None:
        """Tell a replica that is about to join; when this returns it knows what the others know."""
        known: set[str] = set()
        newcomer = cast(AdapterPort, port)
        while missing := [each for each in self._folders if each not in known]:
            known.update(missing)
            for adapter in missing:
                folder = self._folders.get(adapter)
                if folder is None:
                    continue  # dropped meanwhile
                try:
                    await newcomer.take_adapter(adapter, folder)
                except PenstockError as error:
                    _log.warning("%s joins without an adapter: %s", port.name, error)
        for adapter in known - self._folders.keys():
            newcomer.drop_adapter(adapter)
