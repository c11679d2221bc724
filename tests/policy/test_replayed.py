"""Policies that learn from events decide the same again when their replica's log is replayed."""

from __future__ import annotations

import pytest

from penstock.core.events import Stepped
from tests.lab.test_replay import made, parts, replay_replica, virtual_log

VARIANTS = {
    "vtc": made(60, order={"name": "vtc"}),
    "drr": made(60, order={"name": "drr", "quantum": 100.0}),
    "sjf": made(60, order={"name": "sjf"}, evict={"name": "cheapest-per-block"}),
    "split-fuse": made(40, order={"name": "requeue"}, batch={"name": "split-fuse"}),
    "prefill-first": made(60, order={"name": "lpm"}, batch={"name": "prefill-first"}),
    "cache-aware": made(60, order={"name": "dfs-weight"}, evict={"name": "cache-aware"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_virtual_runs_replay_identically(name: str) -> None:
    record = VARIANTS[name]
    log = virtual_log(1, record)
    judge = replay_replica(log, parts(record))
    steps = [event for event in log if isinstance(event, Stepped)]
    assert judge.num_decisions == len(steps) > 50
    assert any(event.evicted for event in steps)
