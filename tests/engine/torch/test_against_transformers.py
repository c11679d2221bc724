"""The engine held to transformers: the same logits, and the same greedy text, however it is cut into steps.

Logits agree within TOLERANCE in fp32. Every token of a greedy text is the one that the reference likes best after those
before it, which is what its own greedy text is made of; a token counts as a tie where it lies within twice the
tolerance of the best. Ties are counted, printed and stay under 1 %.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.core.types import Sampling
from penstock.engine.folder import model_facts
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone
from penstock.engine.torch.step import StepArrays
from tests.engine.torch.models import FAMILIES, MIXTURES, saved
from tests.engine.torch.served import Served, Setting, serve

TOLERANCE = 1e-4
NUM_TOKENS = 64
ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1)
CHECKED = {"sequences": 0, "ties": 0}
DENSE = [name for name in FAMILIES if name not in MIXTURES]
QUICK = [*DENSE, "qwen3-moe", "deepseek-v3"]
REST = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK]
BACKENDS = [*[(name, "auto") for name in FAMILIES], *[(name, "gather") for name in DENSE]]


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Lengths around block and budget borders; some share a long beginning."""
    chance = random.Random(5)
    shared = tuple(chance.randrange(3, 512) for _ in range(50))
    fresh = [tuple(chance.randrange(3, 512) for _ in range(n)) for n in (1, 15, 16, 17, 40, 130)]
    return (*fresh, shared, (*shared, 7, 8, 9), (*shared[:33], 4))


@cache
def judged(root: Path, name: str, ids: tuple[int, ...], text: tuple[int, ...]) -> torch.Tensor:
    """The reference's logits for each token of a text, given what stands before it: one forward for all of them."""
    _, model = saved(root, name)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids + text[:-1]])).logits[0, len(ids) - 1 :]
    return logits


def compare(root: Path, name: str, served: Served) -> None:
    """Every token is the reference's best after the ones before it, or as good as its best."""
    for at, ids in enumerate(prompts()[: len(served.outputs)]):
        text = tuple(served.ids(at))
        assert len(text) == NUM_TOKENS, f"prompt {at}: {len(text)} tokens"
        logits = judged(root, name, ids, text)
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(text)[:, None])[:, 0]
        place = int(behind.argmax())
        assert behind[place] < 2 * TOLERANCE, f"prompt {at}, token {place}: {behind[place]:.2e}"
        CHECKED["sequences"] += 1
        CHECKED["ties"] += bool(behind[place])
    print(f"ties so far: {CHECKED['ties']} of {CHECKED['sequences']} sequences")
    assert CHECKED["ties"] <= max(1, 0.01 * CHECKED["sequences"])


async def check(
    root: Path,
    name: str,
    setting: Setting,
    engine: EngineConfig = ENGINE,
    count: int | None = None,
) -> Served:
    """Serve all prompts, or the first `count`."""
    folder, _ = saved(root, name)
    greedy = Sampling(temperature=0.0, ignore_eos=True, max_tokens=NUM_TOKENS)
    asked = prompts()[:count]
    served = await serve(
        folder,
        asked,
        setting,
        sampling=[greedy] * len(asked),
        engine=replace(engine, num_blocks=setting.num_blocks),
    )
    compare(root, name, served)
    return served


