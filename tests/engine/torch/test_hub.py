"""Hub names against a hub on localhost: what is fetched, resuming, offline, and what errors say."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.errors import BadModel
from penstock.engine.folder import model_facts
from penstock.engine.torch.checkpoints.gguf import folder as gguf_folder
from penstock.engine.torch.hub import find_model
from penstock.engine.torch.open import EngineConfig, open_executor
from tests.engine.torch.checkpoints.gguf_files import write_gguf
from tests.engine.torch.driver import GREEDY, Driver
from tests.engine.torch.fake_hub import FakeHub
from tests.engine.torch.models import saved

NAME = "tiny/llama"


@pytest.fixture
def hub(model_root: Path, tmp_path: Path) -> Iterator[FakeHub]:
    whole, _ = saved(model_root, "llama3")
    folder = Path(shutil.copytree(whole, tmp_path / "remote"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not wanted")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted either")
    served = FakeHub(NAME, folder)
    yield served
    served.stop()


async def test_fetch_and_run(
    hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = EngineConfig(
        device="cpu", num_blocks=8, threads=1, endpoint=hub.endpoint, cache_dir=tmp_path / "cache"
    )
    executor = open_executor(NAME, config)
    driver = Driver(executor)
    await driver.finish([driver.job([4, 5, 6], GREEDY)], 2)
    await executor.stop()
    names = {path.name for path in executor.facts.folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert "%" in capfd.readouterr().err  # progress was shown


def test_second_time_and_offline(hub: FakeHub, tmp_path: Path) -> None:
    """What is in the cache is not fetched again, and offline nobody is asked."""
    cache = tmp_path / "cache"
    first = find_model(NAME, endpoint=hub.endpoint, cache_dir=cache)
    hub.asked.clear()
    assert find_model(NAME, endpoint=hub.endpoint, cache_dir=cache) == first
    assert not [asked for asked in hub.asked if asked[0] == "GET" and "/resolve/" in asked[1]]
    hub.asked.clear()
    offline = find_model(NAME, endpoint=hub.endpoint, cache_dir=cache, is_offline=True)
    assert offline == first and not hub.asked


def test_a_cut_download_is_taken_up(hub: FakeHub, tmp_path: Path) -> None:
    """After a broken connection only the rest is asked for, counted in the hub client's pieces of 10 MiB."""
    large = hub.folder / "tokenizer.json"
    large.write_bytes(bytes(range(256)) * (48 << 10))
    hub.cut[large.name] = 11 << 20
    folder = find_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert (folder / large.name).read_bytes() == large.read_bytes()
    ranges = [asked[2] for asked in hub.asked if large.name in asked[1] and asked[2]]
    assert ranges == [f"bytes={10 << 20}-"]


def test_what_errors_say(hub: FakeHub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(BadModel, match="no model other/name"):
        find_model("other/name", endpoint=hub.endpoint, cache_dir=cache)
    with pytest.raises(BadModel, match="offline"):
        find_model(NAME, endpoint=hub.endpoint, cache_dir=cache, is_offline=True)
    with socket.socket() as unheard:  # bound, but nobody listens
        unheard.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with pytest.raises(BadModel, match="cannot be reached"):
            find_model(NAME, endpoint=nowhere, cache_dir=cache)


@pytest.mark.slow
def test_a_file_that_never_comes_whole(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut["config.json"] = 10
    hub.cut_again = True
    with pytest.raises(BadModel, match="could not be fetched"):
        find_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")


def with_ggufs(hub: FakeHub, tmp_path: Path, **files: str) -> None:
    """A repository of GGUF files only, written from the models of those names."""
    for path in hub.folder.iterdir():
        path.unlink()
    for name, family in files.items():
        write_gguf(hub.folder / f"{name}.gguf", saved(tmp_path, family)[1])


def test_a_repository_of_gguf_files(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_folder, "cache_folder", lambda part: tmp_path / "made" / part)
    cache = tmp_path / "cache"
    with_ggufs(hub, tmp_path, tiny_Q8="qwen3")
    place = find_model(NAME, endpoint=hub.endpoint, cache_dir=tmp_path / "first")
    assert model_facts(place).shape.family == "qwen3"
    write_gguf(hub.folder / "other_Q4.gguf", saved(tmp_path, "qwen2")[1])
    with pytest.raises(BadModel, match="several GGUF files"):
        find_model(NAME, endpoint=hub.endpoint, cache_dir=cache)
    for wanted in ("other_Q4.gguf", "q4"):
        hub.asked.clear()
        place = find_model(f"{NAME}:{wanted}", endpoint=hub.endpoint, cache_dir=cache)
        assert model_facts(place).shape.family == "qwen2"
        assert not [path for _, path, _ in hub.asked if "tiny_Q8" in path]
    hub.asked.clear()
    offline = dict(endpoint=hub.endpoint, cache_dir=cache, is_offline=True)
    assert find_model(f"{NAME}:other_Q4.gguf", **offline) == place and not hub.asked  # type: ignore[arg-type]
    with pytest.raises(BadModel, match=r"no GGUF file Q9[^*]*tiny_Q8"):
        find_model(f"{NAME}:Q9", endpoint=hub.endpoint, cache_dir=cache)
    with pytest.raises(BadModel, match="no model folder nowhere.gguf"):
        find_model("nowhere.gguf", endpoint=hub.endpoint, cache_dir=cache)
