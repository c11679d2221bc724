"""Which moves may begin: every rule on its own, and what holds of any choice."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.arbiter import MoveRules, Refused, sift
from penstock.core.types import Report, RequestId
from penstock.policy.move import Move, MoveMode

NAMES = "abcd"


def move(request: str, source: str, target: str, mode: MoveMode = "live") -> Move:
    return Move(RequestId(request), source, target, mode)


def judge(
    *moves: Move,
    under_way: tuple[tuple[str, str], ...] = (),
    moved_at: dict[str, float] | None = None,
    rules: MoveRules | None = None,
    reported_at: float = 100.0,
) -> tuple[list[Move], list[Refused]]:
    return sift(
        moves,
        now=100.0,
        reports={name: Report(replica=name, at=reported_at) for name in NAMES},
        under_way=under_way,
        moved_at=moved_at or {},
        rules=rules or MoveRules(),
    )


def test_two_do_not_swap_and_nobody_gives_and_takes_at_once() -> None:
    there, back = move("1", "a", "b"), move("2", "b", "a")
    assert judge(there, back) == ([there], [(back, "pair")])
    onwards = move("2", "b", "c")
    assert judge(there, onwards) == ([there], [(onwards, "side")])
    assert judge(onwards, under_way=(("a", "b"),)) == ([], [(onwards, "side")])


def test_slots_count_what_is_under_way() -> None:
    second = move("2", "a", "c")
    assert judge(second, under_way=(("a", "b"),)) == ([], [(second, "slots")])
    assert judge(second, under_way=(("a", "b"),), rules=MoveRules(slots=2)) == ([second], [])


def test_queued_requests_move_freely_as_nothing_is_copied() -> None:
    moves = [
        move("1", "a", "b", "queued"),
        move("2", "b", "a", "queued"),
        move("3", "a", "c", "queued"),
    ]
    assert judge(*moves, under_way=(("a", "d"),)) == (moves, [])


def test_stale_reports_and_requests_that_just_moved() -> None:
    one = move("1", "a", "b")
    assert judge(one, reported_at=30.0) == ([], [(one, "stale")])
    rules = MoveRules(cooldown_s=5.0)
    assert judge(one, moved_at={"1": 96.0}, rules=rules) == ([], [(one, "cooldown")])
    assert judge(one, moved_at={"1": 95.0}, rules=rules) == ([one], [])


@pytest.mark.parametrize("field", [{"slots": 0}, {"stale_s": 0.0}, {"cooldown_s": -1.0}])
def test_rules_that_make_no_sense_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        MoveRules(**field)  # type: ignore[arg-type]


pairs = st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)).filter(
    lambda two: two[0] != two[1]
)


@settings(max_examples=200, deadline=None)
@given(wanted=st.lists(pairs, max_size=12), slots=st.integers(1, 3))
def test_any_choice_keeps_the_rules_and_loses_no_move(
    wanted: list[tuple[str, str]], slots: int
) -> None:
    moves = [move(str(place), *pair) for place, pair in enumerate(wanted)]
    kept, refused = judge(*moves, rules=MoveRules(slots=slots))
    assert sorted(map(str, [*kept, *(each for each, _ in refused)])) == sorted(map(str, moves))
    sources, targets = {each.source for each in kept}, {each.target for each in kept}
    assert not sources & targets
    held = Counter(name for each in kept for name in (each.source, each.target))
    assert all(count <= slots for count in held.values())
    assert not moves or kept  # the first one is free to go
