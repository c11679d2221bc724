"""Nobody's limit ever changes: the static split.

Source: textbook; the static half of semi-PD (infinigence/Semi-PD, commit 2565f9f), whose released code fixes the shares
of its two workers when they start.

Idea: every holder keeps what it came with. Where these sum to more than the supply, all are cut in proportion.

Parameters: none; the holders' first caps are those of whoever holds them (prefill_share and decode_share of semi-pd).

Where we differ: nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.limit import Decision, View


@dataclass(slots=True)
class Fixed:
    def decide(self, view: View) -> Decision:
        total = sum(holder.cap for holder in view.holders)
        if total <= view.supply:
            return Decision({holder.name: holder.cap for holder in view.holders})
        # Floors are kept; what is above them shrinks to what is left.
        floors = sum(holder.floor for holder in view.holders)
        scale = (view.supply - floors) / (total - floors)
        return Decision(
            {h.name: h.floor + (h.cap - h.floor) * scale for h in view.holders}, "cut to fit"
        )
