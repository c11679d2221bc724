"""Why was it slow: on logs in which the truth is known, and as a law on logs of a real replica."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from penstock.core.events import Ended, Event, Finished, Stepped
from penstock.report.causes import CAUSES, Explanation
from penstock.report.explain import Explainer
from penstock.report.lives import Pace
from penstock.report.metrics import Metrics
from tests.cluster.test_movement import script
from tests.report.events import arrived, born, completed, finished, header, played, routed, stepped


def explain(events: list[Event], *focus: str) -> dict[str, Explanation]:
    told: list[Explanation] = []
    explainer = Explainer(told.append, focus=focus)
    for event in events:
        explainer.emit(event)
    for each in told:
        assert sum(each.parts.values()) == pytest.approx(each.e2e_s, abs=1e-9)
    return {each.request: each for each in told}


def test_a_long_prompt_beside_a_decode_is_interference() -> None:
    """Decode-only steps of one answer take 10 ms; the one with the prompt of r1 in it 70 ms."""
    first, second = arrived(0.0, 0), arrived(0.125, 1, num_prompt=500)
    log: list[Event] = [
        header(), born(), first,
        stepped(0.0, 0, [(0, 100)], admitted=(0,)), completed(0, [0.1], [0]),
        stepped(0.1, 1, [(0, 1)], repeat=50), completed(1, [0.11, 0.12, 0.13], [0]), second,
        stepped(0.13, 2, [(0, 1), (1, 500)], admitted=(1,)), completed(2, [0.2], [0, 1]),
        stepped(0.2, 3, [(0, 1), (1, 1)]), completed(3, [0.215], [0, 1]),
        finished(0.215, first, num_output=6, first_at=0.1), finished(0.215, second, num_output=2, first_at=0.2),
    ]  # fmt: skip
    told = explain(log)
    one = told["r0"].parts
    assert one["prefill"] == pytest.approx(0.1)
    assert one["interference"] == pytest.approx(0.06)
    assert one["decode"] + one["batch"] == pytest.approx(0.03 + 0.01 + 0.015)
    assert one["batch"] == pytest.approx(0.005)  # two at once took 15 ms, alone it is 10
    assert told["r0"].main_cause() == "interference"
    assert told["r0"].first_parts == pytest.approx({"prefill": 0.1})
    two = told["r1"].parts
    assert two["step-boundary"] == pytest.approx(0.005)
    assert two["prefill"] == pytest.approx(0.07)
    assert "interference" not in two and told["r1"].ttft_s == pytest.approx(0.075)


def test_interference_is_measured_against_steps_of_as_many_decodes() -> None:
    """One decode takes 10 ms, two take 15 ms; two and a prompt take 65 ms: the prompt cost each of them 50 ms."""
    first, second, third = arrived(0.0, 0), arrived(0.11, 1), arrived(0.225, 2)
    log: list[Event] = [
        born(), first, stepped(0.0, 0, [(0, 100)], admitted=(0,)), completed(0, [0.1], [0]),
        stepped(0.1, 1, [(0, 1)]), completed(1, [0.11], [0]), second,
        stepped(0.11, 2, [(1, 100), (0, 1)], admitted=(1,)), completed(2, [0.21], [0, 1]),
        stepped(0.21, 3, [(0, 1), (1, 1)]), completed(3, [0.225], [0, 1]), third,
        stepped(0.225, 4, [(0, 1), (1, 1), (2, 100)], admitted=(2,)), completed(4, [0.29], [0, 1, 2]),
        finished(0.29, second, num_output=3, first_at=0.21), finished(0.29, first, num_output=5, first_at=0.1),
    ]  # fmt: skip
    told = explain(log)
    assert told["r1"].parts == pytest.approx(
        {"prefill": 0.1, "interference": 0.05, "decode": 0.02, "batch": 0.01}
    )
    assert told["r0"].parts["interference"] == pytest.approx(0.09 + 0.05)


def test_a_plan_made_ahead_waits_for_its_turn_and_is_a_decode_by_then() -> None:
    one = arrived(0.0, 0)
    log: list[Event] = [
        born(), one, stepped(0.0, 0, [(0, 100)], admitted=(0,)), stepped(0.01, 1, [(0, 1)]), completed(0, [0.1], [0]),
        stepped(0.1, 2, [(0, 1)]), completed(1, [0.12], [0]), completed(2, [0.14], [0]),
        finished(0.14, one, num_output=3, first_at=0.1),
    ]  # fmt: skip
    told = explain(log)["r0"]
    assert told.parts == pytest.approx({"prefill": 0.1, "decode": 0.04}) and told.num_steps == 2


def test_prompts_of_one_step_share_its_time_by_their_tokens() -> None:
    both = [arrived(0.0, 0, num_prompt=300), arrived(0.0, 1, num_prompt=100)]
    log: list[Event] = [
        born(), *both, stepped(0.0, 0, [(0, 300), (1, 100)], admitted=(0, 1)), completed(0, [0.4], [0, 1]),
        *(finished(0.4, each, num_output=1, first_at=0.4) for each in both),
    ]  # fmt: skip
    told = explain(log)
    assert told["r0"].parts == pytest.approx({"prefill": 0.3, "shared-prefill": 0.1})
    assert told["r1"].parts == pytest.approx({"prefill": 0.1, "shared-prefill": 0.3})


@pytest.mark.parametrize(
    ("cause", "limits", "more"),
    [
        ("queue-max-jobs", {"max_jobs": 1}, {}),
        ("queue-tokens", {"max_tokens": 100}, {}),
        ("queue-blocks", {}, {"free_blocks": 3}),  # the prompt of 100 tokens needs seven
        ("queue-blocks", {}, {"why": "waits for memory"}),
        ("queue-policy", {}, {}),
    ],
)
def test_what_bound_the_queue_is_named(
    cause: str, limits: dict[str, int], more: dict[str, object]
) -> None:
    first, second = arrived(0.0, 0), arrived(0.0, 1)
    log: list[Event] = [
        born(**limits), first, second,
        stepped(0.0, 0, [(0, 100)], admitted=(0,), num_waiting=1, **more), completed(0, [2.0], [0]),
        finished(2.0, first, num_output=1, first_at=2.0),
        stepped(2.0, 1, [(1, 100)], admitted=(1,)), completed(1, [3.0], [1]),
        finished(3.0, second, num_output=1, first_at=3.0),
    ]  # fmt: skip
    told = explain(log)["r1"]
    assert told.parts == pytest.approx({cause: 2.0, "prefill": 1.0})
    assert told.main_cause() == cause and told.ahead == 1 and told.ahead_of == ("r0",)
    assert any(CAUSES[cause] in line and "2.00 s" in line for line in told.sentences())


def test_a_preemption_costs_the_wait_and_the_recomputing() -> None:
    one = arrived(0.0, 0)
    log: list[Event] = [
        born(), one,
        stepped(0.0, 0, [(0, 100)], admitted=(0,)), completed(0, [1.0], [0]),
        stepped(1.0, 1, [(0, 1)]), completed(1, [1.5], [0]),
        stepped(1.5, None, [], evicted=(0,), num_waiting=1, free_blocks=0),
        stepped(4.0, 2, [(0, 102)], admitted=(0,)), completed(2, [5.25], [0]),
        stepped(5.25, 3, [(0, 1)]), completed(3, [5.75], [0]),
        finished(5.75, one, num_output=4, first_at=1.0, num_preemptions=1),
    ]  # fmt: skip
    told = explain(log)["r0"]
    assert told.parts == pytest.approx(
        {"prefill": 1.0, "decode": 1.0, "preempted": 2.5, "recompute": 1.25}
    )
    assert told.num_preemptions == 1 and told.main_cause() == "preempted"
    assert told.evictions == ("1.500 s after it was asked for, 0 answers stayed",)


def test_routing_counts_from_the_fleet_and_refusals_on_the_way_are_told() -> None:
    asked = arrived(0.0, 0, who="fleet")
    one = arrived(0.75, 0)
    log: list[Event] = [
        asked, routed(0.0, 0, "2 outstanding", replica="replica-9"),
        Ended(at=0.5, who="fleet", request="r0", replica="replica-9"), routed(0.5, 0, "3 outstanding"), one,
        stepped(0.75, 0, [(0, 100)], admitted=(0,)), completed(0, [1.0], [0]),
        finished(1.0, one, num_output=1, first_at=1.0),
    ]  # fmt: skip
    told = explain(log)["r0"]
    assert told.parts == pytest.approx({"routing": 0.75, "prefill": 0.25})
    assert told.why_routed == "3 outstanding" and told.e2e_s == pytest.approx(1.0)
    assert told.tries == ("replica-9: 2 outstanding", "replica-0: 3 outstanding")


def test_standing_by_while_others_prefill_is_interference_too() -> None:
    """Prefill-only steps: the decode of r0 waits for the prompt of r1."""
    first, second = arrived(0.0, 0), arrived(0.5, 1)
    log: list[Event] = [
        born(), first, stepped(0.0, 0, [(0, 100)], admitted=(0,)), completed(0, [1.0], [0]), second,
        stepped(1.0, 1, [(1, 100)], admitted=(1,)), completed(1, [3.0], [1]),
        stepped(3.25, 2, [(0, 1), (1, 1)]), completed(2, [4.0], [0, 1]),
        finished(4.0, first, num_output=2, first_at=1.0),
    ]  # fmt: skip
    told = explain(log)["r0"].parts
    assert told == pytest.approx(
        {"prefill": 1.0, "interference": 2.0, "between-steps": 0.25, "decode": 0.75}
    )


def test_who_started_meanwhile_is_told_for_requests_asked_for() -> None:
    asks = [(0.0, 8, 30), (0.001, 8, 30), (0.002, 8, 30)]
    told = explain(played(asks, max_jobs=1), "r2")["r2"]
    assert told.ahead == 1 and told.ahead_of == ("r1",) and told.overtaken_by == ("r1",)
    assert "r1" in " ".join(told.sentences())


def test_an_answer_whose_end_is_not_in_the_log_is_explained_as_far_as_it_got() -> None:
    log = [born(), arrived(0.0, 0), arrived(0.0, 1), stepped(0.0, 0, [(0, 100)], admitted=(0,), num_waiting=1),
           completed(0, [2.0], [0])]  # fmt: skip
    explainer = Explainer(lambda told: None)
    for event in log:
        explainer.emit(event)
    told = {each.request: each for each in explainer.unfinished()}
    assert told["r0"].parts == pytest.approx({"prefill": 2.0}) and told["r0"].reason == "unfinished"
    assert told["r1"].parts == pytest.approx({"queue-policy": 2.0})


def preempted_seconds(events: list[Event]) -> dict[int, float]:
    """From each eviction to the next start, counted without the explainer."""
    since: dict[int, float] = {}
    total: defaultdict[int, float] = defaultdict(float)
    for event in events:
        if isinstance(event, Stepped):
            for seq in event.admitted:
                if seq in since:
                    total[seq] += event.at - since.pop(seq)
            since.update(dict.fromkeys(event.evicted, event.at))
    return total


@pytest.mark.parametrize("batch", ["vllm-v1", "sglang"])
@pytest.mark.parametrize("seed", range(4))
def test_parts_sum_to_the_whole_on_logs_of_a_real_replica(batch: str, seed: int) -> None:
    rng = random.Random(seed)
    asks = [(rng.uniform(0, 2), rng.randint(1, 60), rng.randint(1, 60)) for _ in range(40)]
    limits = (
        {"max_jobs": 12, "max_tokens": 64}
        if batch == "vllm-v1"
        else {"max_jobs": 12, "chunk_tokens": 64}
    )
    events = played(asks, batch=batch, num_blocks=45, **limits)
    told = explain(events)
    ends = {event.request: event for event in events if isinstance(event, Finished)}
    assert told.keys() == ends.keys() and len(told) == len(asks)
    lost = preempted_seconds(events)
    assert batch == "sglang" or any(lost.values()), "the pool is small enough for preemptions"
    for name, each in told.items():
        end = ends[name]
        assert (
            end.first_token_at is not None
            and end.admitted_at is not None
            and each.ttft_s is not None
        )
        assert each.ttft_s == pytest.approx(end.first_token_at - end.arrived_at, abs=1e-9)
        assert all(value > 0 for value in each.parts.values())
        assert each.parts.get("preempted", 0.0) == pytest.approx(
            lost.get(int(name[1:]), 0.0), abs=1e-9
        )
        waited = sum(
            value for cause, value in each.parts.items() if cause.startswith(("queue", "step-"))
        )
        assert waited == pytest.approx(end.admitted_at - end.arrived_at, abs=1e-9)
        assert ("recompute" in each.parts) == (end.num_preemptions > 0)


def test_nothing_is_kept_of_what_has_ended() -> None:
    explainer = Explainer(lambda told: None)
    for event in played([(0.01 * i, 8, 8) for i in range(30)], max_jobs=4):
        explainer.emit(event)
    watched = explainer._replicas["replica-0"]
    assert not (
        watched.lives
        or watched.by_request
        or watched.waiting
        or watched.prefilling
        or watched.flights
    )


def test_the_pace_between_batch_sizes_is_a_straight_line() -> None:
    pace = Pace()
    assert pace.at(3) is None
    pace.add(2, 10, 1.0)
    pace.add(6, 1, 0.5)
    assert (
        pace.at(1) == pytest.approx(0.1)
        and pace.at(4) == pytest.approx(0.3)
        and pace.at(9) == pytest.approx(0.5)
    )


def test_the_life_of_a_request_goes_on_at_another_replica() -> None:
    """In a fleet in virtual time: as long as the fleet saw it, first token included, and told once."""
    world = script(0, 60, kills=True)
    told: list[Explanation] = []
    explainer, metrics = Explainer(told.append), Metrics()
    for event in world.log.events:
        explainer.emit(event)
        metrics.emit(event)
    ended = {event.request: event for event in world.log.events if isinstance(event, Finished)}
    came = [each for each in told if "elsewhere" in each.parts and each.first_parts]
    assert len(came) > 3
    for each in told:
        assert sum(each.parts.values()) == pytest.approx(each.e2e_s, abs=1e-9)
    for each in came:
        assert sum(each.parts.values()) == pytest.approx(each.e2e_s, abs=1e-9)
        first_at = ended[each.request].first_token_at
        assert first_at is not None and each.ttft_s is not None
        assert each.offered_at + each.ttft_s == pytest.approx(first_at, abs=1e-6)
    assert metrics.figures().all.num_offered == len(world.asked)
