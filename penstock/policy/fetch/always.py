"""Bring back whatever is kept: for those who know that copies are cheap, and as the other end of comparisons.

Source: none; ours.

Idea: yes, whatever it takes.

Parameters: none.

Where we differ: nothing is given by a source.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.fetch import Decision, View


@dataclass(slots=True)
class Always:
    def decide(self, view: View) -> Decision:
        return Decision(True)
