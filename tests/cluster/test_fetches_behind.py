"""A prefix that its owner has on disk only is read there for the peer that asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from penstock.assemble import load_config
from penstock.core.events import FiledAway, Finished
from penstock.core.fetching import BlocksBrought, Pinned
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.replay import replay_log
from penstock.lab.simulate import simulate
from penstock.report.log import LogReader
from penstock.traffic import TraceMeta

SETS = (
    "fleet.0.replicas=2",
    "fleet.0.policy.route='round-robin'",
    "fleet.0.policy.fetch='always'",
    "fleet.0.executor.kind='modelled'",
    "fleet.0.executor.gpu='a100-80g'",
    "fleet.0.cache.num_blocks=300",
    "fleet.0.cache.tiers.host_bytes=14000000",
    "fleet.0.cache.tiers.disk_bytes=400000000",
    "fleet.0.cache.peers.timeout_s=5.0",
)
DOCUMENTS = [
    *range(14),
    99,
    0,
    1,
]  # in turn to either replica: the last ones come to the other than the first time


class Questions:
    """About documents of three parts of 512 tokens, 32 blocks each."""

    def __init__(self) -> None:
        self.meta = TraceMeta("documents", "drawn", len(DOCUMENTS), len(DOCUMENTS))

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for place, document in enumerate(DOCUMENTS):
            ids = (*range(document * 100, document * 100 + 3), 10_000 + place)
            request = Request(
                id=RequestId(f"{place}"),
                model="default",
                prompt=TracedPrompt(3 * 512 + 20, ids, 512),
                sampling=Sampling(max_tokens=4),
                true_output=4,
            )
            yield place * 2.0, request


def test_what_a_peer_has_on_disk_comes_too(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    simulate(load_config(sets=SETS), Questions(), log_path=logs)
    paths = sorted(logs.rglob("*.jsonl*")) if logs.is_dir() else [logs]
    events = [event for path in paths for event in LogReader(path)]
    asked = [event for event in events if isinstance(event, Pinned)]
    assert [event.is_reading for event in asked] == [True, True]
    assert all(event.num_blocks + event.num_host < 96 for event in asked), "they are elsewhere"
    brought = [event for event in events if isinstance(event, BlocksBrought)]
    assert len(brought) == 2 and not any(event.error for event in brought)
    reads = [event for event in events if isinstance(event, FiledAway) and not event.is_out]
    assert {event.who for event in reads} == {event.who for event in asked}
    cached = {event.request: event.num_cached for event in events if isinstance(event, Finished)}
    assert cached["15"] == cached["16"] == 1536 and not any(cached[f"{at}"] for at in range(15))
    for each in replay_log(logs):
        assert each.difference is None, each.difference
