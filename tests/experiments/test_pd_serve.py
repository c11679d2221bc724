"""What "ideal" means among the ways of forwarding."""

from __future__ import annotations

import math

import pytest

from penstock.experiments.pd_serve import REPLICAS, in_time, prompt_s


@pytest.mark.parametrize("prompt", [300, 1100, 4000])
def test_as_many_at_once_are_in_time_as_fit_into_the_promise(prompt: int) -> None:
    rows = [(5.0, prompt, 1)] * 400
    assert in_time(rows) == REPLICAS * math.floor(1.0 / prompt_s(prompt))


def test_whoever_would_be_late_takes_nobodys_place() -> None:
    long = 4000
    assert prompt_s(long) < 0.6 < 2 * prompt_s(long)
    at_once = [(0.0, long, 1)] * REPLICAS
    assert in_time([*at_once, *[(0.0, 1 << 15, 1)] * 50, (0.0, 100, 1)]) == REPLICAS + 1
