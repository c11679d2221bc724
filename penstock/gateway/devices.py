"""The call that gives replicas more or fewer devices for the experts of their model.

It exists only where the operator switched it on (`runtime_devices`). It answers when the replicas serve so, or with why
one does not; what it changed before that stays changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, cast

import msgspec

from penstock.core.ports import Service
from penstock.core.reshaping import NewShape, Placing
from penstock.gateway.bodies import decode
from penstock.gateway.errors import NoSuchPath

RESHAPE = "/v1/internal/reshape"


class ReshapeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`replica` None: all of the model's. `placing`: "eplb" gives experts that are asked for often copies."""

    model: str
    devices: int
    replica: str | None = None
    placing: Literal["elastic-moe", "eplb"] = "elastic-moe"


class ReshapingService(Protocol):
    async def reshape(
        self, model: str, devices: int, *, replica: str | None, placing: Placing
    ) -> Mapping[str, NewShape]: ...


async def reshape(service: Service, raw: bytes, *, may_change: bool) -> Mapping[str, NewShape]:
    """By replica. Raises PenstockError."""
    if not may_change:
        raise NoSuchPath(
            "devices cannot be changed while this server runs",
            hint="the operator may allow it: gateway.runtime_devices = true",
        )
    if not hasattr(service, "reshape"):
        raise NoSuchPath("this service has no devices")
    body = decode(ReshapeBody, raw)
    able = cast(ReshapingService, service)
    return await able.reshape(body.model, body.devices, replica=body.replica, placing=body.placing)
