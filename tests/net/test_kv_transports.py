"""Blocks arrive as they were, wherever they go and come from, whatever carries them."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from operator import mul

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import BadConfig, ReplicaLost
from penstock.core.moving import KvCard
from penstock.net import blocks, kv_tcp
from penstock.net.blocks import Region, block_bytes, copy_runs
from penstock.net.kv_either import EitherTransport
from penstock.net.kv_link import KvLink
from penstock.net.kv_shared import SharedFile, SharedTransport, opened
from penstock.net.kv_tcp import TcpTransport

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


def tcp_transport(region: Region, link: KvLink | None = None) -> TcpTransport:
    return TcpTransport(region, layout="x", block_size=4, link=link)


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


def test_who_could_not_share_its_memory_has_a_socket_alone() -> None:
    """It is read from by one that has both, and the other way round; what has no socket is said to be lost."""

    async def main() -> None:
        (there, _), (here, address) = shared(1), shared(2)
        alone = tcp_transport(there)
        both = EitherTransport(shared_transport(here, address), tcp_transport(here))
        await both.pull(alone.card.address, [(0, 3, 4)])
        assert (here[:, 3:7] == there[:, :4]).all()
        here[:, 9] += 1
        await alone.pull(both.card.address, [(9, 9, 1)])
        assert (here[:, 9] == there[:, 9]).all()
        with pytest.raises(ReplicaLost, match="not to be had"):
            await alone.pull(address, [(0, 0, 1)])
        memory = shared_transport(here, address)
        with pytest.raises(ReplicaLost, match="not shared"):
            await memory.pull(alone.card.address, [(0, 0, 1)])
        for each in (both, alone, memory):
            await each.close()

    asyncio.run(main())


@given(some_runs())
@settings(max_examples=20, deadline=None)
def test_they_come_over_tcp(runs: list[tuple[int, int, int]]) -> None:
    async def main() -> None:
        there, here = filled(1), filled(2)
        wanted = expected(there, here, runs)
        source = tcp_transport(there)
        target = tcp_transport(here)
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
        source = tcp_transport(filled(1))
        target = tcp_transport(filled(2))
        before, _, _ = source.card.address.rpartition(":")
        with pytest.raises(ReplicaLost, match="did not come"):
            await target.pull(f"{before}:{'00' * 16}", [(0, 0, 1)])
        with pytest.raises(ReplicaLost):
            await target.pull(source.card.address, [(12, 0, 1)])  # there is no such block
        await source.close()
        await asyncio.sleep(0)
        other = tcp_transport(filled(2))
        with pytest.raises(ReplicaLost):
            await other.pull(source.card.address, [(0, 0, 1)])  # it is closed
        await target.close()
        await other.close()

    asyncio.run(main())


def test_large_pulls_come_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """So no side holds more than a group, and what comes is the same."""
    groups: list[int] = []
    real_pack = blocks.pack

    def pack(region: Region, numbers: list[int]) -> Region:
        groups.append(len(numbers))
        return real_pack(region, numbers)

    monkeypatch.setattr(kv_tcp, "GROUP_BYTES", 3 * 32 * 5)
    monkeypatch.setattr(blocks, "pack", pack)

    async def main() -> None:
        here = filled(2)
        source, target = tcp_transport(filled(1)), tcp_transport(here)
        await target.pull(source.card.address, [(0, 0, 12)])
        assert (here == filled(1)).all() and groups == [5, 5, 2]
        await target.close()
        await source.close()

    asyncio.run(main())


def test_a_kept_connection_that_was_closed_is_opened_again() -> None:
    async def main() -> None:
        here = filled(2)
        source, target = tcp_transport(filled(1)), tcp_transport(here)
        await target.pull(source.card.address, [(0, 0, 1)])
        for peer in list(source._served):
            peer.shutdown(2)
        await target.pull(source.card.address, [(1, 1, 11)])
        assert (here == filled(1)).all()
        await target.close()
        await source.close()

    asyncio.run(main())


def test_ports_are_of_the_range_and_one_too_many_is_refused() -> None:
    probe = socket.create_server(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    probe.close()
    link = KvLink(kind="tcp", ports=(port, port))

    async def main() -> None:
        first = tcp_transport(filled(1), link)
        assert f":{port}:" in first.card.address
        with pytest.raises(BadConfig, match="cannot be served"):
            tcp_transport(filled(1), link)
        await first.close()

    asyncio.run(main())
    with pytest.raises(ValueError, match="first and the last"):
        KvLink(ports=(5, 4))


@pytest.mark.parametrize("reads", [True, False])
def test_shared_memory_is_read_where_it_can_be(
    reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a peer in another container it cannot, though the machine is the same."""
    if not reads:

        def refuse(address: str) -> Region:
            raise ReplicaLost("the memory of process 7 cannot be read: Permission denied")

        monkeypatch.setattr("penstock.net.kv_shared.opened", refuse)

    async def main() -> None:
        ends = []
        for seed in (1, 2):
            region, address = shared(seed)
            tcp = tcp_transport(region)
            ends.append((region, EitherTransport(shared_transport(region, address), tcp), tcp))
        (there, source, served), (here, target, _) = ends
        await target.pull(source.card.address, [(0, 0, 12)])
        assert (here == there).all()
        assert bool(served._served) != reads
        await target.close()
        await source.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["shared", "tcp", "either"])
