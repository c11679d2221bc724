"""A load that is kept is what it would be if everything were looked at anew, and is asked no oftener than it must."""

from __future__ import annotations

import random

import pytest

from penstock.core.types import Report
from penstock.policy.kept_loads import KeptLoads
from penstock.policy.loads import NOTHING_SENT, Sent, num_waiting, pending_tokens


def report_of(name: str, waiting: int) -> Report:
    return Report(replica=name, at=0.0, num_waiting=waiting, waiting_tokens=10 * waiting)


class Counted:
    """A load that counts how often it is asked, and of whom."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, report: Report, sent: Sent) -> int:
        self.asked.append(report.replica)
        return num_waiting(report, sent)


def test_only_what_changed_is_asked_again() -> None:
    load, sent, stale = Counted(), {"b": Sent(2, 30, 4)}, set[str]()
    kept = KeptLoads([report_of(name, 1) for name in "abc"], sent, stale)
    assert kept.of(load) == [1, 3, 1] and load.asked == ["a", "b", "c"]
    assert kept.of(load) == [1, 3, 1] and load.asked == ["a", "b", "c"]
    kept.hear(report_of("c", 7))
    sent["a"] = Sent(1, 5, 1)
    stale.update(("a", "a stranger"))
    assert kept.of(load) == [2, 3, 7] and sorted(load.asked[3:]) == ["a", "c"]
    assert (
        [each.num_waiting for each in kept.able]
        == [1, 1, 7]
        == [kept.by_name[name].num_waiting for name in kept.names]
    )
    assert not stale and kept.of(pending_tokens) == [15, 40, 70]
    kept.check()


@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_with_looking_anew(seed: int) -> None:
    chance, sent, stale, names = random.Random(seed), dict[str, Sent](), set[str](), "abcdef"
    kept = KeptLoads([report_of(name, 0) for name in names], sent, stale)
    for _ in range(200):
        name = chance.choice(names)
        if chance.random() < 0.5:
            kept.hear(report_of(name, chance.randrange(9)))
        else:
            sent[name] = Sent(chance.randrange(5), chance.randrange(900), 0)
            stale.add(name)
        load = chance.choice((num_waiting, pending_tokens))
        assert kept.of(load) == [
            load(each, sent.get(each.replica, NOTHING_SENT)) for each in kept.able
        ]


def test_a_load_that_nobody_said_had_changed_is_found() -> None:
    sent = {"a": Sent(1, 1, 1)}
    kept = KeptLoads([report_of("a", 1)], sent, set())
    assert kept.of(num_waiting) == [2]
    sent["a"].num = 5
    with pytest.raises(AssertionError, match="num_waiting"):
        kept.check()
