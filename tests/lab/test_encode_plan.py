"""`penstock plan images`: numbers in proportion to the work, and each placement on the traffic."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.__main__ import run
from penstock.assemble import load_config
from penstock.core.errors import BadConfig, BadTrace
from penstock.lab.encode_budgets import Budgets
from penstock.lab.encode_plan import (
    AskedFor,
    Needs,
    _Trials,
    placements_of,
    plan_images,
    split,
    text_of,
)

DEPLOY = """
[net]
kv_bytes_per_s = 2e11
[[fleet]]
model = "qwen2-7b"
replicas = 3
executor = {gpu = "a100-80g"%s}
cache = {prefix = false}
policy = {route = "least", route_decode = "least"}
"""
SHOWN = """
num_requests = 100
[arrivals]
kind = "poisson"
rate_per_s = 1.0
[lengths]
kind = "fixed"
prompt = 30
output = 30
"""
IMAGES = """
[images]
tokens = 900
"""
TOWER = ', vision = "qwen2-vl"'


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    deploy, shown = tmp_path / "deploy.toml", tmp_path / "shown.toml"
    deploy.write_text(DEPLOY % TOWER)
    shown.write_text(SHOWN + IMAGES)
    return deploy, shown


@settings(max_examples=50)
@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=3), st.integers(3, 16))
def test_no_stage_has_much_more_to_do_than_another(needs: list[float], replicas: int) -> None:
    told = {str(place): need for place, need in enumerate(needs)}
    found = split(told, replicas)
    assert sum(found.values()) == replicas and min(found.values()) >= 1
    most = max(told[role] / found[role] for role in told)
    for role, count in found.items():  # moving one of it away would not help
        if count > 1:
            assert told[role] / (count - 1) >= most * (1 - 1e-9) or told[role] / count < most


def test_placements_by_what_the_stages_take() -> None:
    needs = Needs(e=0.03, p=0.04, d=0.01)
    assert placements_of(needs, 8) == {
        "EP-D": {"prefill": 7, "decode": 1},
        "ED-P": {"encode-decode": 4, "prefill": 4},
        "E-P-D": {"encode": 3, "prefill": 4, "decode": 1},
    }
    assert "E-P-D" not in placements_of(needs, 2)


def test_a_plan_tries_all_and_says_what_to_take(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    deploy, shown = files
    line = ["plan", "images", str(deploy), "--trace", str(shown), "--ttft", "1", "--tpot", "0.03"]
    assert run([*line, "--requests", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told["tried"]] and len(told["tried"]) == 4
    rates = [each["rate_per_s"] for each in told["tried"]]
    assert min(rates) > 0 and all(one >= other for one, other in pairwise(rates))
    assert told["bounds"]["max_images"] == 1 and told["needs"]["e"] == pytest.approx(
        0.0366, rel=0.1
    )


def test_without_a_tower_or_images_there_is_nothing_to_plan(files: tuple[Path, Path]) -> None:
    deploy, shown = files
    shown.write_text(SHOWN)
    asked = AskedFor(trace=shown, ttft_s=1.0, tpot_s=0.05)
    with pytest.raises(BadTrace, match="nobody shows an image"):
        plan_images(load_config(deploy), asked)
    deploy.write_text(DEPLOY % "")
    with pytest.raises(BadConfig, match="executor.vision"):
        plan_images(load_config(deploy), asked)


def test_whoever_is_refused_is_not_served_in_time(files: tuple[Path, Path]) -> None:
    """One request at a time is let in: those who are keep their promises, but unless they come rarely most are not.

    One takes about 0.7 s; of Poisson arrivals 90 % find nobody there at a rate of 0.1 / 0.7 s.
    """
    deploy, shown = files
    text = (DEPLOY % TOWER).replace("replicas = 3", "replicas = 3\nmax_outstanding = 1")
    deploy.write_text(text)
    asked = AskedFor(trace=shown, ttft_s=1.0, tpot_s=0.03, num=60)
    found = plan_images(load_config(deploy), asked)
    expected = 3 / found.needs.of("epd")  # a second
    assert all(0 < each.rate_per_s < expected / 10 for each in found.tried)
    assert "take" in text_of(found)


def test_promises_that_a_request_alone_cannot_keep(files: tuple[Path, Path]) -> None:
    deploy, shown = files
    asked = AskedFor(trace=shown, ttft_s=1e-3, tpot_s=0.05, num=8)
    found = plan_images(load_config(deploy), asked)
    assert [each.rate_per_s for each in found.tried] == [0.0] * 4
    assert "none keeps both promises" in text_of(found) and "roles =" not in text_of(found)


def test_more_than_was_expected_is_found(files: tuple[Path, Path]) -> None:
    """Three replicas serve some 25 a second, and 1 is expected."""
    deploy, shown = files
    asked = AskedFor(trace=shown, ttft_s=1.0, tpot_s=0.05, num=30)
    bounds = Budgets(max_tokens=1024, max_images=1)
    trials = _Trials(load_config(deploy), asked, bounds, 1.0, lambda name, tries: None)
    assert trials.highest("together", None) > 3.0


def test_replicas_of_a_plan_are_all_alike(files: tuple[Path, Path]) -> None:
    deploy, shown = files
    apart = "roles = {prefill = 2, decode = 1}\nhand_off = {degrees = {prefill = 2}}"
    deploy.write_text((DEPLOY % TOWER).replace("replicas = 3", f"replicas = 3\n{apart}"))
    with pytest.raises(BadConfig, match="all alike"):
        plan_images(load_config(deploy), AskedFor(trace=shown, ttft_s=1.0, tpot_s=0.05))
