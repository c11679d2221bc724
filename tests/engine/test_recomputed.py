"""What preemptions cost: positions computed again, against a count of all chunks that were planned."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from penstock.core.events import Arrived, Completed, Finished, Stepped
from penstock.policy import find
from penstock.report.metrics import Metrics
from tests.policy.served import Ask, serve


@pytest.mark.parametrize("evicting", ["recompute-last", "least-computed", "cache-aware"])
@pytest.mark.parametrize("batching", ["vllm-v1", "split-fuse", "prefill-first", "sglang"])
def test_tokens_computed_again_are_those_that_need_not_have_been(
    batching: str, evicting: str
) -> None:
    """Positions run, less those that an answer needs: prompt and answer but its last token, less what was cached."""
    rng = random.Random(6)
    asks = [Ask(0.01 * n, "a", rng.randint(1, 120), rng.randint(1, 90)) for n in range(60)]
    events = serve(
        find("order", "fcfs")(),
        asks,
        max_jobs=8,
        num_blocks=26,
        batching=batching,
        evicting=evicting,
    )
    planned: dict[int | None, Stepped] = {}
    run: Counter[int] = Counter()
    seqs: dict[str, int] = {}
    found = 0
    for event in events:
        if isinstance(event, Arrived):
            seqs[event.request] = event.seq
        elif isinstance(event, Stepped):
            planned[event.plan] = event
        elif isinstance(event, Completed):
            for seq, tokens in planned[event.plan].chunks:
                run[seq] += tokens * event.steps_run
        elif isinstance(event, Finished):
            needed = event.num_prompt + event.num_output - 1 - event.num_cached
            assert event.num_recomputed == run[seqs[event.request]] - needed
            assert bool(event.num_preemptions) >= bool(event.num_recomputed)
            found += event.num_recomputed
    assert found > (0 if batching == "sglang" else 100)  # it hardly preempts
    assert Metrics().read(events).figures().all.recomputed_tokens == found
