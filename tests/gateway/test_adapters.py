"""Adapters by HTTP: names of models, the field beside one, and the calls that load and unload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.core.adapters import Adapter, AdapterReport
from penstock.core.errors import BadModel, UnknownModel
from penstock.core.types import Report
from tests.gateway.conftest import Start
from tests.gateway.scripted import Scripted

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
HELLO = {"prompt": "Hi", "max_tokens": 2}


@dataclass
class Adapting(Scripted):
    """One adapter from the start; folders named "bad" cannot be loaded."""

    known: dict[str, Adapter] = field(
        default_factory=lambda: {"sql": Adapter("sql", "tiny", "sql@1", "/a/sql")}
    )

    def adapters(self) -> Mapping[str, Adapter]:
        return self.known

    async def load_adapter(
        self, name: str, folder: str, *, model: str | None = None, replaces: bool = False
    ) -> None:
        if Path(folder).name == "bad":
            raise BadModel(f"{folder}: use_dora = True is not supported", hint="merge it")
        self.known[name] = Adapter(name, model or "tiny", f"{name}@{len(self.known)}", folder)

    def unload_adapter(self, name: str) -> None:
        if self.known.pop(name, None) is None:
            raise UnknownModel(f"no adapter is named {name!r}", param="lora_name")

    def reports(self) -> list[Report]:
        return [Report(replica="r", at=0.0, adapters=AdapterReport(("sql@1",), 5, 4))]


@pytest.fixture
def service(answer_ids: list[int]) -> Adapting:
    return Adapting(lambda request, answer: answer_ids, names=("tiny", "other"))


def test_an_adapter_is_a_model_with_a_parent(service: Adapting, start: Start) -> None:
    url = start(service)
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [
        ("tiny", None),
        ("other", None),
        ("sql", "tiny"),
    ]
    assert httpx.get(f"{url}/v1/models/sql").json()["max_model_len"] == 512


@pytest.mark.parametrize(
    ("path", "more"),
    [(COMPLETION, HELLO), (CHAT, {"messages": [{"role": "user", "content": "Hi"}]})],
)
def test_asked_for_by_either_name(
    service: Adapting, start: Start, path: str, more: dict[str, Any]
) -> None:
    url = start(service)
    told = httpx.post(f"{url}{path}", json={"model": "sql", **more})
    assert told.status_code == 200 and told.json()["model"] == "sql"
    httpx.post(f"{url}{path}", json={"model": "tiny", "adapter": "sql", **more})
    httpx.post(f"{url}{path}", json={"model": "tiny", **more})
    with_it, beside, without = service.requests
    for request in (with_it, beside):
        assert (request.model, request.adapter) == ("tiny", "sql@1")
        assert request.prompt.blocks(1) == with_it.prompt.blocks(1)
    assert without.adapter is None
    assert set(without.prompt.blocks(1)).isdisjoint(with_it.prompt.blocks(1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "tiny", "adapter": "nobody"}, "there is no adapter 'nobody' (served: sql)"),
        ({"model": "other", "adapter": "sql"}, "belongs to model 'tiny', not to 'other'"),
    ],
)
def test_an_adapter_that_does_not_fit(
    service: Adapting, start: Start, fields: dict[str, str], said: str
) -> None:
    told = httpx.post(f"{start(service)}{COMPLETION}", json={**fields, **HELLO})
    error = told.json()["error"]
    assert told.status_code == 400 and said in error["message"] and error["param"] == "adapter"


def test_loaded_and_unloaded_live(service: Adapting, start: Start, tmp_path: Path) -> None:
    url = start(service, runtime_adapters=True)

    def ask(model: str) -> int:
        return httpx.post(f"{url}{COMPLETION}", json={"model": model, **HELLO}).status_code

    assert ask("fresh") == 404
    body = {"lora_name": "fresh", "lora_path": str(tmp_path), "base_model_name": "other"}
    assert httpx.post(url + LOAD, json=body).status_code == 200
    assert ask("fresh") == 200 and service.requests[-1].model == "other"
    assert httpx.post(url + UNLOAD, json={"lora_name": "fresh"}).status_code == 200
    assert ask("fresh") == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (LOAD, {"lora_name": "x"}, 400, "lora_path"),
        (LOAD, {"lora_path": "/"}, 400, "lora_name"),
        (LOAD, {"lora_name": "x", "lora_path": "/no/such/folder"}, 404, "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "BAD"}, 400, "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "/", "rank": 3}, 400, "rank"),
        (UNLOAD, {"lora_name": "nobody"}, 404, "lora_name"),
        (UNLOAD, {}, 400, "lora_name"),
    ],
)
def test_calls_that_cannot_be_followed(
    service: Adapting, start: Start, tmp_path: Path, path: str, body: dict[str, Any], status: int, param: str
) -> None:  # fmt: skip
    (tmp_path / "bad").mkdir()
    if body.get("lora_path") == "BAD":
        body = {**body, "lora_path": str(tmp_path / "bad")}
    told = httpx.post(start(service, runtime_adapters=True) + path, json=body)
    assert (told.status_code, told.json()["error"]["param"]) == (status, param)


def test_the_calls_are_off_unless_switched_on_and_want_a_key(
    service: Adapting, start: Start, tmp_path: Path
) -> None:
    body = {"lora_name": "x", "lora_path": str(tmp_path)}
    told = httpx.post(start(service) + LOAD, json=body)
    assert told.status_code == 404 and "runtime_adapters" in told.json()["error"]["message"]
    url = start(service, runtime_adapters=True, api_keys={"s3cret": "me"})
    assert httpx.post(url + LOAD, json=body).status_code == 401
    key = {"authorization": "Bearer s3cret"}
    assert httpx.post(url + LOAD, json=body, headers=key).status_code == 200


def test_metrics(service: Adapting, start: Start) -> None:
    said = httpx.get(f"{start(service)}/metrics").text
    for name, value in (("s_resident", 1), ("_loads_total", 5), ("_evictions_total", 4)):
        assert f'penstock:lora_adapter{name}{{engine="r"}} {value}.0' in said
