"""What is set aside beside weights and blocks is no less than what there can be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.core.errors import BadConfig
from penstock.engine.torch import memory
from penstock.engine.torch.attention import KvLayout
from penstock.engine.torch.beside import SCRATCH, Beside
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.kernels import quantised, shorts
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.engine.torch.recorded import Space
from tests.engine.torch.models import saved

CPU = torch.device("cpu")
LAYOUT = KvLayout(
    num_layers=2, num_blocks=0, block_size=16, num_kv_heads=2, head_dim=32, dtype=torch.float32,
    device=CPU,
)  # fmt: skip
FREE = 1 << 30


@pytest.fixture(params=["llama3", "qwen3-moe", "deepseek-v2"])
def executor(model_root: Path, request: pytest.FixtureRequest) -> Iterator[TorchExecutor]:
    folder = str(saved(model_root, request.param)[0])
    config = EngineConfig(device="cpu", threads=1, num_blocks=20, max_adapters=3, adapter_rank=8)
    opened = open_executor(folder, config)
    yield opened
    asyncio.run(opened.stop())


def planned(executor: TorchExecutor) -> Beside:
    assert executor.beside is not None
    return executor.beside


def test_buffers_of_recorded_steps_are_counted(executor: TorchExecutor) -> None:
    decoder = executor._decoder
    if decoder.spaces is None:
        pytest.skip("steps are not recorded here")
    spaces = [Space(decoder, decoder.attention, decoder.layers) for _ in range(2)]  # type: ignore[arg-type]
    held = sum(each.nbytes for space in spaces for each in space._recorder.tensors)
    assert held <= planned(executor).recorded


def test_all_adapters_are_counted(executor: TorchExecutor) -> None:
    assert executor.adapters is not None
    numbers = 0
    for bank in [bank for banks in executor.adapters._places.banks for bank in banks]:
        slots = bank.form.slots * bank.form.rank
        numbers += slots * (len(bank.parts) * bank.width + sum(part.width for part in bank.parts))
    assert 0 < numbers * 4 <= planned(executor).adapters


def test_rows_in_whole_numbers_fit_whatever_the_group() -> None:
    """16 bits each and a float for each group (source/shorts.h); 8 bits each and a RowGroup of 8 bytes."""
    assert max(2 + 4 / group for group in shorts.GROUPS) <= SCRATCH
    assert max(1 + 8 / group for group in quantised.GROUPS) <= SCRATCH


def test_what_is_set_aside_is_told(executor: TorchExecutor) -> None:
    assert f"{planned(executor).total / 1e6:,.0f} MB at most" in executor.notes["memory"]
    assert sum(each for _, each in planned(executor).parts) == planned(executor).total


def test_blocks_get_their_share_of_what_nothing_else_needs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: FREE)
    each = memory.block_bytes(LAYOUT)

    def chosen(beside: int, **said: int) -> int:
        return memory.choose_num_blocks(LAYOUT, 1 << 20, beside_bytes=beside, **said)

    with caplog.at_level(logging.WARNING):
        assert chosen(0) == int(FREE * 0.4) // each
        assert chosen(FREE // 4) == int(FREE * 0.75 * 0.4) // each
        assert chosen(FREE // 4, num_blocks=100) == 100
        assert chosen(FREE // 4, memory_bytes=FREE // 2) == FREE // 2 // each
        assert not caplog.records
        assert chosen(FREE // 2, memory_bytes=FREE - each) == FREE // each - 1, "as it was said"
        assert "all else up to 0.5 GB, but only 1.1 GB are free" in caplog.text
    assert chosen(4 * FREE) == int(FREE * 0.5 * 0.4) // each, "half is for blocks at least"
    with pytest.raises(BadConfig, match="no block"):
        chosen(0, memory_bytes=1)
