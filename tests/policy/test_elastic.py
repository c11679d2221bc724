"""More and fewer devices: late requests bring more, and those that needed them do not lose them again."""

from __future__ import annotations

import random

import pytest

from penstock.core.types import Report
from penstock.policy import scale
from penstock.policy.scale import Served
from penstock.policy.scale.elastic import Elastic


def asked(
    policy: Elastic, *, now: float, ttft_s: float, arrived: int, devices: int, used: float = 0.1
) -> int:
    """How many devices it asks for."""
    seen = scale.View(
        now=now,
        rng=random.Random(0),
        reports=[
            Report(replica="r", at=now, total_blocks=1000, free_blocks=round(1000 * (1 - used)))
        ],
        outstanding={"r": 0},
        bounds=scale.Bounds(least=1, most=1),
        starting={},
        served=[Served(now, now - 2 * ttft_s, ttft_s, 100, 10) for _ in range(20)],
        arrived=arrived,
        devices={"r": devices},
    )
    decision = policy.decide(seen)
    scale.law(seen, decision)
    return decision.devices.get("r", devices)


def policy() -> Elastic:
    return Elastic(ttft_s=1.0, least_devices=2, most_devices=6, cooldown_s=10.0)


def test_late_requests_bring_devices_once_in_a_while() -> None:
    one = policy()
    assert asked(one, now=0, ttft_s=1.5, arrived=100, devices=2) == 4
    assert asked(one, now=9, ttft_s=1.5, arrived=100, devices=4) == 4
    assert asked(one, now=10, ttft_s=1.5, arrived=100, devices=4) == 6
    assert asked(one, now=20, ttft_s=1.5, arrived=100, devices=6) == 6


@pytest.mark.parametrize(("arrived", "used", "left"), [(100, 0.1, 4), (60, 0.1, 2), (60, 0.6, 4)])
def test_devices_leave_when_fewer_come_and_memory_idles(
    arrived: int, used: float, left: int
) -> None:
    one = policy()
    assert asked(one, now=0, ttft_s=1.5, arrived=100, devices=2) == 4
    assert asked(one, now=50, ttft_s=0.1, arrived=arrived, devices=4, used=used) == left


def test_a_replica_that_was_started_too_large_shrinks() -> None:
    assert asked(policy(), now=0, ttft_s=0.1, arrived=500, devices=6) == 4
