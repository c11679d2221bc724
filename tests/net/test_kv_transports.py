"""Blocks arrive as they were, wherever they go and come from, whatever carries them."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import ReplicaLost
from penstock.core.moving import KvCard
from penstock.net.blocks import Region, block_bytes, copy_runs
from penstock.net.kv_shared import SharedFile, SharedTransport, opened
from penstock.net.kv_tcp import serve_blocks

SHAPE = (3, 12, 32)


def filled(seed: int) -> Region:
    return np.random.default_rng(seed).integers(0, 256, SHAPE, np.uint8)


def shared(seed: int) -> tuple[Region, str]:
    file = SharedFile(int(np.prod(SHAPE)))
    region = np.frombuffer(file.memory, np.uint8).reshape(SHAPE)
    region[:] = filled(seed)
    return region, file.address(SHAPE)


def shared_transport(region: Region, address: str) -> SharedTransport:
    card = KvCard(layout="", address=address, block_size=1, block_bytes=block_bytes(region))
    return SharedTransport(region, card)


@st.composite
def some_runs(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Runs that do not overlap at the target."""
    runs, at = [], 0
    while at < 12 and draw(st.booleans()):
        count = draw(st.integers(1, 12 - at))
        runs.append((draw(st.integers(0, 12 - count)), at, count))
        at += count
    return runs


def expected(there: Region, here: Region, runs: list[tuple[int, int, int]]) -> Region:
    found = here.copy()
    for first, start, count in runs:
        for at in range(count):
            found[:, start + at] = there[:, first + at]
    return found


@given(some_runs())
@settings(max_examples=30, deadline=None)
def test_runs_are_copied(runs: list[tuple[int, int, int]]) -> None:
    there, here = filled(1), filled(2)
    wanted = expected(there, here, runs)
    copy_runs(there, here, runs)
    assert (here == wanted).all()


@given(some_runs())
@settings(max_examples=20, deadline=None)
def test_they_come_over_tcp(runs: list[tuple[int, int, int]]) -> None:
    async def main() -> None:
        there, here = filled(1), filled(2)
        wanted = expected(there, here, runs)
        source = await serve_blocks(there, layout="x", block_size=4)
        target = await serve_blocks(here, layout="x", block_size=4)
        for _ in range(2):  # the second time over the same connection
            await target.pull(source.card.address, runs)
        assert (here == wanted).all()
        await target.close()
        await source.close()

    asyncio.run(main())


def test_a_process_reads_anothers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, numpy as np\n"
        "from penstock.net.kv_shared import SharedFile\n"
        "from tests.net.test_kv_transports import shared, SHAPE\n"
        "region, address = shared(7)\n"
        "print(address, flush=True)\n"
        "sys.stdin.read()\n"
    )
    there = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert there.stdout is not None and there.stdin is not None
    address = there.stdout.readline().strip()

    async def main() -> None:
        here, own = shared(2)
        transport = shared_transport(here, own)
        await transport.pull(address, [(3, 0, 2)])
        monkeypatch.setattr("penstock.net.kv_shared.AT_ONCE_BYTES", 0)
        await transport.pull(address, [(5, 2, 2)])  # in a thread
        assert (here[:, :4] == filled(7)[:, 3:7]).all() and (here[:, 4:] == filled(2)[:, 4:]).all()
        there.kill()
        there.wait()
        await transport.pull(address, [(0, 8, 2)])  # what is mapped stays readable
        assert (here[:, 8:10] == filled(7)[:, :2]).all()
        await transport.close()
        again = shared_transport(here, own)
        with pytest.raises(ReplicaLost, match="cannot be read"):
            await again.pull(address, [(0, 0, 1)])
        await again.close()

    try:
        asyncio.run(main())
    finally:
        there.kill()
        there.wait()


def test_a_file_of_another_token_is_not_opened() -> None:
    _, address = shared(1)
    scheme_pid, number, _, numbers = address.rsplit(":", 3)
    with pytest.raises(ReplicaLost, match="another one"):
        opened(f"{scheme_pid}:{number}:feedfeedfeedfeed:{numbers}")


def test_whoever_does_not_know_the_token_gets_nothing() -> None:
    async def main() -> None:
        source = await serve_blocks(filled(1), layout="x", block_size=4)
        target = await serve_blocks(filled(2), layout="x", block_size=4)
        before, _, _ = source.card.address.rpartition(":")
        with pytest.raises(ReplicaLost, match="did not come"):
            await target.pull(f"{before}:{'00' * 16}", [(0, 0, 1)])
        with pytest.raises(ReplicaLost):
            await target.pull(source.card.address, [(12, 0, 1)])  # there is no such block
        await source.close()
        await asyncio.sleep(0)
        other = await serve_blocks(filled(2), layout="x", block_size=4)
        with pytest.raises(ReplicaLost):
            await other.pull(source.card.address, [(0, 0, 1)])  # it is closed
        await target.close()
        await other.close()

    asyncio.run(main())
