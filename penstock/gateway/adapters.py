"""Adapters as callers see them: models of their own name, and two calls that load and unload them.

An adapter is asked for as `model`, or as `adapter` beside the model that it belongs to. The calls have vLLM's paths
and fields; they exist only where the operator switched them on (`runtime_adapters`), as whoever may call them decides
which folders of this machine are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import msgspec

from penstock.core.adapters import Adapter
from penstock.core.errors import BadModel, BadRequest, UnknownModel
from penstock.core.ports import AdapterService, Service
from penstock.gateway.bodies import SharedBody, decode
from penstock.gateway.errors import NoSuchPath, Unsupported

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class LoadBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`base_model_name` is needed where several models are served. `load_inplace`: in place of one of that name."""

    lora_name: str
    lora_path: str
    base_model_name: str | None = None
    load_inplace: bool = False


class UnloadBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    lora_name: str
    lora_int_id: int | None = None  # vLLM's number of it, which says nothing here


class Adapters:
    """Of one service; of one that knows no adapters there are none."""

    def __init__(self, service: Service, *, may_change: bool) -> None:
        self._service = cast(AdapterService, service) if hasattr(service, "adapters") else None
        self._may_change = may_change

    def all(self) -> Mapping[str, Adapter]:
        return {} if self._service is None else self._service.adapters()

    def named(self, name: str | None) -> Adapter | None:
        return None if name is None else self.all().get(name)

    def split(self, name: str) -> tuple[str, str | None]:
        """The model that a name stands for, and what requests call the adapter, if it is one's."""
        found = self.named(name)
        return (name, None) if found is None else (found.model, found.key)

    def asked(self, body: SharedBody) -> Adapter | None:
        """The adapter that a body asks for, its model having been found. Raises Unsupported, BadRequest."""
        as_model = self.named(body.model)
        if body.adapter is None:
            return as_model
        found = self.named(body.adapter)
        if found is None:
            served = ", ".join(self.all())
            raise Unsupported(
                f"no adapters are served here, so {body.adapter!r} cannot be used"
                if not served
                else f"there is no adapter {body.adapter!r}",
                hint=f"served: {served}" if served else "leave the field out",
                param="adapter",
            )
        is_other = as_model is not None and as_model is not found
        if is_other or not self._belongs(found, body.model):
            raise BadRequest(
                f"adapter {found.name!r} belongs to model {found.model!r}, not to {body.model!r}",
                param="adapter",
            )
        return found

    def _belongs(self, adapter: Adapter, model: str | None) -> bool:
        """An alias names the same fleet."""
        if model in (adapter.name, adapter.model):
            return True
        fleet_of = getattr(self._service, "fleet", None)
        return fleet_of is not None and fleet_of(model) is fleet_of(adapter.model)

    async def load(self, raw: bytes) -> str:
        """What to tell. Raises BadRequest, UnknownModel, NoSuchPath."""
        service = self._changing()
        body = decode(LoadBody, raw)
        if not Path(body.lora_path).expanduser().is_dir():
            raise UnknownModel(
                f"there is no adapter folder {body.lora_path!r} on this machine", param="lora_path"
            )
        try:
            await service.load_adapter(
                body.lora_name,
                str(Path(body.lora_path).expanduser().resolve()),
                model=body.base_model_name,
                replaces=body.load_inplace,
            )
        except BadModel as error:
            raise BadRequest(error.message, hint=error.hint, param="lora_path") from None
        return f"adapter {body.lora_name!r} is loaded"

    async def unload(self, raw: bytes) -> str:
        service = self._changing()
        body = decode(UnloadBody, raw)
        service.unload_adapter(body.lora_name)
        return f"adapter {body.lora_name!r} is unloaded; what runs with it ends"

    def _changing(self) -> AdapterService:
        if not self._may_change:
            raise NoSuchPath(
                "adapters cannot be changed while this server runs",
                hint="the operator may allow it: gateway.runtime_adapters = true",
            )
        if self._service is None:
            raise NoSuchPath("this service has no adapters")
        return self._service
