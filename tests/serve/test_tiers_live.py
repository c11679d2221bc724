"""Cached prefixes of a real engine's process survive eviction, and on disk its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.random_models import save_random_llama
from penstock.assemble import assemble, process_leaves
from penstock.assemble.config import load_config
from penstock.assemble.hash_keys import hash_key_of
from penstock.core.errors import BadConfig
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, Request, RequestId, Sampling
from tests.serve.test_serve import needs_model

SETS = (
    "fleet.0.cache.num_blocks=40",
    "fleet.0.executor.dtype='fp32'",
    "fleet.0.executor.threads=1",
    "fleet.0.policy.fetch='always'",
    "fleet.0.cache.tiers.host_bytes=6000000",
    "fleet.0.cache.tiers.disk_bytes=50000000",
)


def prompt(number: int) -> list[int]:
    return [1 + (number * 997 + at * 31) % 4000 for at in range(400)]


async def served(
    numbers: list[int], folder: Path, model: str = "default", sets: tuple[str, ...] = ()
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Texts, and how much of each prompt was found."""
    told = (*SETS, *sets, f"fleet.0.cache.tiers.dir='{folder}'")
    config = load_config(model=model, sets=told)
    key = hash_key_of(config)
    leaves, _ = process_leaves(config)
    service = await assemble(config, leaves)
    texts, found = [], []
    try:
        for place, number in enumerate(numbers):
            outputs: list[Output] = []
            asked = Request(
                id=RequestId(f"{place}"),
                model=service.models()[0],
                prompt=TokenPrompt(prompt(number), key=key),
                sampling=Sampling(max_tokens=4, temperature=0.0, ignore_eos=True),
            )
            await service.submit(asked, outputs.append)
            await asyncio.sleep(0.1)  # what is written behind
            texts.append(tuple(one for each in outputs for one in each.ids))
            found.append(max(each.num_cached for each in outputs))
    finally:
        await service.stop()
    return texts, found


@needs_model
@pytest.mark.slow
def test_a_prefix_outlives_the_device_and_the_process(tmp_path: Path) -> None:
    texts, found = asyncio.run(served([0, 1, 2, 3, 0], tmp_path))
    assert found[:4] == [0] * 4 and found[4] >= 384
    assert texts[4] == texts[0]
    again, kept = asyncio.run(served([0, 1], tmp_path))
    assert again == texts[:2]
    assert sum(kept) >= 384


@pytest.mark.gpu
def test_a_prefix_outlives_the_memory_of_a_card(tmp_path: Path) -> None:
    """In pinned memory, on disk, and in the next process."""
    shape = {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    model, kept = tmp_path / "model", tmp_path / "kept"
    model.mkdir()
    save_random_llama(model, shape, is_tied=True)
    sets = ("fleet.0.executor.device='cuda'",)
    texts, found = asyncio.run(served([0, 1, 2, 3, 0], kept, str(model), sets))
    assert found[:4] == [0] * 4 and found[4] >= 384
    assert texts[4] == texts[0]
    again, found = asyncio.run(served([0, 1], kept, str(model), sets))
    assert again == texts[:2]
    assert sum(found) >= 384


def test_the_key_of_blocks_on_disk_stays(tmp_path: Path) -> None:
    sets = (*SETS, f"fleet.0.cache.tiers.dir='{tmp_path / 'deep'}'")
    key = hash_key_of(load_config(sets=sets))
    assert len(key) == 16 and hash_key_of(load_config(sets=sets)) == key
    assert hash_key_of(load_config()) != hash_key_of(load_config())
    lives = (*sets, "serve.outlive.name='d'", f"serve.outlive.folder='{tmp_path}'")
    assert hash_key_of(load_config(sets=lives)) == key, "a deployment's own key ends with it"
    (tmp_path / "deep" / "key").write_bytes(b"short")
    with pytest.raises(BadConfig, match="holds no key"):
        hash_key_of(load_config(sets=sets))


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("fleet.0.cache.tiers.disk_bytes=1000",), "needs host_bytes"),
        (("fleet.0.cache.tiers.host_bytes=0",), "at least 1"),
        (("fleet.0.cache.tiers.host_bytes=1000", "fleet.0.cache.prefix=false"), "prefix = true"),
        (("fleet.0.cache.tiers.host_bytes=1000", "fleet.0.cache.store='radix'"), "hash"),
        (("fleet.0.policy.fetch='sometimes'",), "cheaper"),
    ],
)
def test_what_cannot_be_is_said(sets: tuple[str, ...], told: str) -> None:
    with pytest.raises(BadConfig, match=told):
        load_config(sets=sets)
