"""Linear methods, memory, rope tables: the small parts, each against arithmetic done another way."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from penstock.core.errors import BadConfig
from penstock.engine.torch import kernels
from penstock.engine.torch.attention import KvLayout
from penstock.engine.torch.linear import (
    OneDnnLinear,
    PlainLinear,
    WidenedLinear,
    can_pack,
    choose_linear,
    has_bf16_instructions,
)
from penstock.engine.torch.memory import CONTEXTS, block_bytes, choose_num_blocks, free_bytes
from penstock.engine.torch.ports import LinearMethod, ShardSpec
from penstock.engine.torch.positions import Rope
from penstock.engine.torch.rope import RopeTable

CPU = torch.device("cpu")


def methods(dtype: torch.dtype) -> list[LinearMethod]:
    found: list[LinearMethod] = [PlainLinear(), choose_linear(CPU, dtype)[0]]
    if can_pack():
        found.append(WidenedLinear() if dtype == torch.bfloat16 else OneDnnLinear())
        if dtype == torch.bfloat16 and has_bf16_instructions():
            found.append(OneDnnLinear())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 64), (50, 40), (33, 7)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_methods(dtype: torch.dtype, shape: tuple[int, int], has_bias: bool) -> None:
    """All methods compute x W^T + b, for any number of rows and sizes that fit no tile."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    for method in methods(dtype):
        with torch.inference_mode():
            layer = method.pack(weight.clone(), bias, ShardSpec())
            for rows in (1, 3, 20):
                x = torch.randn(rows, shape[1]).to(dtype)
                want = F.linear(
                    x.double(), weight.double(), None if bias is None else bias.double()
                )
                got = layer(x)
                assert got.dtype == dtype and got.shape == want.shape
                tolerance = 1e-4 if dtype == torch.float32 else 0.2
                assert (got.double() - want).abs().max() < tolerance, method.name


def test_bf16_is_multiplied_by_our_kernels_but_where_there_are_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not kernels.linear.wins_on_this_machine(torch.bfloat16):
        pytest.skip("another library multiplies bf16 here")
    method, why = choose_linear(CPU, torch.bfloat16)
    assert method.name == "packed"
    assert why.endswith("products of bf16") == (kernels.isas()[0] == "avx512bf16")
    flags = kernels.build.processor_flags() | {"amx_bf16"}
    monkeypatch.setattr(kernels.linear, "processor_flags", lambda: flags)
    assert choose_linear(CPU, torch.bfloat16)[0].name in ("onednn", "widened")
    assert choose_linear(CPU, torch.float32)[0].name == "onednn"


def layout(num_blocks: int = 0) -> KvLayout:
    return KvLayout(
        num_layers=3,
        num_blocks=num_blocks,
        block_size=16,
        num_kv_heads=2,
        head_dim=32,
        dtype=torch.bfloat16,
        device=CPU,
    )


def test_blocks_that_fit() -> None:
    each = block_bytes(layout())
    assert each == 3 * 16 * 2 * 2 * 32 * 2
    assert choose_num_blocks(layout(), 512, num_blocks=7) == 7
    assert choose_num_blocks(layout(), 512, memory_bytes=each * 5 + 3) == 5
    assert choose_num_blocks(layout(), 512) == CONTEXTS * 512 // 16
    share = 2 * each / free_bytes(CPU)
    assert 1 <= choose_num_blocks(layout(), 512, free_share=share) <= 2
    with pytest.raises(BadConfig, match="no block"):
        choose_num_blocks(layout(), 512, memory_bytes=each - 1)


def test_rope_table_grows() -> None:
    """Positions far beyond the first table; equal angles whichever way the table grew."""
    rope = Rope(theta=10000.0)
    slowly, at_once = RopeTable(rope, 32, CPU), RopeTable(rope, 32, CPU)
    for context in (10, 1025, 1026, 5000):
        assert len(slowly.upto(context)) >= context
    far = at_once.upto(5000)
    assert torch.equal(slowly.upto(5000)[:5000], far[:5000])
    angle = 4321 * 10000.0 ** (-2 * 5 / 32)
    assert float(far[4321, 5]) == pytest.approx(float(torch.tensor(angle).cos()), abs=1e-3)
    assert float(far[4321, 16 + 5]) == pytest.approx(float(torch.tensor(angle).sin()), abs=1e-3)


def test_scaled_frequencies_fall() -> None:
    """Whatever the scaling, higher pairs turn more slowly, and no pair turns faster than unscaled."""
    from penstock.engine.torch.rope import frequencies

    plain = frequencies(Rope(theta=10000.0), 64)
    more = {"factor": 8.0, "original_context": 256, "theta": 10000.0}
    for kind in ("linear", "llama3", "yarn"):
        scaled = frequencies(Rope(kind=kind, **more), 64)  # type: ignore[arg-type]
        assert all(a >= b for a, b in pairwise(scaled.tolist()))
        assert (scaled <= plain * (1 + 1e-6)).all() and (scaled >= plain / 8 * (1 - 1e-6)).all()
