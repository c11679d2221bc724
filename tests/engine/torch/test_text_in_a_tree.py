"""The tree of prefixes under the real engine: jobs change their blocks while they run, and no text changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.types import Job, Sampling
from penstock.engine.briefing import Briefing
from penstock.engine.turn import ReplicaPolicies
from penstock.policy import find
from penstock.policy.evict.leaves import Leaves
from tests.engine.torch.models import saved
from tests.engine.torch.served import Served, Setting, serve
from tests.engine.torch.test_against_transformers import ENGINE, NUM_TOKENS, compare, prompts


async def test_text_stays_in_a_tree(model_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt twice at once, on little memory: what both computed is kept once, and jobs change their blocks."""
    told_again: list[int] = []
    retell = Briefing.retell

    def count(self: Briefing, job: Job) -> None:
        told_again.append(job.seq)
        retell(self, job)

    monkeypatch.setattr(Briefing, "retell", count)
    policies = ReplicaPolicies(
        order=find("order", "lpm")(),
        admit=find("admit", "watermark")(),
        batch=find("batch", "vllm-v1")(max_tokens=48),
        evict=find("evict", "recompute-last")(),
        blocks=Leaves("lfu"),
    )
    setting = Setting(store="radix", policies=policies)
    folder, _ = saved(model_root, "llama-biased")
    asked = prompts()
    greedy = Sampling(temperature=0.0, ignore_eos=True, max_tokens=NUM_TOKENS)
    served = await serve(
        folder,
        [*asked, *asked],
        setting,
        sampling=[greedy] * 2 * len(asked),
        engine=replace(ENGINE, num_blocks=28),
    )
    assert served.num_preemptions > 0 and served.num_cached > 0 and len(set(told_again)) > 1
    for half in (served.outputs[: len(asked)], served.outputs[len(asked) :]):
        compare(model_root, "llama-biased", Served(half))
