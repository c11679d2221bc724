"""Closed-loop clients: how many ask at once, what they count, and what becomes of those that do not wait."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from penstock.assemble import Config
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab import clients
from penstock.lab.clients import TRIES, Attempt, Promise, figures_of, serve_clients
from penstock.lab.simulate import simulate
from penstock.lab.trial import deployment
from penstock.traffic import TraceMeta

PATIENT = Promise(ttft_s=1e6, gap_s=1e6)


@dataclass
class Lot:
    """All at once, for `simulate`."""

    num: int = 40
    meta: TraceMeta = field(default_factory=lambda: TraceMeta("lot", "drawn"))

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        rng = random.Random(4)
        for place in range(self.num):
            yield (
                0.0,
                Request(
                    id=RequestId(f"r{place}"),
                    model="default",
                    prompt=TracedPrompt(rng.randrange(20, 300)),
                    sampling=Sampling(max_tokens=200),
                    true_output=rng.randrange(5, 200)
                    if place
                    else 199,  # the first is among the last
                ),
            )

    def requests(self) -> list[Request]:
        return [request for _, request in self]


def config_of(num_blocks: int, **policy: Any) -> Config:
    return deployment(policy, cache__num_blocks=num_blocks, cache__prefix=False)


def attempts_of(monkeypatch: pytest.MonkeyPatch, config: Config, lot: Lot, **more: Any) -> Any:
    """(figures, attempts) of a run."""
    kept: list[Attempt] = []

    def keep(attempts: list[Attempt], promise: Promise) -> dict[str, object]:
        kept.extend(attempts)
        return figures_of(attempts, promise)

    monkeypatch.setattr(clients, "figures_of", keep)
    return serve_clients(config, lot.requests(), **more), kept


def test_with_a_client_for_each_it_is_the_open_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The account of `simulate`, which has nothing to do with this one, finds the same gaps, waits and evictions."""
    lot, config = Lot(), config_of(200)
    figures, attempts = attempts_of(monkeypatch, config, lot, num_clients=lot.num, promise=PATIENT)
    theirs = simulate(config, lot).figures
    assert theirs.all.num_preemptions > 5
    assert figures["evictions"] == pytest.approx(100 * theirs.all.num_preemptions / lot.num)
    assert figures["duration_s"] == pytest.approx(theirs.duration_s)
    assert max(one.longest_gap_s for one in attempts) == pytest.approx(theirs.all.itl_s.max)
    waits = [one.first_at - one.at for one in attempts]
    assert max(waits) == pytest.approx(theirs.all.ttft_s.max)
    assert sum(waits) / len(waits) == pytest.approx(theirs.all.ttft_s.mean)
    assert figures["goodput_tokens_per_s"] == figures["tokens_per_s"]
    assert figures["first_in_time"] == figures["gaps_in_time"] == 1.0


@pytest.mark.parametrize("num_clients", [1, 3])
def test_so_many_are_asked_for_at_once_and_no_more(
    num_clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lot = Lot(12)
    figures, attempts = attempts_of(
        monkeypatch, config_of(1000), lot, num_clients=num_clients, promise=PATIENT
    )
    assert figures["num_finished"] == figures["num_attempts"] == 12
    assert [one.num_output for one in attempts] == [each.true_output for each in lot.requests()]
    for one in attempts:
        assert one.at < one.first_at <= one.last_at == one.ended_at
    for one in attempts[num_clients:]:
        busy = sum(other.at <= one.at < other.ended_at for other in attempts)
        assert busy == num_clients
        assert any(other.ended_at == pytest.approx(one.at) for other in attempts)


def test_whoever_does_not_wait_asks_again_and_then_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    figures, attempts = attempts_of(
        monkeypatch,
        config_of(1000),
        Lot(3),
        num_clients=2,
        promise=Promise(ttft_s=1e-6, gap_s=1.0),
        is_strict=True,
    )
    assert figures["num_attempts"] == 3 * TRIES and figures["num_finished"] == 0
    assert figures["goodput_tokens_per_s"] == 0 == figures["first_in_time"]
    assert [one.number for one in attempts[:6]] == [1, 1, 1, 2, 2, 2]  # at the end of the queue


def test_a_gap_that_is_too_long_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evicted wait longest: strict callers cancel just those, when the bound is reached and not later."""
    lot = Lot()
    _, waited = attempts_of(monkeypatch, config_of(200), lot, num_clients=lot.num, promise=PATIENT)
    bound = 0.7 * max(one.longest_gap_s for one in waited)
    promise = Promise(ttft_s=1e6, gap_s=bound)
    late = [one for one in waited if one.longest_gap_s > bound]
    patient = figures_of(waited, promise)
    assert late and all(one.num_evictions for one in late)
    assert patient["gaps_in_time"] == pytest.approx(1 - len(late) / lot.num)
    strict, tried = attempts_of(
        monkeypatch, config_of(200), lot, num_clients=lot.num, promise=promise, is_strict=True
    )
    cancelled = [one for one in tried if one.is_cancelled]
    assert cancelled and strict["num_finished"] == lot.num
    for one in cancelled:
        assert one.last_at + bound == pytest.approx(one.ended_at, abs=0.05)
    assert strict["goodput_tokens_per_s"] == strict["tokens_per_s"]
    written = sum(one.num_output for one in tried)
    lost = sum(one.num_output for one in cancelled)
    assert strict["wasted_share"] == pytest.approx(lost / written)
