"""Limits: the static one, and semi-PD's controller on devices whose law is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from penstock.core.events import Arrived, Finished
from penstock.core.limits import Holder, Use
from penstock.core.types import Slo
from penstock.policy import find
from penstock.policy.limit import View, law
from penstock.policy.limit.fixed import Fixed
from penstock.policy.limit.semi_pd import (
    Outlook,
    SemiPd,
    decode_line_of,
    line_of,
    part,
    prefill_line_of,
)

RNG = random.Random(0)


def holders(x: float, y: float, prefill: list[Use], decode: list[Use]) -> list[Holder]:
    return [Holder("prefill", 0.1, x, prefill), Holder("decode", 0.1, y, decode)]


def arrived(at: float, tokens: int, slo: Slo) -> Arrived:
    return Arrived(
        at=at, who="r", request=f"{at}", seq=0, model="m", num_prompt=tokens, max_tokens=9, n=1,
        tenant="t", priority=0, slo=slo,
    )  # fmt: skip


def finished(at: float) -> Finished:
    return Finished(
        at=at, who="r", request="r", answer=0, reason="stop", arrived_at=0.0, admitted_at=0.0,
        first_token_at=0.0, last_token_at=at, num_prompt=1, num_cached=0, num_output=1,
        num_preemptions=0, tenant="t", priority=0, slo=Slo(),
    )  # fmt: skip


class Device:
    """Prefill takes 0.01 + n / (5000 x) s, a decode step 0.004 + 0.008 / y s; all cores while no prompt is there."""

    def __init__(self, policy: SemiPd, slo: Slo, x: float = 0.6, supply: float = 1.0) -> None:
        self.policy, self.slo, self.supply = policy, slo, supply
        self.split = (x, round(1 - x, 6))
        self.now = 0.0

    def window(self, rate: float, tokens: int, seconds: float = 10.0) -> str:
        num = round(rate * seconds)
        x, y = self.split
        cores = part(self.split)
        for place in range(num):
            self.policy.observe(arrived(self.now + place / rate, tokens, self.slo))
        self.now += seconds
        sizes = (tokens, tokens // 2)
        prefill = [Use(cores, n, 0.01 + n / (5000 * cores)) for n in sizes]
        decode = [Use(each, 20, step_s(each), 9) for each in (min(y, 1 - cores), 1.0)]
        view = View(self.now, RNG, holders(x, y, prefill, decode), self.supply)
        decision = self.policy.decide(view)
        law(view, decision)
        self.split = decision.caps["prefill"], decision.caps["decode"]
        return decision.why


def test_the_static_split_stays_and_fits() -> None:
    view = View(0.0, RNG, holders(0.8, 1.0, [], []), 2.0)
    assert Fixed().decide(view).caps == {"prefill": 0.8, "decode": 1.0}
    view.supply = 1.0
    told = Fixed().decide(view)
    law(view, told)
    assert sum(told.caps.values()) == pytest.approx(1.0) and told.why


def test_the_law_knows_a_bad_answer() -> None:
    view = View(0.0, RNG, holders(0.5, 0.5, [], []), 1.0)
    told = Fixed().decide(view)
    for caps in (
        {"prefill": 0.5},
        {"prefill": 0.95, "decode": 0.05},
        {"prefill": 0.6, "decode": 0.6},
    ):
        told.caps = caps
        with pytest.raises(AssertionError):
            law(view, told)


def test_steps_of_prefill_are_fitted_like_numpy_does() -> None:
    rng = np.random.default_rng(1)
    u = rng.uniform(0.1, 9, 40)
    seconds = 0.02 + 0.3 * u + rng.normal(0, 0.01, 40)
    sums = (40.0, u.sum(), (u * u).sum(), seconds.sum(), (u * seconds).sum())
    assert prefill_line_of(sums) == pytest.approx(tuple(np.polyfit(u, seconds, 1)[::-1]), rel=1e-6)
    assert prefill_line_of((2.0, 4.0, 8.0, 3.0, 6.0)) == (0.0, 0.75)  # one size: all of it grows


def test_decode_steps_are_fitted_like_numpy_does_and_flat_where_one_share_was_seen() -> None:
    known = {0.2: (0.05, 1), 0.5: (0.021, 1), 1.0: (0.016, 1)}
    expected = np.polyfit([5, 2, 1], [0.05, 0.021, 0.016], 1)[::-1]
    assert line_of(known) == pytest.approx(tuple(expected))
    assert decode_line_of({0.5: (0.02, 3)}) == (0.02, 0.0)
    assert decode_line_of({0.2: (0.02, 3)}) == (0.01, 0.0)


def test_the_wait_is_that_of_a_queue_with_one_server() -> None:
    """Against Lindley's recursion over 400,000 random arrivals of two sizes of prompts."""
    rng = np.random.default_rng(7)
    prompts = [400, 2000]
    rate, x = 2.0, 0.8
    outlook = Outlook((0.02, 0.2), (0.0, 0.0), prompts, 1.0, (1.0, float("inf")), False)
    service = 0.02 + 0.2 * rng.choice(prompts, 400_000) / (1000 * x)
    gaps = rng.exponential(1 / rate, 400_000)
    steps = service[:-1] - gaps[1:]
    path = np.concatenate([[0.0], np.cumsum(steps)])
    waits = path - np.minimum.accumulate(path)
    expected = 1.0 - (waits.mean() + service.mean())
    assert outlook.slack((x, 1 - x)) == pytest.approx(expected, abs=0.02)


