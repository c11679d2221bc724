"""The longest unused leaves first.

Source: the free list of vLLM v1 (vllm 0.33, v1/core/block_pool.py), whose head is the block unused for longest.

Idea: what was not used for long is least likely to be used again. Blocks of a finished job were put back tail
first, so of equally old blocks the deepest of a prefix go before those that more prompts share.

Parameters: none.

Where we differ: nothing; the ledger keeps the order, and items are taken lazily from its front. Asked about running
jobs it takes the earliest admitted, which is rarely what you want: recompute-last is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from penstock.policy.evict import Decision, View, take


@dataclass(slots=True)
class Lru:
    takes_oldest: ClassVar[bool] = True

    def decide(self, view: View) -> Decision:
        return take(view, view.items)
