"""The adapters that a replica has been told of: who is not among them is refused before it becomes a job."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Protocol

from penstock.core.errors import BadRequest, PenstockError
from penstock.core.types import Request
from penstock.engine.adapter_folder import name_of


class Reader(Protocol):
    """An executor's side of it."""

    def know(self, key: str, folder: Path) -> None:
        """Where an adapter is, from now on; before anything was read."""
        ...

    def check(self, key: str) -> None:
        """Read all of it, which takes a while. Raises BadModel."""
        ...


class HostAdapters:
    """`folders` by key. `reader` None: nothing is read."""

    def __init__(
        self,
        *,
        slots: int = 0,
        folders: Mapping[str, Path] | None = None,
        reader: Reader | None = None,
    ) -> None:
        self._slots, self._reader = slots, reader
        self.folders = dict(folders or {})

    def take(self, key: str, folder: Path) -> Coroutine[None, None, None]:
        """From this call on requests for it are taken, as a replica that was started again knows it from before.

        What it returns reads the adapter, when awaited. That raises BadModel, BadRequest.
        """
        if self._slots:
            self.folders[key] = folder
            if self._reader is not None:
                self._reader.know(key, folder)
        return self._read(key)

    async def _read(self, key: str) -> None:
        if not self._slots:
            raise BadRequest(
                "this model is served without adapters",
                hint="set max_adapters of its fleet, or name one in its adapters",
            )
        if self._reader is None:
            return
        try:
            await asyncio.to_thread(self._reader.check, key)
        except PenstockError:
            self.folders.pop(key, None)
            raise

    def refuse_if_unknown(self, request: Request) -> None:
        """Raises BadRequest."""
        if request.adapter is not None and request.adapter not in self.folders:
            raise BadRequest(
                f"there is no adapter {name_of(request.adapter)!r} here",
                hint="it may have been unloaded a moment ago",
                param="model",
            )
