"""Blocks of a card's memory arrive in another's, by window and by socket; without a card, those of CPU tensors."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from penstock.core.errors import ReplicaLost
from penstock.core.plans import Transfer
from penstock.engine.swap import joined
from penstock.engine.torch.card_memory import CardMemory
from penstock.engine.torch.mover import Mover, copy_packed, host_of
from penstock.net import kv_staged
from penstock.net.blocks import Region, block_bytes
from penstock.net.kv_link import KvKind, KvLink
from penstock.net.kv_staged import StagedTransport

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (6, 40, 2, 16, 8)
RUNS = [(3, 0, 2), (30, 7, 9), (9, 5, 1), (20, 20, 5)]


def arena(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def transport(of: torch.Tensor, kind: KvKind = "auto") -> StagedTransport:
    return StagedTransport(CardMemory(of), layout="x", block_size=16, link=KvLink(kind=kind))


async def pulled(kind: KvKind) -> tuple[StagedTransport, StagedTransport]:
    there, here = arena(1), arena(2)
    wanted = here.clone()
    for first, start, count in RUNS:
        wanted[:, start : start + count] = there[:, first : first + count]
    source, target = transport(there, kind), transport(here, kind)
    for _ in range(2):  # the second time over the same connection
        await target.pull(source.card.address, RUNS)
    assert torch.equal(here, wanted)
    assert torch.equal(there, arena(1))
    return source, target


@pytest.mark.parametrize("kind", ["auto", "tcp"])
@pytest.mark.parametrize("half", [1, 3, 1 << 20])
def test_blocks_arrive(kind: KvKind, half: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups of one block, of three and all at once; the source fills a window, or the socket carries them."""
    monkeypatch.setattr(kv_staged, "HALF_BYTES", half * block_bytes(CardMemory(arena(1))))

    async def main() -> None:
        source, target = await pulled(kind)
        first, start, count = RUNS[1]
        theirs = await source.sums([*range(first, first + count)])
        assert theirs == await target.sums([*range(start, start + count)]) != ()
        assert len(set(theirs)) == count and source.behind is None
        assert len(source._theirs) == (kind == "auto")
        for each in (source, target):
            await each.close()

    asyncio.run(main())


