"""A log in which jobs moved to host memory and back is replayed decision by decision."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.cluster.spec import ReplicaSpec
from penstock.core.config import build
from penstock.core.events import Stepped, Transferred
from penstock.core.types import Caps, HostLink
from penstock.engine.replica import Replica
from penstock.lab.replay import replay_replica
from penstock.report.log import Memory
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from tests.engine.test_swap import MODEL
from tests.lab.test_replay import made, parts, workload

DRAWN = {"every_steps": 7}
LINK = HostLink(dispatch_s=1e-4, bytes_per_s=1e6, block_bytes=3000, pieces=2)
CAPS = Caps(
    num_layers=32,
    max_context=2048,
    max_jobs=16,
    max_batch_tokens=512,
    max_repeat=64,
    host_blocks=100,
    link=LINK,
)


@pytest.mark.parametrize("mode", ["sync", "async", "adaptive"])
def test_replayed_identically(mode: Any) -> None:
    record = made(
        40,
        CAPS,
        order={"name": "drawn-priority", **DRAWN},
        batch={"name": "resident", "max_tokens": 64},
        evict={"name": "fastswitch", **DRAWN},
    )
    record.spec["swap"] = {"host_blocks": 100, "mode": mode, "group_blocks": 8}
    assert build(ReplicaSpec, record.spec, "").swap.mode == mode
    log = Memory()

    async def main() -> None:
        found = parts(record)
        executor = ModelledExecutor(MODEL, caps=CAPS)
        replica = Replica(found.config, executor, found.policies, found.predictors, log=log)
        ended = asyncio.get_running_loop().create_task(replica.run())
        await workload(replica, 3, 60, 0.05)
        await replica.drain()
        await replica.stop()
        await ended

    run(main())
    judge = replay_replica(log.events, parts(record))
    steps = [event for event in log.events if isinstance(event, Stepped)]
    assert judge.num_decisions == len(steps) > 50
    assert any(event.loaded for event in steps) and any(event.offloaded for event in steps)
    assert any(isinstance(event, Transferred) for event in log.events)
