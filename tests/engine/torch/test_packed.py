"""Packed models in files: what is recalled computes the same; what is broken, foreign or too large is not used."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from penstock.engine.folder import model_facts
from penstock.engine.torch import kernels, packed
from penstock.engine.torch.build import Built, EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.packed import PackedStore
from penstock.engine.torch.packed_file import (
    ALIGNMENT,
    PIECE_BYTES,
    Pieces,
    Unkept,
    _Unpickler,
    put_together,
    take_apart,
)
from tests.engine.torch.models import saved
from tests.engine.torch.test_recorded import STEPS, ended

pytestmark = pytest.mark.skipif(
    not kernels.available() or not kernels.linear.wins_on_this_machine(torch.bfloat16),
    reason="weights are packed by another library here",
)


@pytest.fixture(autouse=True)
def small_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)


@pytest.fixture
def folder(model_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved(model_root, "qwen3")[0], tmp_path / "model"))


def opened(folder: Path, cache: Path | str, **more: object) -> Built:
    config = EngineConfig(
        device="cpu",
        dtype="bf16",
        num_blocks=48,
        packed_cache=str(cache),
        **more,  # type: ignore[arg-type]
    )
    built = build_decoder(model_facts(folder), config, Alone(), None)
    for thread in threading.enumerate():
        if thread.name == "penstock-packed":
            thread.join()
    return built


def is_mapped(built: Built) -> bool:
    return built.notes["packed"].startswith("mapped")


def states(built: Built) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([ended(built.decoder.forward(step))[0] for step in STEPS])


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3-moe", "deepseek-lite", "phi"])
def test_what_is_recalled_computes_the_same(model_root: Path, tmp_path: Path, name: str) -> None:
    folder, _ = saved(model_root, name)
    first, second = opened(folder, tmp_path), opened(folder, tmp_path)
    assert not is_mapped(first)
    assert is_mapped(second)
    assert states(first).equal(states(second))


def test_layouts_of_other_libraries_are_not_kept(folder: Path, tmp_path: Path) -> None:
    opened(folder, tmp_path / "cache", linear="plain")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    config = EngineConfig(device="cpu", dtype="fp32", num_blocks=8, packed_cache=str(tmp_path))
    built = build_decoder(model_facts(folder), config, Alone(), None)
    assert built.notes["packed"] == "packed at this start"


def test_another_checkpoint_type_or_shard_is_another_file(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    opened(folder, cache)
    assert is_mapped(opened(folder, cache))
    weights = folder / "model.safetensors"
    told = weights.stat()
    os.utime(weights, ns=(told.st_atime_ns, told.st_mtime_ns + 1))
    assert not is_mapped(opened(folder, cache))
    store = PackedStore(cache, 1 << 30)
    names = {store.place(folder, part) for part in ((1,), (2,), (1, 2))}
    assert len(names) == 3
    assert PackedStore(None, 1).place(folder, ()) is None
    assert opened(folder, "off").notes["packed"] == "packed at this start"


@pytest.mark.parametrize("fault", ["cut", "longer", "head", "start", "empty"])
def test_a_broken_file_is_made_anew(folder: Path, tmp_path: Path, fault: str) -> None:
    cache = tmp_path / "cache"
    want = states(opened(folder, cache))
    (file,) = cache.glob("*.packed")
    whole = file.read_bytes()
    middle = 200  # in the table of tensors
    broken = {
        "cut": whole[:-100],
        "longer": whole + b"x",
        "head": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "start": b"x" + whole[1:],
        "empty": b"",
    }[fault]
    file.write_bytes(broken)
    again = opened(folder, cache)
    assert not is_mapped(again) and states(again).equal(want)
    assert file.read_bytes() == whole
    assert is_mapped(opened(folder, cache))


def test_a_full_disk_is_said_and_harms_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "fsync", full)
        states(opened(folder, tmp_path / "cache"))
    assert "cannot be kept" in caplog.text and "No space left" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []
    caplog.clear()
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        states(opened(folder, tmp_path / "file" / "cache"))  # a folder that cannot be made
    assert "cannot be kept" in caplog.text


def test_what_was_not_used_for_longest_makes_room(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    opened(folder, cache)
    (file,) = cache.glob("*.packed")
    size = file.stat().st_size
    for age, name in ((10, "old"), (1000, "older"), (5, "young")):
        (cache / f"{name}.packed").write_bytes(bytes(size))
        told = file.stat().st_mtime - age
        os.utime(cache / f"{name}.packed", (told, told))
    stale = cache / "gone.packed.1.half"
    stale.touch()
    os.utime(stale, (0, 0))
    file.unlink()
    opened(folder, cache, packed_limit=2 * size + 100)
    assert {one.name for one in cache.iterdir()} == {file.name, "young.packed"}
    assert is_mapped(opened(folder, cache))


def test_two_starts_at_once_leave_one_whole_file(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    built: list[Built] = []
    starts = [
        threading.Thread(target=lambda: built.append(opened(folder, cache))) for _ in range(2)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len(list(cache.iterdir())) == 1
    assert is_mapped(opened(folder, cache))
    assert states(built[0]).equal(states(built[1]))


class Outsider:
    """Of a module that files must not name."""


def test_only_this_package_is_made_from_files(tmp_path: Path) -> None:
    with pytest.raises(Unkept, match="test_packed"):
        take_apart({"what": Outsider()}, None)
    with pytest.raises(Unkept, match="system"):
        take_apart({"what": os.system}, None)
    for module, name in (
        ("penstock.engine.torch.packed", "os.system"),
        ("penstock.engine.torch.packed", "cache"),
    ):
        with pytest.raises(Unkept, match="names"):
            _Unpickler(io.BytesIO(f"c{module}\n{name}\n.".encode()), [], None).load()
    head, tensors = take_apart({"a": torch.arange(3), "b": torch.ones(0)}, None)
    assert len(tensors) == 2
    (tmp_path / "x").write_bytes(head)
    with pytest.raises(Unkept, match="bytes of"):
        put_together(tmp_path / "x", None)


def test_files_are_written_in_pieces_that_fit_large_pages() -> None:
    written: list[bytes] = []

    class Kept:
        def write(self, data: memoryview) -> None:
            written.append(bytes(data))

    pieces, parts = Pieces(Kept()), [b"head", bytes(3 * PIECE_BYTES), b"", b"x" * PIECE_BYTES]
    for part in parts:
        pieces.align()
        pieces.write(part)
    pieces.end()
    whole = b"head".ljust(ALIGNMENT, b"\0") + parts[1] + parts[3]
    assert b"".join(written) == whole
    assert [len(one) for one in written] == [PIECE_BYTES] * 4 + [len(whole) % PIECE_BYTES]