def step_s(y: float) -> float:
    return 0.004 + 0.008 / y


def best(measure: Callable[[float], float]) -> float:
    """The split of the grid that is really best."""
    return max((round(0.2 + 0.1 * step, 1) for step in range(7)), key=measure)


@pytest.mark.parametrize(("rate", "tokens"), [(2.0, 600), (1.0, 2400), (6.0, 200), (0.5, 400)])
def test_it_ends_at_the_split_that_is_best_for_the_device(rate: float, tokens: int) -> None:
    slo = Slo(ttft_s=2.0, tpot_s=0.03)
    device = Device(SemiPd(least_gain=0.0), slo)
    for _ in range(20):
        device.window(rate, tokens)

    def slack(x: float) -> float:
        each = 0.01 + tokens / (5000 * x)
        load = rate * each
        if load >= 1:
            return -1e9 * load
        wait = rate * each * each / (2 * (1 - load))
        return min(
            (2.0 - wait - each) / 2.0,
            (0.03 - load * step_s(1 - x) - (1 - load) * step_s(1.0)) / 0.03,
        )

    goal = best(slack)
    assert slack(device.split[0]) == pytest.approx(slack(goal), abs=0.02)


def test_a_step_at_a_time_when_two_windows_agree() -> None:
    device = Device(SemiPd(), Slo(ttft_s=0.5, tpot_s=1.0), x=0.3)
    told = [device.window(1.5, 800) for _ in range(6)]
    assert told[0] == "" and told[1] == "split 30%/70% -> 40%/60%" and told[2] == ""
    assert told[3] == "split 40%/60% -> 50%/50%"


def test_a_small_gain_is_not_worth_a_move() -> None:
    device = Device(SemiPd(), Slo(ttft_s=50.0, tpot_s=5.0))
    assert {device.window(0.5, 400) for _ in range(6)} == {""}


def test_it_follows_a_shift_of_lengths() -> None:
    device = Device(SemiPd(), Slo(ttft_s=1.5, tpot_s=0.03), x=0.6)
    for _ in range(12):
        device.window(4.0, 100)
    short = device.split[0]
    for _ in range(12):
        device.window(1.2, 2500)
    assert device.split[0] >= short + 0.2


def test_answers_close_a_window_too_and_without_promises_nothing_moves() -> None:
    policy = SemiPd(window_finished=3)
    device = Device(policy, Slo(), x=0.2)
    assert {device.window(2.0, 900) for _ in range(5)} == {""}
    for _ in range(3):
        policy.observe(finished(50.0))
    assert policy._window.num_finished == 3
    device.window(2.0, 100, seconds=0.5)
    assert policy._window.num_finished == 0


def test_no_partition_is_a_choice_where_the_supply_allows() -> None:
    policy = SemiPd()
    both = policy._choices(View(0.0, RNG, (), 2.0), dict(prefill=HOLD, decode=HOLD))
    one = policy._choices(View(0.0, RNG, (), 1.0), dict(prefill=HOLD, decode=HOLD))
    assert set(both) - set(one) == {(1.0, 1.0)} and len(one) == 7
    assert policy._towards((0.6, 0.4), (0.3, 0.7), both) == (0.5, 0.5)
    assert policy._towards((1.0, 1.0), (0.2, 0.8), both) == (0.4, 0.6)


HOLD = Holder("x", 0.1, 0.5)


def test_bad_parameters_are_named() -> None:
    for name, value in (("window_s", 0.0), ("grid", 0.0), ("window_finished", 0), ("tpot_s", -1.0)):
        with pytest.raises(ValueError, match=name):
            find("limit", "semi-pd")(**{name: value})
