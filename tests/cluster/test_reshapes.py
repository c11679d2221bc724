"""Replicas that get more or fewer devices while they serve, in virtual time."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from penstock.assemble import assemble, load_config, modelled_leaves
from penstock.cluster.link import ReplicaLink
from penstock.core.errors import BadRequest, ReplicaLost
from penstock.core.events import Completed, Scaled
from penstock.core.prompt import TracedPrompt
from penstock.core.reshaping import NewShape, Reshaped
from penstock.core.types import Report, Request, RequestId, Sampling
from penstock.lab.replay import replay_log
from penstock.lab.simulate import Simulated, simulate
from penstock.policy import scale
from penstock.policy.scale.elastic import Elastic
from penstock.report.log import LogReader, Null
from penstock.sim.loop import run
from penstock.traffic import TraceMeta

FLEET = """
is_checked = true
[[fleet]]
model = "qwen3-30b-a3b"
executor = {kind = "modelled", gpu = "a100-80g", expert_devices = 2, reshape_s = 3.0%s}
cache = {num_blocks = 30000}
policy = {route = "least", scale = {name = "elastic", ttft_s = 0.1, cooldown_s = 20, most_devices = 4}}
"""


class Burst:
    """Sixty requests within three seconds, and single ones that come when all is over."""

    meta = TraceMeta("burst", "made here")

    def __iter__(self):  # type: ignore[no-untyped-def]
        for number in range(100):
            at = number * 0.05 if number < 60 else 60.0 + number
            yield (
                at,
                Request(
                    id=RequestId(f"r{number}"),
                    model="qwen3-30b-a3b",
                    prompt=TracedPrompt(6000 if number < 60 else 20),
                    sampling=Sampling(max_tokens=20, ignore_eos=True),
                    true_output=20,
                ),
            )


def played(folder: Path, more: str = "") -> tuple[Simulated, Path]:
    (folder / "fleet.toml").write_text(FLEET % more)
    log = folder / "log.jsonl"
    return simulate(load_config(folder / "fleet.toml"), Burst(), log_path=log), log


def test_it_grows_under_a_burst_shrinks_behind_it_and_loses_nothing(tmp_path: Path) -> None:
    result, log = played(tmp_path)
    assert result.played.num_served == 100 and not result.played.errors
    events = list(LogReader(log))
    asked = [each for each in events if isinstance(each, Scaled)]
    done = [each for each in events if isinstance(each, Reshaped)]
    assert [(each.was, each.devices) for each in done] == [(2, 4), (4, 2), (2, 1)]
    assert [each.at - why.at for each, why in zip(done, asked, strict=True)] == [3.0] * 3
    assert all(each.took_s == pytest.approx(3.0) for each in done)
    assert all(outcome.difference is None for outcome in replay_log(log))


def test_a_restart_holds_up_what_a_change_beside_does_not(tmp_path: Path) -> None:
    def longest_gap(folder: Path, more: str) -> float:
        folder.mkdir()
        _, log = played(folder, more)
        ends = [each.at for each in LogReader(log) if isinstance(each, Completed) and each.at < 20]
        return max(b - a for a, b in itertools.pairwise(ends))

    assert longest_gap(tmp_path / "beside", "") < 1.0
    assert longest_gap(tmp_path / "restart", ", reshape_stops = true") > 3.0


async def asked_of(config: str, folder: Path, replica: str, devices: int) -> NewShape:
    (folder / "fleet.toml").write_text(config)
    loaded = load_config(folder / "fleet.toml")
    service = await assemble(loaded, modelled_leaves(loaded, Null()))
    try:
        return (await service.reshape(loaded.fleet[0].served_name, devices, replica=replica))[
            replica
        ]
    finally:
        await service.stop()


def test_it_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    def ask(config: str, replica: str, devices: int = 3) -> NewShape:
        return run(asked_of(config, tmp_path, replica, devices))

    assert ask(FLEET % "", "qwen3-30b-a3b-0") == NewShape(2, 3)
    with pytest.raises(BadRequest, match="no replica 'other'"):
        ask(FLEET % "", "other")
    plain = '[[fleet]]\nmodel = "default"\nexecutor = {kind = "modelled", gpu = "l4"}\n'
    with pytest.raises(BadRequest, match="not spread over devices"):
        ask(plain, "default-0")


@pytest.mark.parametrize(
    ("ttfts", "used", "devices"),
    [
        ([2.0] * 2 + [0.1] * 8, 0.9, 4),  # 80 % in time
        ([2.0] * 1 + [0.1] * 9, 0.9, None),  # 90 %
        ([0.1] * 10, 0.4, 1),
        ([0.1] * 10, 0.6, None),
        ([], 0.0, None),
    ],
)
def test_the_estimator_goes_by_attainment_and_use(
    ttfts: list[float], used: float, devices: int | None
) -> None:
    policy = Elastic(step=2)
    report = Report(replica="r", at=0.0, total_blocks=100, free_blocks=round(100 - 100 * used))
    served = [scale.Served(5.0, 1.0, ttft, 10, 10) for ttft in ttfts]

    def decide(at: float) -> scale.Decision:
        view = scale.View(
            at, random.Random(0), [report], {}, scale.Bounds(), {}, served, 0, {"r": 2}
        )
        decision = policy.decide(view)
        scale.law(view, decision)
        return decision

    assert decide(10.0).devices == ({} if devices is None else {"r": devices})
    assert not decide(69.0).devices  # it cools down
    assert decide(71.0).devices == ({} if devices is None else {"r": devices})


def test_of_a_replica_that_is_not_running_the_caller_hears_at_once() -> None:
    async def main() -> None:
        with pytest.raises(ReplicaLost, match="not running"):
            await ReplicaLink("r0").reshape(3, "elastic-moe")

    run(main())
