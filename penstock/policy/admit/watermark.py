"""Full fit, and a share of the memory stays free for those who already run.

Source: vLLM v1 `watermark` (vllm 0.33, v1/core/kv_cache_manager.py; there 0.0 by default, 0.01 in vLLM v0).

Idea: a job admitted into the last free blocks is preempted a few decode steps later, and its prefill was for
nothing. Keeping a small share of all blocks free at admission lets running jobs grow before anybody must leave.

    yes     need(job, known) + fraction * total <= free, or nothing runs and need(job, known) <= free
    no      blocks(num_prompt + max_tokens - 1) > total
    later   otherwise

Parameters: fraction (of total blocks, default 0.01).

Where we differ: jobs admitted in the same step from an idle replica all count as "nothing runs".
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.admit import STABLE, Decision, View, can_ever_fit


@dataclass(slots=True)
class Watermark:
    fraction: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction must be in [0, 1), got {self.fraction}")

    def decide(self, view: View) -> Decision:
        ledger, job = view.ledger, view.job
        if not can_ever_fit(job, ledger):
            return Decision("no", "can outgrow the whole memory")
        need, free = ledger.need(job, job.known), ledger.free
        kept = self.fraction * ledger.total if view.running else 0.0
        if need + kept > free:
            told = f"needs {need} blocks and {kept:.0f} kept, {free} free"
            return Decision("later", told, STABLE)
        return Decision("yes")