def test_host_memory_is_read_behind_the_devices(kind: str) -> None:
    """Blocks 12 to 23 are those of the second region, and checksums go by the same numbers."""

    async def main() -> None:
        device, address = shared(1)
        host, behind = shared(2)
        here, own = shared(3)
        source, target = end_of(kind, device, address), end_of(kind, here, own)
        assert source.behind is None
        if isinstance(source, TcpTransport):
            source.add(host)
        else:
            source.add(host, behind)
        assert source.behind == 12
        runs = [(10, 0, 4), (20, 6, 1), (3, 8, 2)]  # the first goes over the border
        before = await source.sums([10, 11, 12, 13, 20, 3, 4])
        await target.pull(source.card.address, runs)
        both = np.concatenate([device, host], axis=1)
        assert (here == expected(both, filled(3), runs)).all()
        assert await target.sums([0, 1, 2, 3, 6, 8, 9]) == before
        words = np.frombuffer(device[:, 10].tobytes(), "<u8").tolist()
        weights = [(place * blocks.WEIGHT) % 2**64 | 1 for place in range(1, len(words) + 1)]
        assert before[0] == sum(map(mul, words, weights)) % 2**64
        host[1, 0, 5] ^= 1
        changed = await source.sums([12])
        assert changed != before[2:3], "one bit of a block is seen"
        await target.close()
        await source.close()

    asyncio.run(main())


def end_of(
    kind: str, region: Region, address: str
) -> SharedTransport | TcpTransport | EitherTransport:
    if kind == "shared":
        return shared_transport(region, address)
    tcp = tcp_transport(region)
    return tcp if kind == "tcp" else EitherTransport(shared_transport(region, address), tcp)


def test_any_bit_and_any_two_words_make_another_sum() -> None:
    for size in (32, 30):  # whole words, and none
        region = np.random.default_rng(0).integers(0, 256, (3, 4, size), np.uint8)
        readable = blocks.Readable(region)
        plain = readable.sums(range(4))
        for piece, block, at, bit in ((0, 0, 0, 0), (2, 3, size - 1, 7), (1, 2, 9, 3)):
            region[piece, block, at] ^= 1 << bit
            changed = readable.sums(range(4))
            assert [one != two for one, two in zip(plain, changed, strict=True)] == [
                place == block for place in range(4)
            ]
            region[piece, block, at] ^= 1 << bit
        region[[0, 1], 1, :8] = region[[1, 0], 1, :8]
        assert readable.sums([1]) != plain[1:2] and readable.sums([0, 2]) == plain[0:3:2]
