"""The better of two replicas drawn at random.

Source: M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001;
`power_of_two` of the SGLang router.

Idea: with one random choice the fullest of n replicas holds about ln n / ln ln n times the mean, with two only about
ln ln n / ln 2 above it. Two looks are enough, and two routers with the same stale view do not stampede to one place.

    load(replica) = outstanding + reported waiting       the first drawn wins a tie

Parameters: none.

Where we differ: SGLang compares token loads when both replicas told them; we always compare requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.types import Report
from penstock.policy.route import Decision, View


@dataclass(slots=True)
class PowerOfTwo:
    def decide(self, view: View) -> Decision:
        able = view.candidates()
        if not able:
            return Decision(None, "no replica can take it")
        if len(able) == 1:
            return Decision(able[0].replica, "the only one")
        first = view.rng.randrange(len(able))
        second = view.rng.randrange(len(able) - 1)
        second += second >= first

        def load(report: Report) -> int:
            return view.outstanding.get(report.replica, 0) + report.num_waiting

        one, other = able[first], able[second]
        chosen, left = (one, other) if load(one) <= load(other) else (other, one)
        return Decision(chosen.replica, f"{load(chosen)} against {load(left)} at {left.replica}")
