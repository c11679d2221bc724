"""Caches of eight bits and caches of latents, in the kernels and the portable backend, against float64 arithmetic."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from penstock.engine.torch.attention import GatherAttention, KvLayout, quantised, restored
from penstock.engine.torch.kernels import build
from penstock.engine.torch.memory import block_bytes
from penstock.engine.torch.ports import Mask, StepMeta
from tests.engine.torch.test_kernels import BF16, FP32, ISAS, Bench, bench, emulated, needs_kernels

__all__ = ["emulated"]  # a fixture
pytestmark = needs_kernels
INT8 = torch.int8


def assert_true(b: Bench, chunks: list[tuple[int, int]], mask: Mask, isa: str) -> None:
    out, lse, wanted_out, wanted_lse = b.step(chunks, mask)
    takes_pairs = isa == build.AVX512_BF16.name or isa == build.EMULATED_BF16.name
    rounded = 0.0 if b.backend.dtype == FP32 else 2.0**-8
    bound = rounded * wanted_out.abs() + 4e-6
    if takes_pairs:  # of rounded probabilities
        bound += rounded * 3
    assert ((out.double() - wanted_out).abs() <= bound).all()
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=4e-6, atol=4e-6)


def random_case(seed: int) -> tuple[dict[str, object], Mask]:
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 2, 3))
    shape: dict[str, object] = {
        "dtype": (FP32, BF16)[seed % 2],
        "stored": INT8,
        "block_size": rng.choice((16, 32, 48)),
        "heads": (kv_heads * rng.choice((1, 2, 3, 4, 5, 8, 17)), kv_heads),
        "head_dim": rng.choice((16, 32, 48, 80, 128, 256)),
        "threads": rng.choice((1, 2, 3)),
        "seed": seed,
    }
    if seed % 3 == 2:  # latents
        dim = rng.choice((48, 64, 192, 576))
        shape.update(heads=(rng.choice((1, 2, 4, 5, 16)), 1), head_dim=dim, latent=dim // 3 * 2)
        shape["latent"] = dim * 2 // 3 // 16 * 16
        shape["stored"] = rng.choice((None, INT8))
    return shape, rng.choice(
        (Mask(), Mask(window=rng.randrange(1, 150)), Mask("full"), Mask(cap=2.0))
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(12))
def test_ragged_steps(request: pytest.FixtureRequest, isa: str, seed: int) -> None:
    shape, mask = random_case(seed)
    b = bench(request, isa, num_blocks=96, **shape)  # type: ignore[arg-type]
    jobs = [b.new_job() for _ in range(b.rng.randrange(1, 4))]
    for _ in range(3):
        stepping = b.rng.sample(jobs, b.rng.randrange(1, len(jobs) + 1))
        assert_true(b, [(job, b.rng.choice((1, 1, 2, 7, 33, 70))) for job in stepping], mask, isa)


@pytest.mark.parametrize(("stored", "latent"), [(INT8, None), (None, 512), (INT8, 512)])
@pytest.mark.parametrize("isa", ISAS)
def test_long_contexts_split_among_threads(
    request: pytest.FixtureRequest, isa: str, stored: torch.dtype | None, latent: int | None
) -> None:
    b = bench(
        request, isa, dtype=BF16, heads=(2, 1), head_dim=128 if latent is None else 576,
        num_blocks=100, threads=3, stored=stored, latent=latent,
    )  # fmt: skip
    job = b.new_job()
    b.write([(job, 1400)], Mask(window=1))
    for mask in (Mask(), Mask(window=600)):
        assert_true(b, [(job, 2)], mask, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", ["fp32", "bf16", "int8", "latents"])
def test_a_row_does_not_depend_on_its_neighbours(
    request: pytest.FixtureRequest, isa: str, case: str
) -> None:
    """Decoded alone, or as the last of a long chunk: the same bits, although the ways through the kernel differ."""
    stored, latent = (INT8 if case == "int8" else None), (32 if case == "latents" else None)
    dtype, heads = (FP32 if case == "fp32" else BF16), (4, 1 if latent else 2)
    outs = []
    for cuts in ([0, 77, 78], [0, 40, 78], [0, 78]):
        b = bench(request, isa, dtype=dtype, heads=heads, head_dim=48, stored=stored, latent=latent)
        q, k, v = (b.draw(78, n) for n in (heads[0], heads[1], heads[1]))
        v = v if latent is None else k[..., :latent]
        table = torch.tensor([[5, 9, 3, 1, 7]], dtype=torch.int32)
        position = torch.arange(78)
        slots = table[0].long()[position // 16] * 16 + position % 16
        for begin, end in zip(cuts, cuts[1:], strict=False):
            meta = StepMeta(
                query_start=torch.tensor([0, end - begin], dtype=torch.int32),
                context=torch.tensor([end], dtype=torch.int32),
                block_table=table,
                slots=slots[begin:end],
                max_query=end - begin,
                max_context=end,
            )
            part = slice(begin, end)
            out, _ = b.backend(0, q[part], k[part], v[part], meta, Mask(), 0.125)
        outs.append(out[-1])
    assert outs[0].equal(outs[1]) and outs[0].equal(outs[2])


def layout_of(b: Bench) -> KvLayout:
    backend = b.backend
    return KvLayout(
        num_layers=backend.num_layers,
        num_blocks=backend.num_blocks,
        block_size=backend.block_size,
        num_kv_heads=backend.num_kv_heads,
        head_dim=backend.head_dim,
        dtype=backend.dtype,
        device=torch.device("cpu"),
        latent=backend.latent,
        stored=backend.stored,
    )


@pytest.mark.parametrize("latent", [None, 32])
def test_the_portable_backend_is_a_twin(request: pytest.FixtureRequest, latent: int | None) -> None:
    """The same numbers from both, the same bytes, and copied blocks carry their scales."""
    heads = (4, 1 if latent else 2)
    b = bench(request, ISAS[0], dtype=FP32, heads=heads, head_dim=48, stored=INT8, latent=latent)
    twin = GatherAttention(layout_of(b))
    assert twin.num_bytes == b.backend.num_bytes == b.backend.num_blocks * block_bytes(layout_of(b))
    assert b.backend.arena.element_size() == 1 and b.backend.arena.shape[1] == b.backend.num_blocks
    q, k, v = (b.draw(50, n) for n in (heads[0], heads[1], heads[1]))
    v = v if latent is None else k[..., :latent]
    table, position = torch.tensor([[5, 9, 3, 2]], dtype=torch.int32), torch.arange(50)
    slots = table[0].long()[position // 16] * 16 + position % 16
    for begin, end in ((0, 48), (48, 49), (49, 50)):
        if begin == 49:  # the job goes on in other blocks
            table = torch.tensor([[15, 19, 13, 12]], dtype=torch.int32)
            pairs = torch.tensor([[5, 15], [9, 19], [3, 13], [2, 12]])
            slots = table[0].long()[position // 16] * 16 + position % 16
            for backend in (b.backend, twin):
                backend.copy_blocks(pairs)
        meta = StepMeta(
            query_start=torch.tensor([0, end - begin], dtype=torch.int32),
            context=torch.tensor([end], dtype=torch.int32),
            block_table=table,
            slots=slots[begin:end],
            max_query=end - begin,
            max_context=end,
        )
        rows = slice(begin, end)
        outs = [
            backend(1, q[rows], k[rows], v[rows], meta, Mask(), 0.2)[0]
            for backend in (b.backend, twin)
        ]
        torch.testing.assert_close(outs[0], outs[1], rtol=2e-6, atol=2e-6)


def test_what_eight_bits_keep() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 3, 64) * torch.logspace(-6, 6, 50)[:, None, None]
    error = (restored(quantised(x)) - x).abs()
    assert (error <= x.abs().amax(-1, keepdim=True) / 254 * 1.00001).all()
    x[7, 1, 3], x[8, 0, 0], x[9] = math.inf, math.nan, 0.0
    back = restored(quantised(x))
    broken = back.isnan().all(-1)
    assert broken.sum() == 2 and broken[7, 1] and broken[8, 0]
    assert (back[9] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_broken_keys_are_not_hidden(
    request: pytest.FixtureRequest, isa: str, strange: float
) -> None:
    """Who sees a vector that is not finite is told; who does not see it is not touched."""
    b = bench(request, isa, dtype=FP32, stored=INT8)
    draw: list[Tensor] = []

    def broken(tokens: int, heads: int) -> Tensor:
        x = torch.randn(tokens, heads, 64, generator=b.generator)
        if tokens == 25 and heads == 2:
            x[3, 0, 5] = strange
        draw.append(x)
        return x

    b.draw = broken  # type: ignore[method-assign]
    job, other = b.new_job(), b.new_job()
    _, out, _ = b.write([(job, 20), (other, 5)], Mask())
    assert out[19, :2].isnan().all() or not out[19, :2].isfinite().all()
    assert out[:3].isfinite().all() and out[20:].isfinite().all() and out[:20, 2:].isfinite().all()
