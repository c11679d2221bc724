"""How many replicas prefill and how many decode: as the work of both phases balances, or as the trend of waiting says.

Source: P/D-Serve (2024), sections on ratios; known from descriptions, its code is not public.

Idea: with n_p replicas that prefill b_p prompts in T_p and n_d that write b_d answers in T_d, neither phase waits for
the other when n_p b_p / T_p = n_d b_d / T_d. What traffic asks for swings: prompts of code completion want five
prefill replicas for one that decodes, chat the reverse.

    balance   n_p : n_d from the mean lengths of what was over within the window:
              seconds of prefill = fixed_s + token_s * prompt, of decode = step_s * answer / batch
    trend     answers took `rise` longer in the later half of the window than in the earlier: where the share of the
              first token in that time rose, one more prefills, where it fell, one more decodes

Parameters
    rule       "balance" or "trend", default balance
    fixed_s, token_s   of a prompt step, default 0.02 and 1e-4
    step_s, batch      of a decode step, default 0.03 and 32 answers in it
    window_s   seconds looked back, default 30
    every_s    between two looks, default 5
    least      answers in the window before anything is decided, default 20
    rise       default 0.1
    most       roles changed at once by balance, default 2

Where we differ: roles change of running replicas, which then end what they have; the source drains, connects and checks
a new member first. Balance is asked for online too, where the source takes it from profiles of a scenario. At least one
replica keeps each role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.core.types import Report, Role
from penstock.policy.scale import Decision, Served, View


@dataclass(slots=True)
class PdRatio:
    rule: Literal["balance", "trend"] = "balance"
    fixed_s: float = 0.02
    token_s: float = 1e-4
    step_s: float = 0.03
    batch: int = 32
    window_s: float = 30.0
    every_s: float = 5.0
    least: int = 20
    rise: float = 0.1
    most: int = 2

    def __post_init__(self) -> None:
        for name in ("step_s", "batch", "window_s", "every_s", "least", "most"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.fixed_s, self.token_s, self.rise) < 0:
            raise ValueError("fixed_s, token_s and rise cannot be negative")

    def decide(self, view: View) -> Decision:
        told = [each for each in view.served if each.ttft_s is not None and each.num_output]
        prefill, decode = of_role(view, "prefill"), of_role(view, "decode")
        if len(told) < self.least or not prefill or not decode:
            return Decision()
        if self.rule == "trend":
            return self._by_trend(view, told, prefill, decode)
        return self._by_balance(view, told, prefill, decode)

    def wanted(self, told: Sequence[Served], total: int) -> int:
        """Of `total` replicas, those that should prefill."""
        prompt = sum(each.num_prompt for each in told) / len(told)
        answer = sum(each.num_output for each in told) / len(told)
        first = self.fixed_s + self.token_s * prompt
        later = self.step_s * answer / self.batch
        return min(max(1, round(total * first / (first + later))), total - 1)

    def _by_balance(
        self, view: View, told: Sequence[Served], prefill: list[Report], decode: list[Report]
    ) -> Decision:
        wanted = self.wanted(told, len(prefill) + len(decode))
        more = min(self.most, abs(wanted - len(prefill)))
        why = f"{wanted} of {len(prefill) + len(decode)} balance what was served lately"
        if wanted > len(prefill):
            return flip(view, decode, "prefill", more, why)
        return flip(view, prefill, "decode", more, why)

    def _by_trend(
        self, view: View, told: Sequence[Served], prefill: list[Report], decode: list[Report]
    ) -> Decision:
        middle = view.now - self.window_s / 2
        early = [each for each in told if each.at < middle]
        late = [each for each in told if each.at >= middle]
        if min(len(early), len(late)) < self.least / 2:
            return Decision()
        (before, share), (after, risen) = whole_and_share(early), whole_and_share(late)
        if after < (1 + self.rise) * before:
            return Decision()
        why = f"answers take {after:.2f} s after {before:.2f}, first tokens {risen:.0%} of it after {share:.0%}"
        if risen > share:
            return flip(view, decode, "prefill", 1, why)
        return flip(view, prefill, "decode", 1, why)


def of_role(view: View, role: Role) -> list[Report]:
    return [report for report in view.active() if report.role == role]


def flip(view: View, among: list[Report], role: Role, num: int, why: str) -> Decision:
    """Those with the least to do, one being left behind."""
    ranked = sorted(among, key=lambda each: (view.outstanding.get(each.replica, 0), each.replica))
    chosen = ranked[: min(num, len(among) - 1)]
    if not chosen:
        return Decision()
    return Decision(roles={each.replica: role for each in chosen}, why=why)


def whole_and_share(told: Sequence[Served]) -> tuple[float, float]:
    """Mean seconds from arrival to the end, and the share of the first token in them."""
    whole = sum(each.at - each.arrived_at for each in told)
    first = sum(each.ttft_s or 0.0 for each in told)
    return whole / len(told), first / whole if whole > 0 else 0.0
