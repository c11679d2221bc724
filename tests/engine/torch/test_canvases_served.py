"""A diffusion language model behind the real replica: the same texts as alone, block by block, and clear refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import BadModel
from penstock.core.events import Event, Finished, Stepped
from penstock.core.prompt import TokenPrompt
from penstock.core.types import CanvasRule, Output, Request, RequestId, Sampling
from penstock.engine.folder import model_facts
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.torch.diffusion.executor import DiffusionExecutor
from penstock.engine.torch.diffusion.open import open_diffusion
from penstock.engine.torch.open import open_executor, open_leaf
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy.admit.full_fit import FullFit
from penstock.policy.batch.diffusion import Diffusion
from penstock.policy.evict.lru import Lru
from penstock.policy.evict.recompute_last import RecomputeLast
from penstock.policy.order.fcfs import Fcfs
from tests.engine.torch.canvases import dense_answer, saved_canvas
from tests.engine.torch.test_canvases import ENGINE, EVERY, PROMPTS
from tests.policy.test_diffusion import Fickle, Nobody

SPARSE = CanvasRule(block_tokens=8, steps=8, retention=0.5)
GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)


class Served:
    """Requests in; what their callers heard out."""

    def __init__(self, folder: Path, rule: CanvasRule, batch: Any) -> None:
        facts = model_facts(folder)
        model, num_blocks = open_diffusion(facts, ENGINE)
        self.executor = DiffusionExecutor(model, num_blocks, facts, ENGINE, rule)
        self.told: dict[str, list[Output]] = {}
        self.events: list[Event] = []
        self.replica = Replica(
            ReplicaConfig(num_blocks=num_blocks, block_size=16, is_checked=True),
            self.executor,
            ReplicaPolicies(
                order=Fcfs(), admit=FullFit(), batch=batch, evict=RecomputeLast(), blocks=Lru()
            ),
            Predictors(cost=Nobody(), lengths=Nobody()),
            log=self,
            on_outputs=self.hear,
        )

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        for request, output in outputs:
            self.told.setdefault(request, []).append(output)

    async def texts(self, *asked: tuple[list[int], Sampling]) -> list[list[int]]:
        running = asyncio.create_task(self.replica.run())
        for place, (ids, sampling) in enumerate(asked):
            self.replica.submit(
                Request(
                    id=RequestId(f"{place}"), model="m", prompt=TokenPrompt(ids), sampling=sampling
                )
            )
        await self.replica.drain()
        await self.replica.stop()
        await running
        assert self.replica.ledger.free == self.replica.ledger.total
        return [
            [token for one in self.told[f"{place}"] for token in one.ids]
            for place in range(len(asked))
        ]


@pytest.mark.parametrize("name", ["llada", "dream"])
async def test_texts_are_the_dense_ones_where_every_step_refreshes(
    model_root: Path, name: str
) -> None:
    folder, reference = saved_canvas(model_root, name)
    served = Served(folder, EVERY, Diffusion(max_tokens=100))
    found = await served.texts(*[(list(ids), GREEDY) for ids in PROMPTS])
    assert found == [
        dense_answer(reference, list(ids), 24, EVERY, name == "dream") for ids in PROMPTS
    ]
    assert [one.num_tokens for one in served.told["0"]] == [8, 8, 8]


async def test_batches_budgets_and_preemptions_do_not_change_a_text(model_root: Path) -> None:
    folder, _ = saved_canvas(model_root, "llada")
    asked = [(list(ids), GREEDY) for ids in PROMPTS]
    alone = [(await Served(folder, SPARSE, Diffusion()).texts(one))[0] for one in asked]
    for batch in (Diffusion(), Diffusion(max_tokens=70), Diffusion(is_lockstep=True), Fickle()):
        served = Served(folder, SPARSE, batch)
        assert await served.texts(*asked) == alone
        ended = [one for one in served.events if isinstance(one, Finished)]
        assert {one.reason for one in ended} == {"length"}
        preempted = sum(one.num_preemptions for one in ended)
        assert (preempted > 0) == isinstance(batch, Fickle)
    assert max(one.num_running for one in served.events if isinstance(one, Stepped)) == 3


async def test_a_text_ends_behind_its_first_stop_token(model_root: Path) -> None:
    folder, _ = saved_canvas(model_root, "llada")
    [whole] = await Served(folder, SPARSE, Diffusion()).texts((list(PROMPTS[0]), GREEDY))
    stop = whole[11]
    chosen = Sampling(max_tokens=24, temperature=0.0, stop_ids=(stop,), ignore_eos=True)
    served = Served(folder, SPARSE, Diffusion())
    [found] = await served.texts((list(PROMPTS[0]), chosen))
    assert found == whole[: whole.index(stop) + 1]
    assert served.told["0"][-1].finish == "stop"


async def test_seeds_decide_what_is_drawn(model_root: Path) -> None:
    folder, _ = saved_canvas(model_root, "llada")
    found = []
    for seed, beside in ((3, []), (3, [(list(PROMPTS[1]), GREEDY)]), (4, [])):
        chosen = Sampling(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True)
        asked = (list(PROMPTS[0]), chosen)
        found.append((await Served(folder, SPARSE, Diffusion()).texts(asked, *beside))[0])
    assert found[0] == found[1] != found[2]


async def test_what_has_no_meaning_is_refused_by_name(model_root: Path) -> None:
    folder, _ = saved_canvas(model_root, "llada")
    served = Served(folder, SPARSE, Diffusion())
    odd = Sampling(max_tokens=24, top_p=0.5)
    found = await served.texts(
        (list(PROMPTS[0]), odd), ([9999], GREEDY), (list(PROMPTS[0]), GREEDY)
    )
    assert [len(ids) for ids in found] == [0, 0, 24]
    assert "top_p has no meaning" in str(served.told["0"][-1].error)
    assert "outside the vocabulary of 512" in str(served.told["1"][-1].error)


async def test_a_folder_is_opened_for_what_it_is(model_root: Path) -> None:
    folder, _ = saved_canvas(model_root, "dream")
    with pytest.raises(BadModel, match="open_leaf opens it"):
        open_executor(str(folder), ENGINE)
    leaf = open_leaf(str(folder), ENGINE)
    assert isinstance(leaf, DiffusionExecutor) and leaf.caps.canvas == CanvasRule()
    await leaf.stop()
