"""Several replicas on one machine: cores, cards and memory are divided, and a model is packed once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from penstock.engine.folder import model_facts
from penstock.engine.torch import kernels, machine, packed
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.cores import CAN_BIND
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.machine import among, card_of, part_of, threads_of
from penstock.engine.torch.memory import FREE_SHARE
from tests.engine.torch.models import saved

CPU = EngineConfig(device="cpu")


def test_one_replica_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "QUOTAS", ())
    assert among(CPU, count=1, index=0) is CPU


def test_threads_together_are_as_many_as_one_would_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(machine, "QUOTAS", ())
    assert [threads_of(CPU, count) for count in (2, 3, 5, 24)] == [6, 4, 2, 1]
    assert threads_of(EngineConfig(device="cpu", tensor_parallel=2), 3) == 2
    assert threads_of(EngineConfig(device="cpu", threads=9), 3) == 9
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads_of(CPU, 3) is None, "whoever sets it means it for each process"


@pytest.mark.parametrize(
    ("quota", "most", "count", "threads"),
    [
        ("400000 100000", 64, 1, 4),
        ("400000 100000", 64, 2, 2),
        ("250000 100000", 64, 1, 3),
        ("50000 100000", 64, 3, 1),
        ("6400000 100000", 64, 1, None),
        ("max 100000", 64, 1, None),
        ("max 100000", 64, 2, 32),
    ],
)
def test_threads_are_no_more_than_a_container_may_run(
    quota: str,
    most: int,
    count: int,
    threads: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: most)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(machine, "QUOTAS", ((tmp_path / "cpu.max", None),))
    assert among(CPU, count=count, index=0).threads == threads
    first, second = quota.replace("max", "-1").split()
    (tmp_path / "quota").write_text(first)
    (tmp_path / "period").write_text(second)
    monkeypatch.setattr(machine, "QUOTAS", ((tmp_path / "quota", tmp_path / "period"),))
    assert among(CPU, count=count, index=0).threads == threads


def test_free_memory_is_divided_and_said_memory_is_not() -> None:
    found = among(CPU, count=4, index=3)
    assert found.free_share == FREE_SHARE["cpu"] / 4 and found.packs_once
    assert among(EngineConfig(device="cpu", free_share=0.3), count=4, index=0).free_share == 0.3


@pytest.mark.parametrize("num_cores", [1, 2, 7, 16])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_cores_are_parted(num_cores: int, count: int) -> None:
    cores = tuple(range(100, 100 + num_cores))
    parts = [part_of(cores, count, index) for index in range(count)]
    assert all(parts)
    if num_cores >= count:
        assert [core for part in parts for core in part] == list(cores)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    else:
        assert {core for part in parts for core in part} == set(cores)


def _cores_of(index: int) -> list[int]:
    among(EngineConfig(device="cpu", lanes=2), count=2, index=index)
    return sorted(os.sched_getaffinity(0))


@pytest.mark.skipif(
    not CAN_BIND or len(os.sched_getaffinity(0)) < 2, reason="needs two cores and Linux"
)
def test_replicas_with_lanes_are_bound_apart() -> None:
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        first, second = (pool.apply(_cores_of, (index,)) for index in (0, 1))
    assert not set(first) & set(second)
    assert {*first, *second} == os.sched_getaffinity(0)


def test_cards_go_round() -> None:
    cuda = EngineConfig(device="cuda")
    told = [card_of(cuda, count=3, index=index, num_cards=2) for index in range(3)]
    assert told == [("cuda:0", 2), ("cuda:1", 1), ("cuda:0", 2)]
    split = EngineConfig(device="auto", tensor_parallel=2)
    told = [card_of(split, count=2, index=index, num_cards=4) for index in range(2)]
    assert told == [("cuda:0", 1), ("cuda:2", 1)]
    named = EngineConfig(device="cuda:3")
    assert card_of(named, count=2, index=1, num_cards=8) == ("cuda:3", 2)


def _open(folder: str, cache: str, answers: multiprocessing.Queue[str]) -> None:
    torch.set_num_threads(1)
    packed.LEAST_BYTES = 0
    config = EngineConfig(
        device="cpu", dtype="bf16", num_blocks=8, packed_cache=cache, packs_once=True
    )
    built = build_decoder(model_facts(Path(folder)), config, Alone(), None)
    answers.put(built.notes["packed"])


@pytest.mark.skipif(
    not kernels.available() or not kernels.linear.wins_on_this_machine(torch.bfloat16),
    reason="weights are packed by another library here",
)
def test_replicas_that_start_together_pack_once(model_root: Path, tmp_path: Path) -> None:
    """All of them end up with mapped weights, also the one that packed."""
    folder = shutil.copytree(saved(model_root, "qwen3")[0], tmp_path / "model")
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[str] = context.Queue()
    started = [
        context.Process(target=_open, args=(str(folder), str(tmp_path / "cache"), answers))
        for _ in range(3)
    ]
    for each in started:
        each.start()
    notes = sorted(answers.get(timeout=60) for _ in started)
    for each in started:
        each.join()
    assert [note.startswith("mapped") for note in notes] == [True, True, False], notes
    assert "packed at this start, mapped from" in notes[2]
    assert len(list((tmp_path / "cache").glob("*.packed"))) == 1
