"""The ratio of prefill to decode replicas: by balance, by trend, one step at a time."""

from __future__ import annotations

import random

import pytest

from penstock.core.types import Report
from penstock.policy import scale
from penstock.policy.scale import Served
from penstock.policy.scale.pd_ratio import PdRatio


def view(served: list[Served], prefill: int = 4, decode: int = 4, now: float = 30.0) -> scale.View:
    names = [(f"p{i}", "prefill") for i in range(prefill)] + [
        (f"d{i}", "decode") for i in range(decode)
    ]
    return scale.View(
        now=now,
        rng=random.Random(0),
        reports=[Report(replica=name, at=now, role=role) for name, role in names],  # type: ignore[arg-type]
        outstanding={"p0": 3, "d0": 9, "d1": 1, "d2": 2, "d3": 3},
        bounds=scale.Bounds(least=8, most=8),
        starting={},
        served=served,
        arrived=len(served),
    )


def lengths(prompt: int, output: int, num: int = 40) -> list[Served]:
    return [Served(20.0, 19.0, 0.5, prompt, output) for _ in range(num)]


def asked(policy: PdRatio, seen: scale.View) -> scale.Decision:
    decision = policy.decide(seen)
    scale.law(seen, decision)
    return decision


@pytest.mark.parametrize(
    ("prompt", "output", "ratio"), [(1155, 211, 0.51), (2048, 28, 5.1)], ids=["chat", "code"]
)
def test_balance_of_the_two_azure_traces_is_the_noted_one(
    prompt: int, output: int, ratio: float
) -> None:
    """n_p : n_d of the mean lengths under OPT-13B's step times: about 1:2 and 5:1 (noted from other arithmetic)."""
    policy = PdRatio(fixed_s=0.0181, token_s=1.02e-4, step_s=0.041, batch=32)
    first = policy.wanted(lengths(prompt, output), 1000)
    assert first / (1000 - first) == pytest.approx(ratio, rel=0.25)


def test_code_after_chat_flips_the_idlest_decoders() -> None:
    policy = PdRatio(step_s=0.04)
    assert asked(policy, view(lengths(2048, 28))).roles == {"d1": "prefill", "d2": "prefill"}
    assert asked(policy, view(lengths(300, 400))).roles == {"p1": "decode", "p2": "decode"}


def test_few_answers_and_lone_roles_change_nothing() -> None:
    assert not asked(PdRatio(), view(lengths(2048, 28, num=5))).roles
    assert not asked(PdRatio(), view(lengths(2048, 28), prefill=8, decode=0)).roles
    assert not asked(PdRatio(), view(lengths(9000, 2), prefill=7, decode=1)).roles


@pytest.mark.parametrize(("late_ttft", "role"), [(2.5, "prefill"), (0.2, "decode")])
def test_trends_say_which_phase_is_short(late_ttft: float, role: str) -> None:
    early = [Served(5.0, 4.0, 0.3, 500, 50) for _ in range(20)]
    late = [Served(25.0, 22.0, late_ttft, 500, 50) for _ in range(20)]
    decision = asked(PdRatio(rule="trend"), view(early + late))
    assert list(decision.roles.values()) == [role]
    steady = [Served(25.0, 24.0, 0.3, 500, 50) for _ in range(20)]
    assert not asked(PdRatio(rule="trend"), view(early + steady)).roles
