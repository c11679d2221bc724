"""Keys and values in eight bits on the real engine: the text does not depend on how work is cut, memory is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.errors import BadConfig
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import EngineConfig, open_executor, open_leaf
from tests.engine.torch.driver import Driver
from tests.engine.torch.models import saved

ENGINE = EngineConfig(device="cpu", dtype="fp32", threads=1, num_blocks=40, kv="int8")
PROMPT = list(range(10, 50))


def opened(root: Path, name: str, **changes: object) -> TorchExecutor:
    return open_executor(str(saved(root, name)[0]), replace(ENGINE, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["auto", "gather"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek-lite"])
async def test_text_does_not_depend_on_the_cuts(
    model_root: Path, name: str, attention: str
) -> None:
    """Whole, in chunks, preempted in the middle: what a position leaves in the cache is the same each time."""
    executor = opened(model_root, name, attention=attention)
    driver = Driver(executor)
    whole, chunked, broken = (driver.job(PROMPT) for _ in range(3))
    await driver.finish([whole], 12)
    await driver.finish([chunked], 12, budget=7)
    await driver.finish([broken], 6)
    driver.preempt(broken)
    await driver.finish([broken], 12, budget=13)
    assert whole.outputs == chunked.outputs == broken.outputs
    vectors, numbers = (2 * 2, 32) if name == "qwen3" else (1, 32 + 16)
    assert executor.kv_bytes == 3 * 40 * 16 * vectors * (numbers + 4)
    assert executor.notes["kv"].startswith("int8")
    await executor.stop()


async def test_the_two_backends_write_the_same_text(model_root: Path) -> None:
    outputs = []
    for attention in ("auto", "gather"):
        executor = opened(model_root, "qwen3", attention=attention)
        driver = Driver(executor)
        job = driver.job(PROMPT)
        await driver.finish([job], 20)
        outputs.append(job.outputs)
        await executor.stop()
    assert outputs[0] == outputs[1]


def test_models_without_a_cache_of_blocks_say_no() -> None:
    with pytest.raises(BadConfig, match="dtype") as caught:
        open_leaf("data/tiny_diffusion", ENGINE)
    assert "kv" in str(caught.value.hint)
