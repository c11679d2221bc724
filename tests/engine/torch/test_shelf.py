"""Cached blocks on disk: the same bytes come back, or nothing does; the real engine's words with tiers behind it."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import BadConfig
from penstock.core.events import FiledAway, Finished, Transferred
from penstock.core.plans import Filing
from penstock.core.prompt import TokenPrompt
from penstock.core.types import BlockHash, Output, Request, RequestId, Sampling
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.tier_config import TiersConfig
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.torch.shelf import GROWTH, HEAD, PAGE, Shelf
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from tests.engine.torch.models import saved
from tests.engine.torch.served import NoPredictions, Served

BLOCK = 16
Told = list[tuple[int, tuple[int, ...], str | None]]


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


class Disk:
    """A shelf of `num_slots` behind eight blocks of three pieces."""

    def __init__(self, path: Path, *, num_slots: int = 100, identity: str = "a") -> None:
        self.region = np.random.default_rng(0).integers(0, 255, (3, 8, 400), np.uint8)
        self.told: Told = []
        self.shelf = Shelf(
            path,
            self.region,
            num_slots=num_slots,
            identity=identity,
            tell=lambda *told: self.told.append(told),
        )

    def file(self, pairs: list[tuple[int, int]], names: list[BlockHash], *, is_out: bool) -> None:
        number = len(self.told)
        self.shelf.begin(Filing(number, is_out, tuple(pairs), tuple(names)))
        end = time.monotonic() + 5
        while len(self.told) == number and time.monotonic() < end:
            time.sleep(1e-3)
        assert self.told[-1][0] == number


def test_what_was_written_is_read_and_what_was_spoilt_is_not(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "deep" / "x.kv")
    before, names = disk.region.copy(), [name(each) for each in range(8)]
    disk.file([(each, 3 * each) for each in range(8)], names, is_out=True)
    disk.region[:] = 0
    disk.file([(7 - each, 3 * each) for each in range(8)], names, is_out=False)
    assert disk.told == [(0, (), None), (1, (), None)]
    assert np.array_equal(disk.region[:, ::-1], before)

    with disk.shelf.path.open("r+b") as file:
        stride = disk.shelf._stride
        for slot, at in ((0, HEAD.size + 700), (3, 9), (6, 20)):  # contents, the name, the stamp
            file.seek(PAGE + slot * stride + at)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    disk.file([(each, 3 * each) for each in range(8)], names, is_out=False)
    assert disk.told[-1] == (2, (0, 1, 2), None)
    disk.file([(0, 21), (1, 18)], [name(6), name(6)], is_out=False)  # slot 21 is another's
    assert disk.told[-1] == (3, (0,), None)
    disk.shelf.close()


def test_the_next_process_finds_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.kv"
    disk = Disk(path)
    disk.file([(each, each) for each in range(5)], [name(each) for each in range(5)], is_out=True)
    disk.file([(0, 2)], [name(9)], is_out=True)  # in another's place
    kept = disk.region.copy()
    with pytest.raises(BadConfig, match="another engine's"):
        Disk(path)
    disk.shelf.close()

    again = Disk(path)
    assert again.shelf.found == [
        (name(0), 0),
        (name(1), 1),
        (name(3), 3),
        (name(4), 4),
        (name(9), 2),
    ]
    again.region[:] = 0
    again.file([(4, 4)], [name(4)], is_out=False)
    assert again.told[-1][1] == () and np.array_equal(again.region[:, 4], kept[:, 4])
    again.shelf.close()
    other = Disk(path, identity="other weights")
    assert other.shelf.found == []
    other.shelf.close()


def test_a_file_that_may_hold_less_than_before_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.kv"
    disk = Disk(path)
    disk.file([(0, 1), (1, 3)], [name(0), name(1)], is_out=True)
    assert path.stat().st_size > PAGE + 2 * disk.shelf._stride
    disk.shelf.close()
    again = Disk(path, num_slots=2)
    assert path.stat().st_size == PAGE + 2 * again.shelf._stride
    assert again.shelf.found == [(name(0), 1)]
    again.shelf.close()


def test_a_full_disk_is_written_to_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path / "x.kv", num_slots=GROWTH + 8)
    disk.file([(0, 0)], [name(0)], is_out=True)

    def full(file: int, at: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    disk.file([(1, 1), (2, GROWTH), (3, 3)], [name(1), name(2), name(3)], is_out=True)
    assert disk.told[-1][1] == (1, 2) and "No space left" in str(disk.told[-1][2])
    disk.file([(5, 1), (6, 0)], [name(1), name(0)], is_out=False)
    assert disk.told[-1][1] == ()
    disk.shelf.close()


def test_a_file_that_rots_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk(tmp_path / "x.kv")
    names = [name(each) for each in range(8)]
    disk.file([(each, each) for each in range(8)], names, is_out=True)
    os.truncate(disk.shelf.path, PAGE + disk.shelf._stride)
    for _ in range(2):
        disk.file([(each, each) for each in range(8)], names, is_out=False)
        assert disk.told[-1][1:] == (tuple(range(1, 8)), None)
    (told,) = [each.getMessage() for each in caplog.records]
    assert "does not hold what was written there (slot 1)" in told
    disk.file([(1, 1)], names[1:2], is_out=True)
    disk.file([(2, 1)], names[1:2], is_out=False)
    assert disk.told[-1][1:] == ((), None), "it can be written to again"
    disk.shelf.close()


def test_whatever_goes_wrong_is_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody waits for every filing."""
    disk = Disk(tmp_path / "x.kv")
    disk.file([(0, 0), (1, 1)], [name(0), name(1)], is_out=True)
    disk.shelf._region = None  # type: ignore[assignment]
    disk.file([(0, 0), (1, 1)], [name(0), name(1)], is_out=False)
    number, bad, error = disk.told[-1]
    assert (number, bad) == (1, (0, 1)) and "AttributeError" in str(error)
    assert "no more cached blocks" in caplog.text
    disk.shelf.close()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="cannot be opened"):
        Disk(tmp_path / "file" / "x.kv")


