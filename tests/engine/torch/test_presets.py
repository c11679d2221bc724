"""Every preset serves the reference's text in the real engine, with memory for one long prompt and little more.

Also NanoFlow's late ends there: the replica tells the policy which answers ended by themselves, and the next batch is
smaller by as many tokens and slots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.assemble.presets import HOST_BLOCKS, PRESETS, policy_tables
from penstock.cluster.spec import policies_of
from penstock.core.events import Finished, Stepped
from penstock.core.types import Sampling
from penstock.engine.swap import SwapConfig
from tests.engine.torch.models import saved
from tests.engine.torch.served import Served, Setting, serve
from tests.engine.torch.test_against_transformers import ENGINE, TOLERANCE, judged, prompts

ELSEWHERE = {"dllm-serve", "semi-pd"}  # another kind of model; two lanes
NUM_TOKENS, BLOCKS = 20, 11
GREEDY = Sampling(temperature=0.0, ignore_eos=True, max_tokens=NUM_TOKENS)
ASKED = slice(1, 6)


async def served_by(
    root: Path, policy: dict[str, object], sampling: Sequence[Sampling] = (GREEDY,) * 5
) -> Served:
    folder, _ = saved(root, "llama-biased")
    host = HOST_BLOCKS.get(str(policy["preset"]), 0)
    setting = Setting(
        num_blocks=BLOCKS,
        policies=policies_of(policy_tables(policy, has_prefix_cache=True)),
        swap=SwapConfig(host_blocks=host),
    )
    engine = replace(ENGINE, num_blocks=BLOCKS, host_blocks=host)
    return await serve(folder, prompts()[ASKED], setting, sampling=sampling, engine=engine)


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - ELSEWHERE))
async def test_text_stays(model_root: Path, preset: str) -> None:
    """Every token is the reference's best after the ones before it, or as good as its best."""
    served = await served_by(model_root, {"preset": preset})
    for at, ids in enumerate(prompts()[ASKED]):
        text = tuple(served.ids(at))
        assert len(text) == NUM_TOKENS
        logits = judged(model_root, "llama-biased", ids, text)
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert behind.max() < 2 * TOLERANCE, f"prompt {at}"


async def test_late_ends_are_counted_as_they_happen(model_root: Path) -> None:
    """Answers that meet a stop token are told in the step behind them; foreseen ends are not."""
    policy: dict[str, object] = {"preset": "nanoflow", "batch": {"max_jobs": 3}}
    plain = await served_by(model_root, policy)
    assert not any("late" in e.why for e in plain.events if isinstance(e, Stepped))
    texts = [plain.ids(at) for at in range(5)]
    stops = [replace(GREEDY, stop_ids=(text[4 + at],)) for at, text in enumerate(texts)]
    served = await served_by(model_root, policy, stops)
    for at, text in enumerate(texts):
        place = text.index(text[4 + at])
        assert served.ids(at) == text[: len(served.ids(at))] and len(served.ids(at)) <= place + 1
    ended = [e.at for e in served.events if isinstance(e, Finished) and e.reason == "stop"]
    assert len(ended) == 5
    steps = [event for event in served.events if isinstance(event, Stepped)]
    told = {e.at: int(found[1]) for e in steps if (found := re.search(r"(\d+) ended late", e.why))}
    assert told == {at: ended.count(at) for at in ended if at <= steps[-1].at}
    assert told
