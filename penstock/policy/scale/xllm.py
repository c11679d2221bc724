"""Replicas change between computing prompts and writing answers, or images, as soon as a side falls behind.

Source: xLLM (JD, 2025; report arXiv:2510.14686, policy "slo_aware_policy" of jd-opensource/xllm-service).

Idea: a replica can do either at any moment, so a change costs nothing but what it has begun. Both numbers of replicas
follow the promises. With n_p and n_d replicas:

    p -> d    no d keeps fill * tpot_s with one more request, and the mean queue of the p is below
              ttft_s (n_p - 1) / n_p, or n_d < n_p: the p with the shortest queue
    d -> p    a d has no request, and the mean queue of the p is above `share` of ttft_s: that one
    floors    `least_prefill`, `least_decode` (the report: 2 of the latter)

Where some replicas encode images (role "encode"), whose mean queue is image tokens * image_token_s:

    d, p -> e   it is above `share` of ttft_s: a d without a request, or the p with the shortest queue if the mean
                queue of the other p stays below `share` of ttft_s
    e -> p, d   an e without a request goes before others where the rules above turn one
    floor       `least_encode`

Parameters: the promises `ttft_s` and `tpot_s`, `fill` (1.0: a change comes only when the promise itself is
out of reach, while route xllm packs replicas less than that), `share` (0.5), the floors, `image_token_s` (4e-5:
Qwen2-VL's tower on an A100 by cost.vision), `every_s` between looks. With fill 0.8 and share 0.2 too many became decode
replicas, and none of them was ever idle again.

Where we differ: the source looks at each request it dispatches, here it is as often as replicas report. An idle decode
replica there may turn at once; here somebody must need it. A request more is one of the mean length there. The source
published no rule for the third role: what is above is ours.

Does not: bring up or put out replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    least_encode: int = 1
    image_token_s: float = 4e-5
    every_s: float = 0.1
    _roles: dict[str, Role] = field(init=False, default_factory=dict, repr=False)  # as changed here

    def __post_init__(self) -> None:
        if not min(self.ttft_s, self.tpot_s, self.every_s, self.image_token_s) > 0:
            raise ValueError("ttft_s, tpot_s, every_s and image_token_s must be positive seconds")
        if not 0 <= self.share <= 1 or not 0 < self.fill <= 1:
            raise ValueError("share must be from 0 to 1, and fill above 0 and at most 1")
        if min(self.least_prefill, self.least_decode, self.least_encode) < 1:
            raise ValueError("least_prefill, least_decode and least_encode must be at least 1")

    def decide(self, view: View) -> Decision:
        active = [each for each in view.active() if not each.is_suspect]
        prefill = [each for each in active if self._role(each) == "prefill"]
        decode = [each for each in active if self._role(each) == "decode"]
        encode = [each for each in active if self._role(each) == "encode"]
        if view.cost is None or not prefill or not decode:
            return Decision()
        waits = {each.replica: queue_s(each, NOTHING_SENT, view.token_s) for each in prefill}
        mean_s = sum(waits.values()) / len(waits)
        few, many = len(prefill), len(decode)
        free = _idle(view, encode, self.least_encode)
        if not self._keeps_pace(view, decode):
            why = f"{many} cannot keep {self.tpot_s:g} s a token"
            if free:
                return self._turn(free[-1], "decode", why)
            if few > self.least_prefill:
                if mean_s < self.ttft_s * (few - 1) / few or many < few:
                    return self._turn(_shortest(waits), "decode", why)
                return Decision()
        idle = _idle(view, decode, self.least_decode)
        if mean_s > self.share * self.ttft_s and (free or idle):
            return self._turn((free or idle)[-1], "prefill", f"prompts wait {mean_s:.2f} s")
        return self._encode_more(encode, idle, waits) if encode else Decision()

    def _encode_more(
        self, encode: Sequence[Report], idle: Sequence[str], waits: Mapping[str, float]
    ) -> Decision:
        """`idle`: those that could leave decode; `waits`: queues of those that prefill."""
        tokens, bound_s = sum(each.image_tokens or 0 for each in encode), self.share * self.ttft_s
        images_s, few = self.image_token_s * tokens / len(encode), len(waits)
        can_spare = few > self.least_prefill and sum(waits.values()) / (few - 1) <= bound_s
        if images_s <= bound_s or not (idle or can_spare):
            return Decision()
        chosen = idle[-1] if idle else _shortest(waits)
        return self._turn(chosen, "encode", f"images wait {images_s:.2f} s")

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


def _idle(view: View, reports: Sequence[Report], least: int) -> list[str]:
    """Those without a request; none where so few are left already."""
    if len(reports) <= least:
        return []
    return [each.replica for each in reports if _is_idle(view, each)]


def _shortest(waits: Mapping[str, float]) -> str:
    return min(waits, key=lambda name: (waits[name], name))


def _is_idle(view: View, report: Report) -> bool:
    return not (
        view.outstanding.get(report.replica, 0) or report.num_running or report.num_waiting
    ) and not (report.moving_in or report.moving_out)
