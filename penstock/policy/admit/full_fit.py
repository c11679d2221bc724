"""Start a job only when all it knows so far fits in free memory.

Source: vLLM v1 `allocate_slots(full_sequence_must_fit=True)` (vllm 0.33, v1/core/kv_cache_manager.py, option
`reserve_full_isl`, on by default).

Idea: a prompt admitted in chunks must not strand half way because memory ran out. So the blocks of every known
position (prompt, and output of a preempted job) must be free now, even if the next step computes fewer of them.
Nothing is set aside: later decodes of others may still take the blocks, and preemption mends that.

    yes     need(job, known) <= free
    no      blocks(num_prompt + max_tokens - 1) > total     the last token's KV is never written
    later   otherwise

Parameters: none.

Where we differ: vLLM refuses requests that can outgrow the memory when they arrive, by its model length limit. Here
the answer "no" does that, and it never changes over a job's life: a preempted job is not refused half way.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.policy.admit import Decision, View, cannot_start


@dataclass(slots=True)
class FullFit:
    def decide(self, view: View) -> Decision:
        return cannot_start(view) or Decision("yes")