@pytest.mark.parametrize(("name", "attention"), BACKENDS, ids=map("-".join, BACKENDS))
def test_logits(model_root: Path, name: str, attention: str) -> None:
    """Every position's logits, for prompts cut into chunks of several sizes that read each other's blocks."""
    folder, model = saved(model_root, name)
    changes = {"num_blocks": 40, "attention": attention}
    built = build_decoder(model_facts(folder), replace(ENGINE, **changes), Alone(), None)
    ids = np.array(prompts()[5])
    with torch.inference_mode():
        want = model(torch.tensor(ids)[None]).logits[0]
        for size in (1, 16, 50, len(ids)):
            got = torch.cat(
                [
                    logits_of(built, ids, at, min(at + size, len(ids)))
                    for at in range(0, len(ids), size)
                ]
            )
            assert (got - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llama-biased", "qwen3", "gemma3"])
def test_bf16_is_as_exact_as_the_references(model_root: Path, name: str) -> None:
    """Against the reference in fp32, our bf16 errs no more than half again as much as the reference's own bf16."""
    folder, model = saved(model_root, name)
    config = replace(ENGINE, dtype="bf16", num_blocks=40)
    built = build_decoder(model_facts(folder), config, Alone(), None)
    ids = np.array(prompts()[5])
    with torch.inference_mode():
        exact = model(torch.tensor(ids)[None]).logits[0]
        rounded = copy.deepcopy(model).bfloat16()
        theirs = rounded(torch.tensor(ids)[None]).logits[0].float() - exact
        ours = logits_of(built, ids, 0, len(ids)) - exact
    assert ours.square().mean() < 1.5**2 * theirs.square().mean()


def logits_of(built, ids, first: int, last: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    positions = np.arange(first, last)
    blocks = np.array([(7 * place) % 40 for place in range(-(-last // 16))], np.int32)
    arrays = StepArrays(
        ids=ids[first:last],
        positions=positions,
        rows=np.arange(last - first),
        slots=blocks[positions // 16].astype(np.int64) * 16 + positions % 16,
        query_start=np.array([0, last - first], np.int32),
        context=np.array([last], np.int32),
        block_table=blocks[None],
        max_query=last - first,
        max_context=last,
        num_sampling=last - first,
    )
    forward = built.decoder.forward(arrays.on(built.device))
    while True:
        try:
            next(forward)
        except StopIteration as end:
            logits: torch.Tensor = built.decoder.logits(end.value)
            return logits


@pytest.mark.parametrize("name", [*QUICK, *REST])
async def test_greedy_text_mixed(model_root: Path, name: str) -> None:
    """All prompts at once in chunks of 64, cached prefixes, and too few blocks for all of them."""
    served = await check(model_root, name, Setting(budget=64, num_blocks=26))
    assert served.num_preemptions > 0
    assert served.num_cached > 0


@pytest.mark.parametrize("name", ["gemma3"])
async def test_generate_says_the_same(model_root: Path, name: str) -> None:
    """The reference's own loop, on its own cache."""
    served = await check(model_root, name, Setting(), count=2)
    _, model = saved(model_root, name)
    for at, ids in enumerate(prompts()[:2]):
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out[0, len(ids) :].tolist() == served.ids(at)


async def test_two_processes(model_root: Path) -> None:
    """Tensor parallel over two processes gives the same text."""
    two = replace(ENGINE, tensor_parallel=2)
    await check(model_root, "llama-biased", Setting(budget=64), two, count=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("budget", [16, 64, 512])
@pytest.mark.parametrize("has_prefix_cache", [True, False])
async def test_greedy_text(
    model_root: Path, name: str, budget: int, has_prefix_cache: bool
) -> None:
    """The whole matrix: alone, mixed, and mixed with forced preemption."""
    setting = Setting(budget=budget, has_prefix_cache=has_prefix_cache)
    alone = await check(model_root, name, replace(setting, is_alone=True))
    await check(model_root, name, setting)
    cramped = await check(model_root, name, replace(setting, num_blocks=26))
    assert alone.num_preemptions == 0 and cramped.num_preemptions > 0
    assert (alone.num_cached > 0) == has_prefix_cache


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "olmo2"])
async def test_greedy_text_in_two_processes(model_root: Path, name: str) -> None:
    two = replace(ENGINE, tensor_parallel=2)
    await check(model_root, name, Setting(budget=64, num_blocks=26), two)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
async def test_portable_attention(model_root: Path, name: str) -> None:
    """The fallback of machines without a compiler."""
    await check(model_root, name, Setting(num_blocks=26), replace(ENGINE, attention="gather"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
async def test_on_cuda(model_root: Path, name: str) -> None:
    """On a GPU, with TF32 off; steps of up to 8 jobs are played, longer ones are not."""
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = replace(ENGINE, device="cuda", graph_batch=8)
    await check(model_root, name, Setting(num_blocks=26), engine)
