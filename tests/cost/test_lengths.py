"""Recent lengths: conditional quantiles by hand, and against the definition."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Job, Request, RequestId, Slo
from penstock.cost.lengths import RecentLengths


def job(num_output: int = 0, max_tokens: int = 1000) -> Job:
    request = Request(id=RequestId("r"), model="m", prompt=TracedPrompt(5))
    return Job(
        seq=0, request=request, answer=0, arrived_at=0.0, hashes=[], num_prompt=5,
        max_tokens=max_tokens, num_output=num_output,
    )  # fmt: skip


def learned(*lengths: int, window: int = 1000) -> RecentLengths:
    found = RecentLengths(window=window, enough=1)
    for length in lengths:
        found.add(length)
    return found


def test_before_enough_was_seen_the_cap_is_the_estimate() -> None:
    lengths = RecentLengths(enough=3)
    lengths.add(5)
    lengths.add(5)
    assert (
        lengths.quantile(job(max_tokens=77), 0.5) == 77 == lengths.sample(job(max_tokens=77), 0.5)
    )
    lengths.add(5)
    assert lengths.quantile(job(max_tokens=77), 0.5) == 5


def test_conditional_quantiles_by_hand() -> None:
    lengths = learned(10, 20, 30, 40)
    assert [lengths.quantile(job(), q) for q in (0.0, 0.25, 0.26, 0.5, 1.0)] == [10, 10, 20, 20, 40]
    assert lengths.quantile(job(num_output=20), 0.5) == 30
    assert lengths.quantile(job(num_output=40, max_tokens=99), 0.5) == 99  # longer than all
    assert lengths.quantile(job(max_tokens=15), 0.9) == 15


def test_the_window_forgets() -> None:
    assert learned(1, 1, 1, 50, 60, window=2).quantile(job(), 0.5) == 50


def test_only_answers_that_ended_by_themselves_teach() -> None:
    lengths = RecentLengths(enough=1)
    ended = Finished(
        at=1.0, who="w", request="r", answer=0, reason="cancelled", arrived_at=0.0, admitted_at=None,
        first_token_at=None, last_token_at=None, num_prompt=1, num_cached=0, num_output=3,
        num_preemptions=0, tenant="t", priority=0, slo=Slo(),
    )  # fmt: skip
    lengths.observe(ended)
    assert lengths.quantile(job(), 0.5) == 1000
    lengths.observe(replace(ended, reason="stop"))
    assert lengths.quantile(job(), 0.5) == 3


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(0, 60),
    st.floats(0, 1, exclude_max=True),
)
def test_the_quantile_is_the_smallest_length_with_enough_below(
    seen: list[int], num_output: int, q: float
) -> None:
    lengths, asked = learned(*seen), job(num_output)
    longer = sorted(length for length in seen if length > num_output)
    found = lengths.quantile(asked, q)
    if not longer:
        assert found == 1000 == lengths.sample(asked, q)
        return
    covered = sum(length <= found for length in longer)
    below = sum(length < found for length in longer)
    assert covered >= q * len(longer) and (below < q * len(longer) or below == 0)
    assert lengths.sample(asked, q) == longer[int(q * len(longer))]
