"""A real engine's process fetches a prefix from another one, from its cache and from the host memory behind it."""

from __future__ import annotations

import asyncio

import pytest

from penstock.assemble import assemble, process_leaves
from penstock.assemble.config import load_config
from penstock.cluster.fleet import Fleet
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Report, Request, RequestId, Sampling
from tests.serve.test_moves_live import until_idle
from tests.serve.test_serve import needs_model

SETS = (
    "fleet.0.replicas=2",
    "fleet.0.cache.num_blocks=60",
    "fleet.0.cache.peers={timeout_s=5.0}",
    "fleet.0.cache.tiers.host_bytes=20000000",
    "fleet.0.executor.dtype='fp32'",
    "fleet.0.executor.threads=1",
    "fleet.0.policy.route='round-robin'",
    "fleet.0.policy.fetch='always'",
)
KEY = b"0123456789abcdef"


def prompt(number: int) -> list[int]:
    return [1 + (number * 997 + at * 31) % 4000 for at in range(400)]


async def said(fleet: Fleet, name: str, number: int) -> tuple[tuple[int, ...], int]:
    """What was written, and how much of the prompt was found."""
    outputs: list[Output] = []
    request = Request(
        id=RequestId(name),
        model="default",
        prompt=TokenPrompt([*prompt(number), 7], key=KEY),
        sampling=Sampling(max_tokens=6, temperature=0.0, ignore_eos=True),
    )
    await fleet.submit(request, outputs.append)
    await asyncio.sleep(0.3)  # what blocks hold is told with reports
    text = tuple(token for output in outputs for token in output.ids)
    return text, max(output.num_cached for output in outputs)


def brought(reports: list[Report]) -> dict[tuple[str, str], int]:
    return {
        (report.replica, place): num
        for report in reports
        if isinstance(report.brought, tuple)
        for place, num, *_ in report.brought
    }


async def fetched(more: tuple[str, ...]) -> None:
    config = load_config(sets=(*SETS, *more))
    leaves, _ = process_leaves(config)
    service = await assemble(config, leaves)
    try:
        fleet = service.fleet("default")
        plain = await said(fleet, "0 first", 0)
        peer = await said(fleet, "0 second", 0)
        assert plain[1] == 0 and peer[1] == 400
        assert peer[0] == plain[0]
        texts = {}
        for number in range(1, 8):  # in turn, and 26 blocks each are more than one has room for
            texts[number], _ = await said(fleet, f"{number} first", number)
        index = fleet._router.sight.blocks
        assert index is not None
        names = TokenPrompt([*prompt(1), 7], key=KEY).blocks(16)
        in_host, _ = index.told_behind("default-0")
        assert len(in_host.intersection(names)) > 10, "it has left the device"
        again, found = await said(fleet, "1 from the other", 1)
        assert again == texts[1] and found == 400
        await until_idle(fleet)
        assert brought(list(fleet.reports())) == {("default-1", "peer"): 50}
    finally:
        await service.stop()


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shared", "tcp"])
def test_two_processes_fetch_from_each_other(kind: str) -> None:
    asyncio.run(fetched((f"net.kv.kind='{kind}'",)))
