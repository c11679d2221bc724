"""Retract the jobs that lose least: shortest output first, longest prompt among equals.

Source: SGLang `retract_decode` with retraction policy "length" (sglang 0.5.23, srt/managers/schedule_batch.py).

Idea: a retracted job keeps its tokens but loses its KV. One with little output is early in its answer, and one
with a long prompt gives back most memory; so sort by (output length, -prompt length) and take from the small end.

Parameters: none.

Where we differ: equal jobs go by the later arrival, so that the choice is always the same. The batch policy sees to
it that one job stays. Asked about cached blocks (no asker) it takes them as offered, the longest unused first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from penstock.core.views import JobView
from penstock.policy.evict import Decision, View, take


def loss(job: JobView) -> tuple[int, int, int]:
    return job.num_output, -job.num_prompt, -job.seq


@dataclass(slots=True)
class Retract:
    def decide(self, view: View) -> Decision:
        if view.asker is None:
            return take(view, view.items)
        jobs = cast(Iterable[JobView], view.items)
        ranked = sorted(jobs, key=loss)
        return take(view, ranked)
