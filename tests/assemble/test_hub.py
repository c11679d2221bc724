"""The `[hub]` table decides where models with a Hub's name come from: against a hub on localhost."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.assemble import load_config
from penstock.core.errors import BadModel

pytest.importorskip("huggingface_hub", reason="the extra `engine` is not installed")

from penstock.assemble.serving import localise  # noqa: E402
from tests.engine.torch.fake_hub import FakeHub  # noqa: E402

NAME = "tiny/llama"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    served = FakeHub(NAME, folder)
    yield served
    served.stop()


def test_endpoint_cache_and_offline_are_the_configurations(hub: FakeHub, tmp_path: Path) -> None:
    sets = [f"hub.endpoint={hub.endpoint}", f"hub.cache_dir={tmp_path / 'cache'}"]
    config = localise(load_config(model=NAME, sets=sets))
    (fleet,) = config.fleet
    folder = Path(fleet.model)
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert fleet.served_name == NAME

    hub.asked.clear()
    again = localise(load_config(model=NAME, sets=[*sets, "hub.offline=true"]))
    assert again.fleet[0].model == fleet.model and not hub.asked
    with pytest.raises(BadModel, match="offline mode"):
        localise(load_config(model="tiny/other", sets=[*sets, "hub.offline=true"]))


def test_a_hub_that_is_not_there_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    sets = [f"hub.endpoint=http://127.0.0.1:{port}", f"hub.cache_dir={tmp_path}"]
    with pytest.raises(BadModel, match=NAME):
        localise(load_config(model=NAME, sets=sets))
