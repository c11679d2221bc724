"""A policy never changes the text: greedy continuations of the reference under orders, batches and victims.

Memory holds two of the longer prompts, so that jobs are preempted and come back; the replica holds every decision to
its law on the way.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.engine.turn import ReplicaPolicies
from penstock.policy import find
from tests.engine.torch.served import Setting
from tests.engine.torch.test_against_transformers import check

BLOCKS = 16
MAY_SPARE_EVERYBODY = {"sglang"}  # it admits by what jobs may still write
VARIANTS = [  # order, batch, evict
    ("requeue", "split-fuse", "recompute-last"),
    ("fcfs", "prefill-first", "recompute-last"),
    ("vtc", "vllm-v1", "least-computed"),
    ("drr", "split-fuse", "cheapest-per-block"),
    ("sjf", "vllm-v1", "cache-aware"),
    ("lpm", "prefill-first", "retract"),
    ("dfs-weight", "sglang", "retract"),
    ("jit-density", "jit", "recompute-last"),
]
QUICK = 2


@pytest.mark.parametrize(
    ("ordering", "batching", "evicting"),
    [
        *VARIANTS[:QUICK],
        *(pytest.param(*each, marks=pytest.mark.slow) for each in VARIANTS[QUICK:]),
    ],
)
async def test_text_stays(model_root: Path, ordering: str, batching: str, evicting: str) -> None:
    tokens = {"chunk_tokens": 64} if batching == "sglang" else {"max_tokens": 48}
    policies = ReplicaPolicies(
        order=find("order", ordering)(),
        admit=find("admit", "full-fit")(),
        batch=find("batch", batching)(**tokens),
        evict=find("evict", evicting)(),
        blocks=find("evict", "lru")(),
    )
    setting = Setting(num_blocks=BLOCKS, policies=policies)
    served = await check(model_root, "llama-biased", setting, count=6)
    assert served.num_preemptions > 0 or batching in MAY_SPARE_EVERYBODY
