"""Jobs that are moved to host memory and back on the real engine write the same text; the same bytes come back."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.events import Stepped, Transferred
from penstock.core.plans import Transfer
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.swap import SwapConfig, joined
from penstock.engine.torch.mover import Mover
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from tests.engine.torch.models import saved
from tests.engine.torch.served import NoPredictions, Served

BLOCK = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("movers"), "llama3")[0]


async def written(
    folder: Path, num_blocks: int, swap: SwapConfig, attention: str, kv: str
) -> Served:
    config = EngineConfig(
        device="cpu",
        threads=1,
        num_blocks=num_blocks,
        block_size=BLOCK,
        host_blocks=swap.host_blocks,
        attention=attention,  # type: ignore[arg-type]
        kv=kv,  # type: ignore[arg-type]
    )
    executor = open_executor(str(folder), config)
    served = Served([[] for _ in range(10)])

    def hear(items: tuple[tuple[str, Output], ...]) -> None:
        for name, output in items:
            served.outputs[int(name)].append(output)

    replica = Replica(
        ReplicaConfig(num_blocks=num_blocks, block_size=BLOCK, is_checked=True, swap=swap),
        executor,
        ReplicaPolicies(
            order=find("order", "drawn-priority")(every_steps=3),
            admit=find("admit", "full-fit")(),
            batch=find("batch", "resident")(max_tokens=48),
            evict=find("evict", "fastswitch")(every_steps=3),
            blocks=find("evict", "lru")(),
        ),
        Predictors(cost=NoPredictions(), lengths=NoPredictions()),
        log=served,
        on_outputs=hear,
    )
    running = asyncio.get_running_loop().create_task(replica.run())
    chance = random.Random(3)
    for at in range(10):
        ids = [chance.randrange(5, 400) for _ in range(chance.randrange(10, 50))]
        replica.submit(
            Request(
                id=RequestId(f"{at}"),
                model="m",
                prompt=TokenPrompt(ids),
                sampling=Sampling(temperature=0.0, max_tokens=24, ignore_eos=True),
            )
        )
    await replica.drain()
    await replica.stop()
    await running
    return served


@pytest.mark.parametrize(
    ("mode", "attention", "kv"),
    [
        ("sync", "auto", "auto"),
        ("async", "auto", "int8"),
        ("async", "gather", "auto"),
        ("sync", "gather", "int8"),
    ],
)
def test_the_text_is_the_same_as_without_moving(
    folder: Path, mode: Any, attention: str, kv: str
) -> None:
    swap = SwapConfig(host_blocks=80, mode=mode, group_blocks=6, threads=2)
    plain = asyncio.run(written(folder, 200, SwapConfig(), attention, kv))
    moved = asyncio.run(written(folder, 12, swap, attention, kv))
    assert any(event.loaded for event in moved.events if isinstance(event, Stepped))
    assert sum(isinstance(event, Transferred) for event in moved.events) > 10
    for at in range(10):
        assert len(plain.ids(at)) == 24 and moved.ids(at) == plain.ids(at)


def test_bytes_come_back_whatever_overlaps() -> None:
    """A hundred thousand block copies in random order and by several threads, against a plain model."""
    pieces, blocks, host_blocks = 3, 40, 60
    arena = torch.arange(pieces * blocks * 128, dtype=torch.float32).reshape(pieces, blocks, 128)
    told: list[int] = []
    mover = Mover(arena, host_blocks, threads=3, tell=told.append)
    mover.host.zero_()
    ours, theirs = arena.numpy().copy(), mover.host.numpy().copy()
    chance, num_copied, number = random.Random(0), 0, 0
    while num_copied < 100_000:
        batch = []
        for _ in range(60):
            count = chance.randrange(1, 20)
            start, there = chance.randrange(blocks - count), chance.randrange(host_blocks - count)
            device, host = range(start, start + count), range(there, there + count)
            if chance.random() < 0.5:
                device, host = chance.sample(range(blocks), count), chance.sample(range(60), count)
            runs = joined(list(zip(device, host, strict=True)))
            batch.append((Transfer(number, 0, chance.random() < 0.5, runs), [*device], [*host]))
            number, num_copied = number + 1, num_copied + count
        for transfer, _, _ in batch:  # all at once, so that workers meet
            mover.begin(transfer)
        for transfer, device, host in batch:
            if transfer.is_out:
                theirs[:, host] = ours[:, device]
            else:
                ours[:, device] = theirs[:, host]
        while len(told) < number:
            time.sleep(1e-4)
    mover.close()
    assert sorted(told) == list(range(number))
    assert np.array_equal(arena.numpy(), ours) and np.array_equal(mover.host.numpy(), theirs)
