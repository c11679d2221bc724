"""Several fleets behind one door, by the names of their models: the Service that gateways and agents talk to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from penstock.cluster.fleet import Fleet
from penstock.core.errors import UnknownModel
from penstock.core.ports import Call, OnEnded, OnOutput
from penstock.core.types import Report, Request


class Fleets:
    """A core.ports.StartService. `by_name` maps each model name and alias to its fleet; `after` ends what ran them."""

    def __init__(
        self, by_name: Mapping[str, Fleet], after: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._by_name = dict(by_name)
        self._after = after
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
        await asyncio.gather(*(fleet.stop() for fleet in self._fleets))
        if self._after is not None:
            await self._after()
