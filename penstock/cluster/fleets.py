"""Several fleets behind one door, by the names of their models: the Service that gateways and agents talk to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from penstock.cluster.fleet import Fleet
from penstock.cluster.rounds import Rounds
from penstock.core.adapters import Adapter
from penstock.core.errors import BadRequest, UnknownModel
from penstock.core.ports import Call, OnEnded, OnOutput
from penstock.core.reshaping import NewShape, Placing
from penstock.core.types import Report, Request
from penstock.engine.adapter_folder import adapter_key


class Fleets:
    """A core.ports.StartService and AdapterService.

    `by_name` maps each model name and alias to its fleet; `adapters` are those its replicas know; `after` ends what ran
    them.
    """

    def __init__(
        self,
        by_name: Mapping[str, Fleet],
        after: Callable[[], Awaitable[None]] | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        rounds: Sequence[Rounds] = (),
    ) -> None:
        self._by_name = dict(by_name)
        self._adapters = dict(adapters or {})
        self._coming: set[str] = set()
        self._after = after
        self._rounds = rounds
        self._fleets = list(dict.fromkeys(self._by_name.values()))

    def models(self) -> Sequence[str]:
        return list(self._by_name)

    def fleet(self, model: str) -> Fleet:
        """Raises UnknownModel with the names that are served."""
        found = self._by_name.get(model)
        if found is None:
            raise UnknownModel(
                f"no model is named {model!r}",
                hint=f"models served here: {', '.join(self._by_name)}",
                param="model",
            )
        return found

    def adapters(self) -> Mapping[str, Adapter]:
        return self._adapters

    async def load_adapter(
        self, name: str, folder: str, *, model: str | None = None, replaces: bool = False
    ) -> None:
        """See core.ports.AdapterService. `model` None: the only one there is."""
        if not name or "@" in name:
            raise BadRequest(f"{name!r} cannot name an adapter", param="lora_name")
        before = self._adapters.get(name)
        is_taken = name in self._by_name or name in self._coming
        if is_taken or (before is not None and not replaces):
            raise BadRequest(
                f"there is something called {name!r} already",
                hint="unload it first, or choose another name",
                param="lora_name",
            )
        if model is None and len(self._fleets) > 1:
            raise BadRequest("say which model the adapter belongs to", param="base_model_name")
        fleet = self._fleets[0] if model is None else self.fleet(model)
        self._coming.add(name)
        try:
            key = await asyncio.to_thread(adapter_key, name, Path(folder))
            if before is None or before.key != key:
                await fleet.adapters.take(key, folder)
        finally:
            self._coming.discard(name)
        self._adapters[name] = Adapter(name, fleet.name, key, folder)
        if before is not None and before.key != key:
            self.fleet(before.model).adapters.drop(before.key)

    def unload_adapter(self, name: str) -> None:
        found = self._adapters.pop(name, None)
        if found is None:
            raise UnknownModel(f"no adapter is named {name!r}", param="lora_name")
        self.fleet(found.model).adapters.drop(found.key)

    async def reshape(
        self,
        model: str,
        devices: int,
        *,
        replica: str | None = None,
        placing: Placing = "elastic-moe",
    ) -> Mapping[str, NewShape]:
        """By replica; `replica` None: all of the model's, one after the other. Raises PenstockError."""
        fleet = self.fleet(model)
        names = [replica] if replica is not None else [each.replica for each in fleet.reports()]
        return {name: await fleet.reshape(name, devices, placing) for name in names}

    async def submit(self, request: Request, on_output: OnOutput | None = None) -> None:
        await self.fleet(request.model).submit(request, on_output)

    def start(self, request: Request, on_ended: OnEnded, on_output: OnOutput | None = None) -> Call:
        return self.fleet(request.model).start(request, on_ended, on_output)

    def reports(self) -> Sequence[Report]:
        return [report for fleet in self._fleets for report in fleet.reports()]

    @property
    def num_outstanding(self) -> int:
        return sum(fleet.num_outstanding for fleet in self._fleets)

    async def drain(self) -> None:
        await asyncio.gather(*(fleet.drain() for fleet in self._fleets))

    async def stop(self) -> None:
        """End all replicas now, and what ran them."""
        await asyncio.gather(*(each.stop() for each in self._rounds))
        await asyncio.gather(*(fleet.stop() for fleet in self._fleets))
        if self._after is not None:
            await self._after()
