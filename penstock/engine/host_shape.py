"""A replica's answer to whoever wants it to have more or fewer devices."""

from __future__ import annotations

from collections.abc import Callable

from penstock.core.errors import BadRequest, PenstockError
from penstock.core.messages import Reshape, ReshapeDone
from penstock.core.reshaping import Reshaper

SMALL_BYTES = 256


class HostShape:
    """`reshaper` None: the replica's experts are not spread over devices."""

    def __init__(self, reshaper: Reshaper | None, put: Callable[[object, int], None]) -> None:
        self._reshaper, self._put = reshaper, put

    async def reshape(self, told: Reshape) -> None:
        try:
            if self._reshaper is None:
                raise BadRequest(
                    "the experts of this replica are not spread over devices",
                    hint="set executor.expert_devices of its fleet",
                )
            answer = ReshapeDone(await self._reshaper.reshape(told.devices, told.placing))
        except PenstockError as error:
            answer = ReshapeDone(None, type(error).__name__, error.message, error.hint)
        self._put(answer, SMALL_BYTES)
