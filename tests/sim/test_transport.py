"""Modelled copies between replicas of one device and of several."""

from __future__ import annotations

import asyncio

import pytest

from penstock.core.moving import KvCard
from penstock.sim.channel import Link
from penstock.sim.loop import run
from penstock.sim.transport import Fabric, ModelledTransport


@pytest.mark.parametrize(("source", "target", "seconds"), [
    (1, 1, 4.0), (4, 4, 1.0), (4, 2, 2.0), (2, 4, 2.0), (8, 1, 4.0), (3, 2, 2.0),
])  # fmt: skip
def test_the_end_with_fewer_devices_says_how_long_it_takes(
    source: int, target: int, seconds: float
) -> None:
    """4 MB in heads: each of p devices sends 4 / p at 1 MB/s at most, each of q receives 4 / q."""

    async def main() -> None:
        fabric = Fabric(Link(latency_s=0.0, bytes_per_s=1e6))
        _, there = (
            ModelledTransport(
                fabric,
                KvCard(layout="", address=name, block_size=16, block_bytes=10**6, devices=devices),
            )
            for name, devices in (("a", source), ("b", target))
        )
        loop = asyncio.get_running_loop()
        at = loop.time()
        await there.pull("a", [(0, 0, 4)])
        assert loop.time() - at == pytest.approx(seconds)
        assert fabric.num_bytes == 4e6

    run(main())
