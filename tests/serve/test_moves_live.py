"""Requests move between two real engine processes while they write: the same words, and no block stays behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import cast

import pytest

from benchmarks.random_models import save_random_llama
from penstock.assemble import assemble, process_leaves
from penstock.assemble.config import load_config
from penstock.cluster.fleet import Fleet
from penstock.core.moving import Migrated
from penstock.core.ports import MovingPort, RolePort
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from tests.serve.test_serve import needs_model

SETS = (
    "fleet.0.replicas=2",
    "fleet.0.cache.num_blocks=400",
    "fleet.0.executor.dtype='fp32'",
    "fleet.0.executor.threads=1",
)


def asked(name: str, seed: int | None) -> Request:
    chance = random.Random(name)
    return Request(
        id=RequestId(name),
        model="default",
        prompt=TokenPrompt([chance.randrange(1, 4000) for _ in range(chance.randint(5, 300))]),
        sampling=Sampling(
            max_tokens=40,
            temperature=0.0 if seed is None else 1.0,
            seed=seed,
            repetition_penalty=1.1 if name.endswith("2") else 1.0,
            ignore_eos=True,
        ),
    )


async def text(fleet: Fleet, name: str, seed: int | None, moves: str) -> tuple[int, ...]:
    """What is written; with `moves` modes, the request changes its replica at random tokens."""
    chance, outputs = random.Random(name), list[Output]()
    at = {chance.randrange(1, 35): mode for mode in moves.split()}

    def hear(output: Output) -> None:
        outputs.append(output)
        WHERE[name] = fleet.holders()[name]
        mode = at.pop(len(outputs), None)
        if mode is not None:
            where = fleet._tickets[name].replica
            (other,) = [each.replica for each in fleet.reports() if each.replica != where]
            fleet.move(name, other, mode, on_over=OVER.append)  # type: ignore[arg-type]

    await fleet.submit(asked(name, seed), hear)
    return tuple(token for output in outputs for token in output.ids)


OVER: list[Migrated] = []
WHERE: dict[str, str] = {}  # the replica that wrote the last token


async def until_idle(fleet: Fleet) -> None:
    for _ in range(100):
        await asyncio.sleep(0.05)
        if all(each.free_blocks == each.total_blocks for each in fleet.reports()):
            return
    raise AssertionError(f"blocks are held: {fleet.reports()}")


async def handed_on(
    fleet: Fleet, names: dict[str, int | None], plain: list[tuple[int, ...]]
) -> None:
    """Prompts are computed by one process and answers written by the other."""
    replicas = [each.replica for each in fleet.reports()]
    first, second = (cast(RolePort, fleet.port(name)) for name in replicas)
    first.set_role("prefill")
    second.set_role("decode")
    told = await asyncio.gather(*(text(fleet, name, seed, "") for name, seed in names.items()))
    assert list(told) == plain
    assert [WHERE[name] for name in names] == [replicas[1]] * len(names)
    await until_idle(fleet)
    first.set_role("any")
    second.set_role("any")


async def moved_and_killed(
    model: str = "default", sets: tuple[str, ...] = SETS, each_bytes: int = 4 * 2 * 2 * 64 * 4 * 16
) -> None:
    OVER.clear()
    config = load_config(model=model, sets=sets)
    leaves, processes = process_leaves(config)
    service = await assemble(config, leaves)
    try:
        fleet = service.fleet(service.models()[0])
        names = {f"q{place}": None if place % 3 else place for place in range(4)}
        plain = [await text(fleet, name, seed, "") for name, seed in names.items()]
        moved = await asyncio.gather(
            *(text(fleet, name, seed, "live blocking queued pull") for name, seed in names.items())
        )
        assert list(moved) == plain
        outcomes = Counter(told.outcome for told in OVER)
        assert outcomes["committed"] >= 8 and not outcomes["timed_out"], OVER
        copied = [told for told in OVER if told.num_blocks]
        assert all(told.num_bytes == told.num_blocks * each_bytes for told in copied)
        await until_idle(fleet)
        await handed_on(fleet, names, plain)
        going = [asyncio.create_task(text(fleet, name, seed, "")) for name, seed in names.items()]
        await asyncio.sleep(0.04)
        assert processes.engines[0].pid is not None
        os.kill(processes.engines[0].pid, signal.SIGKILL)
        assert list(await asyncio.gather(*going)) == plain
    finally:
        await service.stop()


@needs_model
def test_texts_are_the_same_when_requests_move_and_when_their_replica_is_killed() -> None:
    asyncio.run(moved_and_killed())


async def moved_over_tcp() -> None:
    """The two share no memory: their caches are private, and blocks go through sockets."""
    OVER.clear()
    config = load_config(sets=(*SETS, 'net.kv.kind="tcp"'))
    leaves, _ = process_leaves(config)
    service = await assemble(config, leaves)
    try:
        fleet = service.fleet("default")
        cards = [cast(MovingPort, fleet.port(f"default-{place}")).kv for place in range(2)]
        assert all(card is not None and card.address.startswith("tcp:127.0.0.1:") for card in cards)
        names = {"q1": 1, "q2": 2}
        plain = [await text(fleet, name, seed, "") for name, seed in names.items()]
        told = await asyncio.gather(
            *(text(fleet, name, seed, "live blocking pull") for name, seed in names.items())
        )
        assert list(told) == plain
        outcomes = Counter(told.outcome for told in OVER)
        assert outcomes["committed"] >= 4, OVER
        assert sum(told.num_blocks for told in OVER) > 10
        await until_idle(fleet)
    finally:
        await service.stop()


@pytest.mark.slow
@needs_model
def test_blocks_go_over_tcp_where_no_memory_is_shared() -> None:
    asyncio.run(moved_over_tcp())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["auto", "tcp"])
def test_keys_and_values_on_a_card_move(kind: str, tmp_path: Path) -> None:
    """Two replicas that share a card: through memory of the host, and through sockets."""
    shape = {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    }  # fmt: skip
    save_random_llama(tmp_path, shape, is_tied=True)
    sets = (
        "fleet.0.replicas=2",
        "fleet.0.cache.num_blocks=400",
        "fleet.0.executor.dtype='fp32'",
        "fleet.0.executor.device='cuda'",
        f"net.kv.kind='{kind}'",
    )
    asyncio.run(moved_and_killed(str(tmp_path), sets, 8 * 2 * 4 * 64 * 4 * 16))
