"""Blocks of one backend's cache arrive in another's, by each way, for both ways of laying the cache out."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
import torch

from penstock.engine.torch.attention import KvLayout, choose_backend
from penstock.engine.torch.ports import Movable
from penstock.engine.torch.shared import transport_of
from penstock.net.kv_link import KvKind, KvLink

LAYOUT = KvLayout(
    num_layers=2,
    num_blocks=12,
    block_size=16,
    num_kv_heads=2,
    head_dim=64,
    dtype=torch.float32,
    device=torch.device("cpu"),
)


@pytest.mark.parametrize("kind", ["auto", "tcp", "either"])
@pytest.mark.parametrize("wanted", ["auto", "gather"])
def test_blocks_arrive(kind: KvKind, wanted: str) -> None:
    async def main() -> None:
        ends = []
        for value in range(2):
            backend, _ = choose_backend(LAYOUT, wanted=wanted)
            told = transport_of(backend, name="m", block_size=16, link=KvLink(kind=kind))
            assert told is not None
            arena = cast(Movable, backend).arena
            arena[:] = torch.randn(arena.shape) if value else 0.0
            ends.append((told, arena))
        (here, target), (there, source) = ends
        scheme = {"auto": "shared:", "tcp": "tcp:", "either": "either:"}[kind]
        assert here.card.address.startswith(scheme) and here.card.layout == there.card.layout
        await here.pull(there.card.address, [(3, 0, 2), (9, 5, 1)])
        assert torch.equal(target[:, :2], source[:, 3:5])
        assert torch.equal(target[:, 5], source[:, 9])
        assert not target[:, 2:5].any() and not target[:, 6:].any()
        for each, _ in ends:
            await each.close()

    asyncio.run(main())
