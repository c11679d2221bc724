"""The Triton kernels against float64 arithmetic: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip(
    "triton",
    reason="Triton comes with torch's CUDA builds; without one, pip install it to interpret",
)

from penstock.engine.torch.attention import GatherAttention, KvLayout  # noqa: E402
from penstock.engine.torch.cuda import attention, fused  # noqa: E402
from penstock.engine.torch.cuda.attention import TritonPagedAttention  # noqa: E402
from penstock.engine.torch.kernels import fused as plain  # noqa: E402
from penstock.engine.torch.ports import Mask, StepMeta, Turn  # noqa: E402

LAYOUT = KvLayout(
    num_layers=2,
    num_blocks=24,
    block_size=16,
    num_kv_heads=2,
    head_dim=32,
    dtype=torch.float32,
    device=torch.device("cuda" if ON_GPU else "cpu"),
)
GROUPED = [(2, 1), (2, 4), (1, 3)]  # key/value heads, query heads of each


def step(chunks: list[tuple[int, int]], seed: int, size: int) -> StepMeta:
    """Chunks of (positions that are there before, tokens), on blocks in any order."""
    free = list(range(24))
    random.Random(seed).shuffle(free)
    starts, slots, rows = [0], [], []
    for before, tokens in chunks:
        end = before + tokens
        row = [free.pop() for _ in range(-(-end // size))]
        slots += [row[p // size] * size + p % size for p in range(before, end)]
        starts.append(starts[-1] + tokens)
        rows.append(row)
    width = max(map(len, rows))
    return StepMeta(
        query_start=torch.tensor(starts, dtype=torch.int32).to(LAYOUT.device),
        context=torch.tensor([b + t for b, t in chunks], dtype=torch.int32).to(LAYOUT.device),
        block_table=torch.tensor([r + [0] * (width - len(r)) for r in rows], dtype=torch.int32).to(
            LAYOUT.device
        ),
        slots=torch.tensor(slots).to(LAYOUT.device),
        max_query=max(t for _, t in chunks),
        max_context=max(b + t for b, t in chunks),
    )


def compare(
    layout: KvLayout, group: int, chunks: list[tuple[int, int]], mask: Mask, tolerance: float
) -> None:
    """Beside the gather backend in float64, over the same history."""
    ours = TritonPagedAttention(layout, spare_blocks=1)
    exact = GatherAttention(replace(layout, dtype=torch.float64))
    ours.want_lse(True), exact.want_lse(True)
    meta = step(chunks, 1, layout.block_size)
    torch.manual_seed(0)
    for of_ours, of_exact in zip(ours.cache, exact._kv, strict=True):
        history = torch.randn(of_exact.shape, device=layout.device).to(layout.dtype)
        of_exact.copy_(history)
        of_ours[:, : layout.num_blocks].copy_(history.transpose(1, 2))
    tokens, dim = len(meta.slots), layout.head_dim
    q = torch.randn(tokens, group * layout.num_kv_heads, dim, device=layout.device).to(layout.dtype)
    k, v = torch.randn(2, tokens, layout.num_kv_heads, dim, device=layout.device).to(layout.dtype)
    v = v if layout.latent is None else k[..., : layout.latent]
    out, lse = ours(1, q, k, v, meta, mask, dim**-0.5)
    wanted, wanted_lse = exact(1, q.double(), k.double(), v.double(), meta, mask, dim**-0.5)
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, wanted_lse, rtol=tolerance, atol=tolerance)
    kept = ours.cache[:, :, : layout.num_blocks].transpose(2, 3).double()
    assert torch.equal(kept, exact._kv)


MIXED = [(0, 5), (37, 1), (20, 19), (0, 1)]
DECODES = [(100, 1), (3, 1), (64, 1), (0, 1)]


@pytest.mark.parametrize(("kv_heads", "group"), GROUPED)
@pytest.mark.parametrize("chunks", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize(
    "mask",
    [Mask(), Mask(window=7), Mask(cap=2.0), Mask("full")],
    ids=["causal", "window", "cap", "full"],
)
def test_every_mask(kv_heads: int, group: int, chunks: list[tuple[int, int]], mask: Mask) -> None:
    compare(replace(LAYOUT, num_kv_heads=kv_heads), group, chunks, mask, 2e-5)


@pytest.mark.parametrize("chunks", [MIXED, DECODES], ids=["mixed", "decodes"])
def test_sixteen_bits_and_odd_head_sizes(chunks: list[tuple[int, int]]) -> None:
    """The interpreter cannot multiply bfloat16."""
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    compare(replace(LAYOUT, dtype=dtype, head_dim=80, block_size=32), 2, chunks, Mask(), 2e-2)


@pytest.mark.parametrize("chunks", [MIXED, DECODES], ids=["mixed", "decodes"])
def test_a_cache_of_latents(chunks: list[tuple[int, int]]) -> None:
    compare(replace(LAYOUT, num_kv_heads=1, head_dim=48, latent=32), 4, chunks, Mask(), 2e-5)


SIXTEEN = torch.bfloat16 if ON_GPU else torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN])
@pytest.mark.parametrize("width", [64, 96])
def test_small_operations_equal_torchs(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    device, near = (
        LAYOUT.device,
        {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2},
    )
    x, y = torch.randn(2, 5, 2 * width, device=device).to(dtype)[:, :, :width]
    for weight in (torch.rand(width, device=device).to(dtype), torch.rand(width, device=device)):
        normed, total = fused.rms_norm(x, y, weight, 1e-6)
        torch.testing.assert_close(total, x + y)
        torch.testing.assert_close(normed, plain._norm_in_torch(x + y, weight, 1e-6), **near)
        torch.testing.assert_close(
            fused.rms_norm(x, None, weight, 1e-6)[0], plain._norm_in_torch(x, weight, 1e-6), **near
        )
    gates = torch.randn(5, 2 * width, device=device).to(dtype)
    gate, up = gates.chunk(2, 1)
    torch.testing.assert_close(fused.gated(gates, False), F.silu(gate) * up, **near)
    torch.testing.assert_close(
        fused.gated(gates, True), F.gelu(gate, approximate="tanh") * up, **near
    )


@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN])
@pytest.mark.parametrize("rotary", [32, 24])
@pytest.mark.parametrize("is_normed", [False, True])
def test_turning_heads_equals_torchs(dtype: torch.dtype, rotary: int, is_normed: bool) -> None:
    torch.manual_seed(0)
    device = LAYOUT.device
    x = torch.randn(5, 6, 32, device=device).to(dtype)[:, 1:4]
    weight = torch.rand(32, device=device).to(dtype) if is_normed else None
    table = torch.rand(40, rotary, device=device)
    positions = torch.tensor([3, 0, 39, 7, 7], device=device)
    wanted = x.clone()
    plain._norm_rope_in_torch_(wanted, weight, 1e-6, table, positions)
    fused.norm_turn_(x, weight, 1e-6, table, positions)
    near = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(x, wanted, rtol=near, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN])
@pytest.mark.parametrize(("dim", "rotary"), [(32, 32), (32, 24), (48, 48)])
@pytest.mark.parametrize("weight_type", [None, "own", "wide"])
@pytest.mark.parametrize("alone", [4, 128])
def test_placing_equals_turning_and_storing(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    dim: int,
    rotary: int,
    weight_type: str | None,
    alone: int,
) -> None:
    """One token at a time and many; attention reads what was placed."""
    monkeypatch.setattr(attention, "PLACED_ALONE", alone)
    torch.manual_seed(0)
    layout = replace(LAYOUT, dtype=dtype, head_dim=dim)
    ours, wanted = (TritonPagedAttention(layout, spare_blocks=1) for _ in range(2))
    meta = step(MIXED, 1, layout.block_size)
    tokens, device = len(meta.slots), layout.device
    qkv = torch.randn(tokens, 4 + 2 + 2, dim, device=device).to(dtype)
    weights = torch.rand(2, dim, device=device).to(
        torch.float32 if weight_type == "wide" else dtype
    )
    norm = None if weight_type is None else (weights[0], weights[1], 1e-6)
    table = torch.rand(60, rotary, device=device)
    positions = torch.randint(0, 60, (tokens,), device=device)
    q, k, v = (part.clone() for part in torch.split(qkv, [4, 2, 2], 1))
    for x, weight in ((q, weights[0]), (k, weights[1])):
        plain._norm_rope_in_torch_(x, None if norm is None else weight, 1e-6, table, positions)
    out, _ = wanted(1, q, k, v, meta, Mask(), 0.2)
    placed = ours.place(1, qkv, Turn(norm, table, positions), meta)
    near = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(placed, q, rtol=near, atol=near)
    torch.testing.assert_close(ours.cache, wanted.cache, rtol=near, atol=near)
    assert ours.cache.any()
    again, _ = ours.attend(1, placed, meta, Mask(), 0.2)
    torch.testing.assert_close(again, out, rtol=4 * near, atol=4 * near)


@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN])
@pytest.mark.parametrize(("kv_heads", "group"), GROUPED)
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(window=37), Mask(cap=2.0)], ids=["causal", "window", "cap"]
)
@pytest.mark.parametrize(("rotary", "is_wide"), [(None, False), (32, False), (24, True)])
def test_decoding_in_one_program_equals_three(
    dtype: torch.dtype, kv_heads: int, group: int, mask: Mask, rotary: int | None, is_wide: bool
) -> None:
    """Placing, attending and merging: of one part, of several, and of a context that fills only some of them."""
    torch.manual_seed(0)
    layout = replace(LAYOUT, dtype=dtype, num_kv_heads=kv_heads)
    ours, wanted = (TritonPagedAttention(layout, spare_blocks=1) for _ in range(2))
    history = torch.randn(ours.cache.shape, device=layout.device).to(dtype)
    meta = step([(130, 1), (3, 1), (64, 1), (0, 1)], 1, layout.block_size)
    meta.max_context = 4096  # as in a recording: of a short context some parts are empty
    tokens, device = len(meta.slots), layout.device
    qkv = torch.randn(tokens, (group + 2) * kv_heads, 32, device=device).to(dtype)
    weights = torch.rand(2, 32, device=device).to(torch.float32 if is_wide else dtype)
    norm = None if rotary is None else (weights[0], weights[1], 1e-6)
    turn = Turn(norm, torch.rand(4096, rotary or 32, device=device), meta.context.long() - 1)
    near = 1e-5 if dtype is torch.float32 else 2e-2
    for programs in (1, 64, 16):
        ours._programs = programs
        ours.cache.copy_(history), wanted.cache.copy_(history)
        out = ours.seen(1, qkv.clone(), turn, meta, mask, 0.2)
        told, _ = wanted.attend(1, wanted.place(1, qkv.clone(), turn, meta), meta, mask, 0.2)
        torch.testing.assert_close(ours.cache, wanted.cache, rtol=near, atol=near)
        torch.testing.assert_close(out, told, rtol=2 * near, atol=2 * near)
        assert not ours._arrived.any()
