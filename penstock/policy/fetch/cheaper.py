"""Bring blocks back where that is quicker than computing what they hold.

Source: the rule of Mooncake's and xLLM's global KV caches, in its simplest form.

Idea: a copy and a computation give the same bytes, so the quicker one is taken.

    yes     copy_s is not known yet, or copy_s < share * compute_s
    no      otherwise, and for fewer than `least_tokens`

Parameters: `share` (1.0): below 1, copying has to win clearly; `least_tokens` (1).

Where we differ: Mooncake compares the whole time to the first token of each replica; here the replica is chosen, and
copies are judged by what they took lately.

Does not: ask what else the device would compute meanwhile. A copy mostly goes on beside the steps, so what it really
costs is less.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.fetch import Decision, View


@dataclass(slots=True)
class Cheaper:
    share: float = 1.0
    least_tokens: int = 1

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"share must be positive, got {self.share}")
        if self.least_tokens < 1:
            raise ValueError(f"least_tokens must be at least 1, got {self.least_tokens}")

    def decide(self, view: View) -> Decision:
        if view.tokens < self.least_tokens:
            return Decision(False, f"only {view.tokens} tokens")
        if view.copy_s is None:
            return Decision(True, "to learn what it takes")
        why = f"{1e3 * view.copy_s:.1f} ms against {1e3 * view.compute_s:.1f} ms"
        return Decision(view.copy_s < self.share * view.compute_s, why)