def test_a_window_that_cannot_be_mapped_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from another machine, or another container."""

    def refuse(address: str, *, is_written: bool) -> None:
        raise ReplicaLost("the memory of process 7 cannot be read: Permission denied")

    monkeypatch.setattr(kv_staged, "opened", refuse)

    async def main() -> None:
        source, target = await pulled("auto")
        assert list(source._theirs.values()) == [None]
        for each in (source, target):
            await each.close()

    asyncio.run(main())


def test_losses_are_told_and_a_closed_connection_is_opened_again() -> None:
    async def main() -> None:
        source, target = await pulled("auto")
        for peer in list(source._served):
            peer.shutdown(2)
        await target.pull(source.card.address, [(1, 1, 1)])
        before, _, _ = source.card.address.rpartition(":")
        with pytest.raises(ReplicaLost, match="did not come"):
            await target.pull(f"{before}:{'00' * 16}", [(0, 0, 1)])
        with pytest.raises(ReplicaLost):
            await target.pull(source.card.address, [(40, 0, 1)])  # there is no such block
        await source.close()
        with pytest.raises(ReplicaLost):
            await target.pull(source.card.address, [(0, 0, 1)])
        await target.close()

    asyncio.run(main())


def test_a_source_that_was_waited_for_too_long_writes_into_nothing_that_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        source, target = await pulled("auto")
        late: list[Region] = []
        gone_on = threading.Event()

        def stall(blocks: Sequence[int], into: Region) -> None:
            late.append(into)
            gone_on.wait(10)

        fetch, source._memory.fetch = source._memory.fetch, stall  # type: ignore[method-assign]
        monkeypatch.setattr(kv_staged, "STALL_S", 0.05)
        target._sources.clear()  # a connection that was opened before has the usual patience
        with pytest.raises(ReplicaLost, match="did not come"):
            await target.pull(source.card.address, [(0, 0, 1)])
        assert late

        def disturbed(blocks: Sequence[int], into: Region) -> None:
            fetch(blocks, into)
            for stalled in late:
                stalled[:] = 77

        source._memory.fetch = disturbed  # type: ignore[method-assign]
        monkeypatch.setattr(kv_staged, "STALL_S", 10.0)
        await target.pull(source.card.address, RUNS)
        there = [block for first, _, count in RUNS for block in range(first, first + count)]
        here = [block for _, start, count in RUNS for block in range(start, start + count)]
        assert await target.sums(here) == await source.sums(there)
        gone_on.set()
        for each in (source, target):
            await each.close()

    asyncio.run(main())


def test_a_source_that_cannot_copy_is_told_of() -> None:
    async def main() -> None:
        source, target = await pulled("auto")

        def fetch(blocks: object, into: object) -> None:
            raise ReplicaLost("the card has no memory left to copy blocks with")

        source._memory.fetch = fetch  # type: ignore[method-assign]
        with pytest.raises(ReplicaLost, match="did not come"):
            await target.pull(source.card.address, [(0, 0, 1)])
        for each in (source, target):
            await each.close()

    asyncio.run(main())


def test_peers_hear_that_a_card_is_full_and_what_holds_nothing_sums_up_to_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        source = transport(arena(1))
        assert await source.sums(()) == ()
        monkeypatch.setattr(CardMemory, "_at", no_memory)
        with pytest.raises(ReplicaLost, match="no memory left"):
            await source.sums([1, 2])
        await source.close()

    asyncio.run(main())


def moves(count: int) -> list[Transfer]:
    chance, found = random.Random(0), []
    for number in range(count):
        size = chance.randrange(1, 12)
        device, host = chance.sample(range(40), size), chance.sample(range(60), size)
        if chance.random() < 0.5:
            start, there = chance.randrange(28), chance.randrange(48)
            device, host = [*range(start, start + size)], [*range(there, there + size)]
        runs = joined(list(zip(device, host, strict=True)))
        found.append(Transfer(number, 0, chance.random() < 0.5, runs))
    return found


def no_memory(card: CardMemory, blocks: Sequence[int]) -> torch.Tensor:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("at_once", "is_full"), [(1 << 10, False), (64 << 20, False), (64 << 20, True)]
)
def test_copies_to_pinned_memory_and_back(
    at_once: int, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a mover does on a card, against a plain model; pieces of a block lie side by side in host memory.

    Also where the card has no memory to bring blocks together with.
    """
    monkeypatch.setattr("penstock.engine.torch.mover.GROUP_BYTES", at_once)
    if is_full:
        monkeypatch.setattr(CardMemory, "_at", no_memory)
    device = arena(3, torch.float32)
    host = host_of(device, 60)
    assert host.is_pinned() == device.is_cuda and host[:, 7].is_contiguous()
    host.zero_()
    ours, theirs = device.cpu().numpy().copy(), host.numpy().copy()
    card = CardMemory(device)
    for transfer in moves(60):
        copy_packed(card, host, transfer)
        for first, start, count in transfer.runs:
            a, b = slice(first, first + count), slice(start, start + count)
            if transfer.is_out:
                theirs[:, b] = ours[:, a]
            else:
                ours[:, a] = theirs[:, b]
    assert np.array_equal(device.cpu().numpy(), ours) and np.array_equal(host.numpy(), theirs)


@pytest.mark.gpu
def test_a_mover_on_a_card_waits_for_what_the_steps_have_queued() -> None:
    """A copy out reads what a kernel that is still running writes."""
    device = torch.zeros(4, 64, 1 << 16, device="cuda")
    told: list[int] = []
    mover = Mover(device, 64, threads=2, tell=told.append)
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(20):
        busy = busy @ busy.T * 1e-4
    device += 7
    mover.begin(Transfer(0, 0, True, ((0, 0, 64),)))
    mover.close()
    assert told == [0] and bool((mover.host == 7).all())
