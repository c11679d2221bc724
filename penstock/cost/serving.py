"""What serving adds around the engine: the constants of a real `penstock serve` asked over HTTP on one machine.

    request   from the client's sending until the replica hears, in the client, the gateway and the channel:
              request_s + request_token_s * prompt tokens + request_other_s * requests of others under way
    cold      what the first step takes longer when the engine had nothing to do before: threads sleep, caches are cold
    reply     from the end of a step until the client has read its token:
              reply_s + reply_token_s * tokens of the same step
    cycle     of the engine, from one launch to the next: scheduler time + the fitted terms of `steps`. Gateway and
              client run on the cores that the engine computes on, so these are longer than those of an engine alone

    scatter   ratios of measured to fitted cycles, by kind of step (cost.jitter)

All but the scatter are means over a calibration's own requests, on the machine of the profile, with the client on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingCost:
    """`mape` and `left_out` are of the cycles; `neighbours` is the share of the machine that others took meanwhile."""

    request_s: float
    request_token_s: float
    request_other_s: float
    reply_s: float
    reply_token_s: float
    cold_s: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)
    scatter: dict[str, tuple[float, ...]] = field(default_factory=dict)
    num_steps: int = 0
    num_answers: int = 0
    mape: float = 0.0
    left_out: float = 0.0
    neighbours: float | None = None
    measured: str = ""

    def request_seconds(self, num_prompt: int, others: int) -> float:
        """Until the replica hears of a request; one that meets an idle engine is charged there for its cold start."""
        way_s = self.request_s + self.request_token_s * num_prompt + self.request_other_s * others
        return way_s if others else way_s + self.cold_s

    def reply_seconds(self, num_tokens: int) -> float:
        """Until the client has read a token of a step that gave so many."""
        return self.reply_s + self.reply_token_s * num_tokens
