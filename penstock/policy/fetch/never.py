"""Compute everything again: what the tiers hold is never used.

Source: none; ours.

Idea: no, whatever it takes.

Parameters: none.

Where we differ: nothing is given by a source.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.fetch import Decision, View


@dataclass(slots=True)
class Never:
    def decide(self, view: View) -> Decision:
        return Decision(False)
