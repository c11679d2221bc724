"""The scalars of load on hand-worked reports, and the phases' fit against the model it was made from."""

from __future__ import annotations

from math import inf

import pytest

from penstock.core.types import Report
from penstock.cost.linear_five import linear_five
from penstock.cost.phases import phases_of
from penstock.policy import loads
from penstock.policy.loads import NOTHING_SENT, Sent

REPORT = Report(
    replica="a", at=0.0, block_size=16, total_blocks=100, free_blocks=40, num_running=6, num_waiting=3,
    waiting_tokens=320, cached_tokens=64, prefill_tokens=80, waiting_blocks=20, head_blocks=8, num_decoding=5,
    decode_tokens=900,
)  # fmt: skip
SENT = Sent(num=1, tokens=100, blocks=10)


def test_scalars() -> None:
    assert loads.pending_tokens(REPORT) == 320 - 64 + 80
    assert loads.pending_tokens(REPORT, SENT) == 436
    assert loads.miss_plus_pending(REPORT, SENT, 200, 150) == 486
    assert loads.queue_s(REPORT, SENT, 0.01) == pytest.approx(4.36)
    assert loads.queue_s(REPORT, SENT, 0.01, elapsed_s=3.0) == pytest.approx(1.36)
    assert loads.queue_s(REPORT, SENT, 0.01, elapsed_s=9.0) == pytest.approx(1.0)
    assert loads.kv_ratio(REPORT) == pytest.approx((60 + 20) / 100)
    assert loads.kv_ratio(REPORT, SENT) == pytest.approx(0.9)
    assert loads.kv_ratio_projected(REPORT, SENT) == pytest.approx((60 + 20 - 4 + 5 + 10) / 100)
    assert loads.neg_freeness(REPORT) == pytest.approx(-(40 - 8 - 5) / 7)
    assert loads.neg_freeness(REPORT, urgent_blocks=80) == loads.neg_freeness(REPORT)
    REPORT.num_urgent = 1
    assert loads.neg_freeness(REPORT, urgent_blocks=80) == pytest.approx(-1.0)
    assert loads.neg_freeness(REPORT, urgent_blocks=200) == loads.neg_freeness(REPORT)
    REPORT.num_urgent = 0
    assert loads.neg_steps(REPORT, SENT) == pytest.approx(-(40 - 20 - 10) / 10)
    assert loads.neg_steps(Report(replica="b", at=0.0)) == -inf
    assert loads.kv_ratio(Report(replica="b", at=0.0), NOTHING_SENT) == 0.0
    assert loads.neg_freeness(Report(replica="b", at=0.0, is_draining=True)) == inf
    assert [loads.adaptive_decode(jobs) for jobs in (0, 1, 127, 128, 200)] == [
        128,
        127,
        1,
        128,
        200,
    ]


def test_the_phases_of_a_quadratic_model_are_its_own_numbers() -> None:
    """DistServe's published fit of OPT-13B, in seconds: 18.1 ms, 0.1019 ms a token, 7.122e-6 ms a pair."""
    found = phases_of(linear_five("distserve", "opt-13b", 1, num_layers=40))
    fixed, each, pair = found.prefill
    assert each == pytest.approx(0.1019e-3, rel=0.01) and pair == pytest.approx(7.122e-9, rel=0.01)
    assert fixed == pytest.approx(18.1e-3 + 2e-3, rel=0.05)  # and the step's own 2 ms
    cold, warm = found.prefill_s(8000), found.prefill_s(2000, 6000)
    assert cold == pytest.approx(0.0201 + 0.8152 + 0.4558, rel=0.01)
    assert warm == pytest.approx(0.0201 + 0.2038 + 7.122e-9 * (8000**2 - 6000**2), rel=0.02)
    assert found.decode_s(32, 32 * 1000) == pytest.approx(0.0415, rel=0.25)
