"""Every preset serves the same text in the real engine, with memory for two of the longer prompts and no more.

Also NanoFlow's late ends there: the replica tells the policy which answers ended by themselves, and the next batch is
smaller by as many tokens.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.assemble.presets import HOST_BLOCKS, PRESETS, policy_tables
from penstock.cluster.spec import policies_of
from penstock.core.events import Finished, Stepped
from penstock.core.types import Sampling
from penstock.engine.swap import SwapConfig
from tests.engine.torch.models import saved
from tests.engine.torch.served import Served, Setting, serve
from tests.engine.torch.test_against_transformers import (
    ENGINE,
    TOLERANCE,
    continuations,
    margin,
    prompts,
)

ELSEWHERE = {"dllm-serve", "semi-pd"}  # another kind of model; two lanes
NUM_TOKENS, BLOCKS = 20, 11


async def served_by(
    root: Path, policy: dict[str, object], sampling: Sampling, *, blocks: int = BLOCKS
) -> Served:
    """The first prompts, shortest first; `blocks` of memory."""
    folder, _ = saved(root, "llama-biased")
    host = HOST_BLOCKS.get(str(policy["preset"]), 0)
    setting = Setting(
        num_blocks=blocks,
        policies=policies_of(policy_tables(policy, has_prefix_cache=True)),
        swap=SwapConfig(host_blocks=host),
    )
    asked = prompts()[1:6]
    return await serve(
        folder,
        asked,
        setting,
        sampling=[sampling] * len(asked),
        engine=replace(ENGINE, num_blocks=blocks, host_blocks=host),
    )


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - ELSEWHERE))
async def test_text_stays(model_root: Path, preset: str) -> None:
    greedy = Sampling(temperature=0.0, ignore_eos=True, max_tokens=NUM_TOKENS)
    served = await served_by(model_root, {"preset": preset}, greedy)
    for at, ids in enumerate(prompts()[1:6]):
        want = continuations(model_root, "llama-biased")[1 + at][:NUM_TOKENS]
        got = tuple(served.ids(at))
        assert len(got) == NUM_TOKENS
        if got != want:
            place = next(i for i in range(NUM_TOKENS) if got[i] != want[i])
            gap = margin(model_root, "llama-biased", ids + want[:place])
            assert gap < 2 * TOLERANCE, f"prompt {at} parts at token {place}"
