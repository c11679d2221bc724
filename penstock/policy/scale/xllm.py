"""Replicas change between computing prompts and writing answers, as soon as one side keeps its promise no longer.

Source: xLLM (JD, 2025; report arXiv:2510.14686, policy "slo_aware_policy" of jd-opensource/xllm-service).

Idea: a replica can do either at any moment, so a change costs nothing but what it has begun. Both numbers of replicas
follow the promises. With n_p and n_d replicas:

    p -> d    no d keeps fill * tpot_s with one more request, and the mean queue of the p is below
              ttft_s (n_p - 1) / n_p, or n_d < n_p: the p with the shortest queue
    d -> p    a d has no request, and the mean queue of the p is above `share` of ttft_s: that one
    floors    `least_prefill`, `least_decode` (the report: 2 of the latter)

Parameters: the promises `ttft_s` and `tpot_s`, `fill` (1.0: a change comes only when the promise itself is
out of reach, while route xllm packs replicas less than that), `share` (0.5), the floors, `every_s` between looks. With
0.8 and 0.2 too many became decode replicas, and none of them was ever idle again.

Where we differ: the source looks at each request it dispatches, here it is as often as replicas report. An idle decode
replica there may turn at once; here somebody must need it. A request more is one of the mean length there.

Does not: bring up or put out replicas, or encode (which is a role of its own in the source).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from penstock.core.types import Report, Role
from penstock.policy.loads import NOTHING_SENT, foreseen_tpot_s, has_room, queue_s
from penstock.policy.scale import Decision, View

USUAL_TOKENS = 1024  # of a request, where nobody decodes


@dataclass(slots=True)
class Xllm:
    needs_cost: ClassVar[bool] = True
    ttft_s: float = 1.0
    tpot_s: float = 0.05
    fill: float = 1.0
    share: float = 0.5
    least_prefill: int = 1
    least_decode: int = 1
    every_s: float = 0.1
    _roles: dict[str, Role] = field(init=False, default_factory=dict, repr=False)  # as changed here

    def __post_init__(self) -> None:
        if not min(self.ttft_s, self.tpot_s, self.every_s) > 0:
            raise ValueError("ttft_s, tpot_s and every_s must be positive seconds")
        if not 0 <= self.share <= 1 or not 0 < self.fill <= 1:
            raise ValueError("share must be from 0 to 1, and fill above 0 and at most 1")
        if min(self.least_prefill, self.least_decode) < 1:
            raise ValueError("least_prefill and least_decode must be at least 1")

    def decide(self, view: View) -> Decision:
        active = [each for each in view.active() if not each.is_suspect]
        prefill = [each for each in active if self._role(each) == "prefill"]
        decode = [each for each in active if self._role(each) == "decode"]
        if view.cost is None or not prefill or not decode:
            return Decision()
        waits = {each.replica: queue_s(each, NOTHING_SENT, view.token_s) for each in prefill}
        mean_s = sum(waits.values()) / len(waits)
        few, many = len(prefill), len(decode)
        if few > self.least_prefill and not self._keeps_pace(view, decode):
            if mean_s < self.ttft_s * (few - 1) / few or many < few:
                chosen = min(waits, key=lambda name: (waits[name], name))
                return self._turn(chosen, "decode", f"{many} cannot keep {self.tpot_s:g} s a token")
            return Decision()
        idle = [each.replica for each in decode if _is_idle(view, each)]
        if idle and many > self.least_decode and mean_s > self.share * self.ttft_s:
            return self._turn(idle[-1], "prefill", f"prompts wait {mean_s:.2f} s")
        return Decision()

    def _role(self, report: Report) -> Role:
        """Reports may be older than the last change."""
        return self._roles.get(report.replica, report.role)

    def _turn(self, replica: str, role: Role, why: str) -> Decision:
        self._roles[replica] = role
        return Decision(roles={replica: role}, why=why)

    def _keeps_pace(self, view: View, decode: Sequence[Report]) -> bool:
        """Whether some replica could write one answer more."""
        assert view.cost is not None
        jobs = sum(each.num_decoding for each in decode)
        usual = sum(each.decode_tokens for each in decode) // jobs if jobs else USUAL_TOKENS
        for each in decode:
            under_way = view.outstanding.get(each.replica, 0)
            tpot_s = foreseen_tpot_s(each, view.cost, usual, under_way)
            if tpot_s <= self.fill * self.tpot_s and has_room(each, usual, under_way):
                return True
        return False


def _is_idle(view: View, report: Report) -> bool:
    return not (
        view.outstanding.get(report.replica, 0) or report.num_running or report.num_waiting
    ) and not (report.moving_in or report.moving_out)