# ------------------------------------------------------------------ the engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("shelves"), "llama3")[0]


PROMPTS = [[5 + (group * 37 + at) % 390 for at in range(70)] for group in (0, 1, 2, 3, 0, 4, 1, 0)]


async def written(folder: Path, num_blocks: int, tiers: TiersConfig, kv: str = "auto") -> Served:
    config = EngineConfig(
        device="cpu",
        threads=1,
        num_blocks=num_blocks,
        block_size=BLOCK,
        tiers=tiers,
        kv=kv,  # type: ignore[arg-type]
        name="org/model-0",
    )
    executor = open_executor(str(folder), config)
    served = Served([[] for _ in PROMPTS])

    def hear(items: tuple[tuple[str, Output], ...]) -> None:
        for name, output in items:
            served.outputs[int(name)].append(output)

    replica = Replica(
        ReplicaConfig(num_blocks=num_blocks, block_size=BLOCK, is_checked=True),
        executor,
        ReplicaPolicies(
            order=find("order", "fcfs")(),
            admit=find("admit", "full-fit")(),
            batch=find("batch", "vllm-v1")(max_tokens=64),
            evict=find("evict", "recompute-last")(),
            blocks=find("evict", "lru")(),
            fetch=find("fetch", "always")(),
        ),
        Predictors(cost=NoPredictions(), lengths=NoPredictions()),
        log=served,
        on_outputs=hear,
    )
    running = asyncio.get_running_loop().create_task(replica.run())
    for at, ids in enumerate(PROMPTS):
        replica.submit(
            Request(
                id=RequestId(f"{at}"),
                model="m",
                prompt=TokenPrompt([*ids, 7 + at]),
                sampling=Sampling(temperature=0.0, max_tokens=6, ignore_eos=True),
            )
        )
        while not replica.is_idle:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)  # what is written behind
    await replica.drain()
    await replica.stop()
    await running
    return served


def block_bytes(folder: Path, kv: str) -> int:
    config = EngineConfig(device="cpu", threads=1, num_blocks=4, block_size=BLOCK, kv=kv)  # type: ignore[arg-type]
    executor = open_executor(str(folder), config)
    asyncio.run(executor.stop())
    return executor.kv_bytes // 4


def cached(served: Served) -> list[int]:
    return [event.num_cached for event in served.events if isinstance(event, Finished)]


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_the_text_is_the_same_with_tiers(folder: Path, tmp_path: Path, kv: str) -> None:
    plain = asyncio.run(written(folder, 200, TiersConfig(), kv))
    short = asyncio.run(written(folder, 8, TiersConfig(host_bytes=1 << 20), kv))
    small = TiersConfig(host_bytes=8 * block_bytes(folder, kv), disk_bytes=1 << 22, dir=tmp_path)
    filed = asyncio.run(written(folder, 8, small, kv))
    again = asyncio.run(written(folder, 8, small, kv))
    for at in range(len(PROMPTS)):
        assert plain.ids(at) == short.ids(at) == filed.ids(at) == again.ids(at)
    (path,) = tmp_path.iterdir()
    assert path.name == "org%2Fmodel-0.kv" and path.stat().st_size <= PAGE + (1 << 22)
    assert cached(plain) == [0, 0, 0, 0, 64, 0, 64, 64]
    assert cached(short) == cached(plain)
    assert any(isinstance(event, Transferred) and not event.is_out for event in short.events)
    assert any(isinstance(event, FiledAway) for event in filed.events)
    assert sum(cached(again)) > sum(cached(filed)), "nothing was found that the first run left"
