"""A preempted job finds its own blocks again while nobody has taken them, whether its trace told hashes or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.core.events import Event, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.simulate import simulate
from penstock.lab.trial import SCHEDULERS, deployment
from penstock.traffic import TraceMeta

BLOCK = 16


class Queue:
    """Prompts of 160 tokens with answers of 400, all there at once; `is_told`: the trace names their blocks."""

    def __init__(self, is_told: bool) -> None:
        self.is_told = is_told
        self.meta = TraceMeta("queue", "drawn")

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for place in range(8):
            ids = tuple(range(10 * place, 10 * place + 10)) if self.is_told else ()
            prompt = TracedPrompt(160, ids, BLOCK)
            yield (
                0.0,
                Request(
                    id=RequestId(str(place)),
                    model="default",
                    prompt=prompt,
                    sampling=Sampling(max_tokens=400),
                    true_output=400,
                ),
            )


class Tokens:
    def __init__(self) -> None:
        self.num, self.num_evicted = 0, 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self.num_evicted += len(event.evicted)
            self.num += event.repeat * sum(tokens for _, tokens in event.chunks if tokens > 1)


def prefilled(is_told: bool, has_cache: bool) -> tuple[int, int]:
    tokens = Tokens()
    config = deployment(
        SCHEDULERS["vllm-2048"],
        cache__num_blocks=200,
        cache__prefix=has_cache,
        cache__block_size=BLOCK,
    )
    simulate(config, Queue(is_told), listeners=(tokens,))
    return tokens.num, tokens.num_evicted


@pytest.mark.parametrize("is_told", [True, False])
def test_own_blocks_are_found_again(is_told: bool) -> None:
    without, evicted = prefilled(is_told, has_cache=False)
    found, evicted_too = prefilled(is_told, has_cache=True)
    assert evicted > 0 and evicted_too > 0
    assert without > 8 * 160 + evicted * 160  # each time all of it again
    assert found < without  # some were taken meanwhile, by those who stayed
