"""A policy never changes the text: greedy continuations of the reference under sets of policies drawn from the table.

The real engine beside tests/policy/test_combinations.py, whose model of hashes plays far more of them. Memory holds two
or three of the longer prompts, some replicas have host memory, chance throws jobs out besides, callers cancel at a
token, some answers stop at one, some requests want two. The replica holds every decision to its law on the way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling, Slo
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.swap import SwapConfig
from penstock.engine.torch.open import open_executor
from penstock.engine.turn import Predictors
from penstock.policy import TABLE
from tests.engine.torch.models import saved
from tests.engine.torch.test_against_transformers import (
    ENGINE,
    TOLERANCE,
    judged,
    prompts,
)
from tests.policy.combination import LAYERS, STEP, Case, Played

SLOTS = {"order": "order", "admit": "admit", "evict": "evict", "blocks": "evict"}
MODELS = ("llama-biased", "qwen3-moe")
QUICK = ("layered", "flow-prefill", "resident")
NUM_SLOW = 300


def drawn(seed: int, batching: str | None = None) -> Case:
    rng = random.Random(f"torch {seed}")
    chosen: dict[str, Any] = {slot: rng.choice(list(TABLE[kind])) for slot, kind in SLOTS.items()}
    return Case(
        **chosen,
        batch=batching or rng.choice(list(TABLE["batch"])),
        num_blocks=rng.randint(14, 22),
        host_blocks=rng.choice((0, 20)),
        mode=rng.choice(("sync", "async", "adaptive")),
        has_prefix_cache=rng.random() < 0.8,
        store=rng.choice(("hash", "radix")),
        tokens=rng.choice((48, 48, None)),
        num_ousted=6,
        num_requests=rng.randint(4, 9),
        seed=seed,
    )


class Live:
    """One replica on the real engine, and what its callers were told."""

    def __init__(self, root: Path, name: str, case: Case) -> None:
        self.root, self.name = root, name
        self.played = Played(case)
        self.cancel_at: dict[str, int] = {}
        config = dataclasses.replace(
            ENGINE, num_blocks=case.num_blocks, host_blocks=case.host_blocks
        )
        self.replica = Replica(
            ReplicaConfig(
                num_blocks=case.num_blocks,
                has_prefix_cache=case.has_prefix_cache,
                store=case.store,
                seed=case.seed,
                is_checked=True,
                swap=SwapConfig(host_blocks=case.host_blocks, mode=case.mode, group_blocks=4),
            ),
            open_executor(str(saved(root, name)[0]), config),
            case.policies(),
            Predictors(cost=StepPredictor(STEP, LAYERS), lengths=RecentLengths()),
            log=self.played,
            on_outputs=self.hear,
        )

    def hear(self, items: Sequence[tuple[str, Output]]) -> None:
        self.played.hear(items)
        for name, _ in items:
            first = self.played.told.get((name, 0), [])
            told = sum(output.num_tokens for output in first)
            if told >= self.cancel_at.get(name, 1 << 30):
                self.played.cancelled.add(name)
                self.replica.cancel(name)

    async def serve(self) -> None:
        rng = random.Random(self.played.case.seed)
        running = asyncio.get_running_loop().create_task(self.replica.run())
        for place in range(self.played.case.num_requests):
            request = self.ask(rng, place)
            self.played.asked.append(request)
            if rng.random() < 0.15:
                self.cancel_at[request.id] = rng.randint(1, 20)
            self.replica.submit(request)
            await asyncio.sleep(rng.choice((0.0, 0.0, 0.01)))
        draining = asyncio.ensure_future(self.replica.drain())
        async with asyncio.timeout(100):
            await asyncio.wait({running, draining}, return_when="FIRST_COMPLETED")
        if running.done():
            running.result()
        await self.replica.stop()
        await running

    def ask(self, rng: random.Random, place: int) -> Request:
        stops = tuple(rng.sample(range(512), 20)) if rng.random() < 0.3 else ()
        slo = Slo(ttft_s=rng.choice((None, 0.05, 0.5)), tpot_s=rng.choice((None, 0.05)))
        if (
            self.played.case.admit == "in-time"
        ):  # refuses by the clock, which a busy machine decides
            slo = Slo(tpot_s=slo.tpot_s)
        return Request(
            id=RequestId(str(place)),
            model="m",
            prompt=TokenPrompt(prompts()[place]),
            sampling=Sampling(
                temperature=0.0,
                ignore_eos=True,
                max_tokens=rng.randint(8, 40),
                stop_ids=stops,
            ),
            slo=slo,
            n=rng.choice((1, 1, 2)),
            tenant=rng.choice("ab"),
            priority=rng.randrange(3),
        )

    def hold_to_account(self) -> int:
        """How many answers parted at a tie of the reference."""
        assert self.replica.ledger.free == self.replica.ledger.total
        asked = self.played.asked
        return sum([self._ties(one, answer) for one in asked for answer in range(one.n)])

    def _ties(self, request: Request, answer: int) -> bool:
        heard, chosen = self.played.told[request.id, answer], request.sampling
        text = tuple(token for output in heard for token in output.ids)
        stops = [at for at, token in enumerate(text, 1) if token in chosen.stop_ids]
        if heard[-1].finish == "cancelled":
            assert request.id in self.played.cancelled, "nobody cancelled it"
            assert stops in ([], [len(text)]) and len(text) <= chosen.max_tokens
        else:
            assert heard[-1].finish == ("stop" if stops else "length")
            assert len(text) == (stops[0] if stops else chosen.max_tokens)
        if not text:
            return False
        logits = judged(self.root, self.name, prompts()[int(request.id)], text)
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(text)[:, None])[:, 0]
        place = int(behind.argmax())
        assert behind[place] < 2 * TOLERANCE, (
            f"{request.id}.{answer} parts at token {place} of {len(text)}: {behind[place]:.2e}"
        )
        return bool(behind[place])


async def play(root: Path, name: str, case: Case) -> Live:
    live = Live(root, name, case)
    await live.serve()
    return live


@pytest.mark.parametrize("batching", QUICK)
async def test_text_stays(model_root: Path, batching: str) -> None:
    seed = QUICK.index(batching)
    live = await play(model_root, MODELS[seed % 2], drawn(seed, batching))
    assert live.hold_to_account() <= 1
    assert live.played.num_preemptions > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODELS)
async def test_text_stays_under_many_policies(model_root: Path, name: str) -> None:
    ties = num_preemptions = 0
    for seed in range(10, 10 + NUM_SLOW):
        live = await play(model_root, name, drawn(seed))
        ties += live.hold_to_account()
        num_preemptions += live.played.num_preemptions
    assert num_preemptions > NUM_SLOW
    assert ties <= NUM_SLOW * 0.06, "1 % of some six answers each"
