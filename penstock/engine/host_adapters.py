"""The adapters that a replica has been told of: who is not among them is refused before it becomes a job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from penstock.core.errors import BadRequest
from penstock.core.types import Request
from penstock.engine.adapter_folder import name_of

Check = Callable[[str, Path], None]


class HostAdapters:
    """`folders` by key. `check` reads one and raises what is wrong with it, in a thread; None: nothing is read."""

    def __init__(
        self,
        *,
        slots: int = 0,
        folders: Mapping[str, Path] | None = None,
        check: Check | None = None,
    ) -> None:
        self._slots, self._check = slots, check
        self.folders = dict(folders or {})

    async def take(self, key: str, folder: Path) -> None:
        """Raises BadModel, BadRequest."""
        if not self._slots:
            raise BadRequest(
                "this model is served without adapters",
                hint="set max_adapters of its fleet, or name one in its adapters",
            )
        if self._check is not None:
            await asyncio.to_thread(self._check, key, folder)
        self.folders[key] = folder

    def refuse_if_unknown(self, request: Request) -> None:
        """Raises BadRequest."""
        if request.adapter is not None and request.adapter not in self.folders:
            raise BadRequest(
                f"there is no adapter {name_of(request.adapter)!r} here",
                hint="it may have been unloaded a moment ago",
                param="model",
            )
