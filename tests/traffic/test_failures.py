"""Failing and impatient callers: how many, when, and what becomes of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import BadConfig
from penstock.core.types import Request
from penstock.traffic import Workflow
from penstock.traffic.failures import BURST_REASON, REASON, Failures, Faults
from penstock.traffic.rows import Drop, Flow, Row
from penstock.traffic.statistics import dispersion
from tests.traffic.written_workloads import FIXED, POISSON, opened, workflows_of


def within(count: int, num: int, share: float) -> bool:
    return abs(count - num * share) < 3.5 * math.sqrt(num * share * (1 - share))


def test_a_steady_share_is_dropped_with_its_reason(tmp_path: Path) -> None:
    trace = opened(tmp_path, f"num_requests = 5000\n{POISSON}{FIXED}failures = {{share = 0.1}}")
    assert len(list(trace)) == 5000
    assert trace.meta.drops.keys() == {REASON}
    assert within(trace.meta.drops[REASON], trace.meta.rows_read, 0.1)


def test_failures_cluster_in_bursts() -> None:
    failures = Failures(share=0.01, burst_every_s=900.0, burst_lasts_s=100.0, burst_share=0.9)
    faults = Faults(failures, seed=1, owner="test", where="failures")
    failed: dict[str, list[float]] = {REASON: [], BURST_REASON: []}
    num = 200_000
    for at_s in np.arange(num) * 0.5:
        found = faults.befall(Row(float(at_s), 10, 10))
        if isinstance(found, Drop):
            failed[found.reason].append(float(at_s))
    # In a burst for 100 of every 1000 s in the mean.
    share = len(failed[BURST_REASON]) / num / 0.9
    assert abs(share - 0.1) < 0.035
    assert dispersion(failed[BURST_REASON], 60.0) > 20
    assert dispersion(failed[REASON], 60.0) < 2


def test_failing_callers_may_be_sent_and_cut_short(tmp_path: Path) -> None:
    text = f"num_requests = 2000\n{POISSON}{FIXED}failures = {{share = 0.2, become = 'abandoned', failing_s = 0.5}}"
    trace = opened(tmp_path, text)
    flows = workflows_of(trace)
    assert not trace.meta.drops and within(len(flows), 2000, 0.2)
    assert {flow.kind for flow in flows} == {"call"} and {len(flow) for flow in flows} == {1}
    assert {flow.calls[0].abandon_s for flow in flows} == {0.5}
    assert {flow.calls[0].request.program for flow in flows} == {None}


def test_patience_is_drawn_for_every_impatient_call(tmp_path: Path) -> None:
    text = (
        f"num_requests = 6000\n{POISSON}{FIXED}"
        'failures = {impatient = 0.5, patience_s = {kind = "exponential", mean = 8.0}}'
    )
    items = [item for _, item in opened(tmp_path, text)]
    patience = [item.calls[0].abandon_s for item in items if isinstance(item, Workflow)]
    assert within(len(patience), 6000, 0.5)
    assert sum(isinstance(item, Request) for item in items) == 6000 - len(patience)
    assert np.mean(patience) == pytest.approx(8.0, rel=4 / math.sqrt(3000))


def test_a_conversation_may_end_at_any_turn(tmp_path: Path) -> None:
    text = f"num_requests = 300\n{POISSON}{FIXED}sessions = {{turns = 3}}\nfailures = {{patience_s = 5.0}}"
    for flow in workflows_of(opened(tmp_path, text)):
        assert [call.abandon_s for call in flow.calls] == [5.0] * 3


def test_failures_leave_the_other_draws_alone(tmp_path: Path) -> None:
    text = f"duration_s = 300\n{POISSON}{FIXED}"
    whole = [at_s for at_s, _ in opened(tmp_path, text)]
    rest = [at_s for at_s, _ in opened(tmp_path, text + "failures = {share = 0.3}")]
    assert set(rest) < set(whole)


def test_a_flow_fails_as_one() -> None:
    faults = Faults(Failures(share=1 - 1e-12), seed=0, owner="t", where="f")
    found = faults.befall(Flow(0.0, "session", ()))
    assert found == Drop(REASON)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("share = 2", "share must be from 0 to 1"),
        ("share = 1", "every call fails"),
        ("burst_every_s = 0", "burst_every_s must be positive"),
        ("become = 'lost'", "must be one of"),
        ("patience_s = -1", "must not be negative"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        opened(tmp_path, f"num_requests = 3\n{POISSON}{FIXED}failures = {{{text}}}")
