"""The attention and linear kernels against float64 arithmetic.

Every instruction set of this machine is tested, and besides them the bfloat16 dot-product code with its one special
instruction emulated, so that it is tested on processors without it.
"""

from __future__ import annotations

import ctypes
import math
import random
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.torch import kernels
from penstock.engine.torch.attention import quantised, restored
from penstock.engine.torch.kernels import build, library
from penstock.engine.torch.kernels.check import agrees
from penstock.engine.torch.ports import Mask, ShardSpec, StepMeta

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_not()))
pytestmark = needs_kernels

BF16, FP32 = torch.bfloat16, torch.float32
ISAS = [*kernels.isas(), build.EMULATED_BF16.name]


@pytest.fixture(scope="session")
def emulated() -> library.Library:
    """Built in the user's cache like the library itself: a second run finds it."""
    return library.Library(build.build(variants=[build.EMULATED_BF16]), [build.EMULATED_BF16])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@dataclass
class Bench:
    """A backend, and beside it the plain history of every job, from which the truth is computed.

    `kept` tells what the cache keeps of keys and values.
    """

    heads: int
    backend: kernels.CpuPagedAttention
    rng: random.Random
    generator: torch.Generator
    free: list[int]
    jobs: list[tuple[list[int], Tensor, Tensor]] = field(default_factory=list)
    kept: Callable[[Tensor], Tensor] = field(default=lambda x: x)

    def new_job(self) -> int:
        dims = (self.backend.head_dim, self.backend.latent or self.backend.head_dim)
        keys, values = (torch.empty(0, self.backend.num_kv_heads, dim) for dim in dims)
        self.jobs.append(([], keys, values))
        return len(self.jobs) - 1

    def draw(self, tokens: int, heads: int) -> Tensor:
        shape = (tokens, heads, self.backend.head_dim)
        return torch.randn(shape, generator=self.generator).to(self.backend.dtype)

    def write(self, chunks: list[tuple[int, int]], mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
        """Runs (job, tokens) chunks with random q, k and v; returns (q, out, lse)."""
        size, kv_heads = self.backend.block_size, self.backend.num_kv_heads
        total = sum(n for _, n in chunks)
        q, k, v = (self.draw(total, n) for n in (self.heads, kv_heads, kv_heads))
        kept_k, kept_v = self.kept(k), self.kept(v)
        if self.backend.latent is not None:
            v, kept_v = k[..., : self.backend.latent], kept_k[..., : self.backend.latent]
        slots, starts, contexts = [], [0], []
        for job, n in chunks:
            blocks, keys, values = self.jobs[job]
            begin, end, part = len(keys), len(keys) + n, slice(starts[-1], starts[-1] + n)
            while len(blocks) * size < end:
                blocks.append(self.free.pop())
            slots += [blocks[p // size] * size + p % size for p in range(begin, end)]
            self.jobs[job] = (
                blocks,
                torch.cat((keys, kept_k[part])),
                torch.cat((values, kept_v[part])),
            )
            starts.append(part.stop)
            contexts.append(end)
        width = max(len(self.jobs[job][0]) for job, _ in chunks)
        table = [self.jobs[job][0] + [0] * (width - len(self.jobs[job][0])) for job, _ in chunks]
        meta = StepMeta(
            query_start=torch.tensor(starts, dtype=torch.int32),
            context=torch.tensor(contexts, dtype=torch.int32),
            block_table=torch.tensor(table, dtype=torch.int32),
            slots=torch.tensor(slots),
            max_query=max(n for _, n in chunks),
            max_context=max(contexts),
        )
        self.backend.want_lse(True)
        out, lse = self.backend(self.backend.num_layers - 1, q, k, v, meta, mask, self.scale)
        assert lse is not None
        return q, out, lse

    def step(
        self, chunks: list[tuple[int, int]], mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs chunks; returns (out, lse, wanted out, wanted lse)."""
        q, out, lse = self.write(chunks, mask)
        queries = q.split([n for _, n in chunks])
        wanted = [
            truth(part, *self.jobs[job][1:], mask, self.scale)
            for part, (job, _) in zip(queries, chunks, strict=True)
        ]
        return out, lse, torch.cat([w[0] for w in wanted]), torch.cat([w[1] for w in wanted])

    @property
    def scale(self) -> float:
        return self.backend.head_dim**-0.5


def truth(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    n, context, share = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(share, 1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * scale
    if mask.cap is not None:
        scores = mask.cap * (scores / mask.cap).tanh()
    query = torch.arange(context - n, context)[:, None]
    key = torch.arange(context)[None]
    if mask.kind == "causal":
        hidden = key > query
        if mask.window is not None:
            hidden |= key <= query - mask.window
        scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1).transpose(0, 1)


def bench(
    request: pytest.FixtureRequest,
    isa: str,
    *,
    dtype: torch.dtype,
    block_size: int = 16,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    num_blocks: int = 64,
    threads: int = 1,
    seed: int = 0,
    stored: torch.dtype | None = None,
    latent: int | None = None,
) -> Bench:
    emulated = isa == build.EMULATED_BF16.name
    backend = kernels.CpuPagedAttention(
        num_layers=2,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        stored=stored,
        latent=latent,
        num_threads=threads,
        isa=isa,
        library=request.getfixturevalue("emulated") if emulated else None,
    )
    backend.cache.view(torch.int8).fill_(-1)  # NaN: whatever was never written must not matter
    free = list(range(num_blocks))
    rng = random.Random(seed)
    rng.shuffle(free)
    made = Bench(heads[0], backend, rng, torch.Generator().manual_seed(seed), free)
    if stored == torch.int8:
        made.kept = lambda x: restored(quantised(x))
    return made


def assert_true(
    result: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype, isa: str
) -> None:
    out, lse, wanted_out, wanted_lse = result
    if dtype == FP32:
        torch.testing.assert_close(out.double(), wanted_out, rtol=2e-6, atol=2e-6)
    else:  # the result is rounded to 8 bits; a dot-product instruction also takes rounded probabilities
        rounded = 2.0**-8 if "bf16" in isa else 0.0
        bound = 2.0**-8 * wanted_out.abs() + rounded * 3 + 2e-6
        assert ((out.double() - wanted_out).abs() <= bound).all()
        assert (out.double() - wanted_out).pow(2).mean().sqrt() < 2.0**-9 * wanted_out.std() * 1.5
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=2e-6, atol=4e-6)


def random_case(seed: int) -> tuple[dict[str, object], Mask]:
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 2, 3))
    shape = {
        "dtype": rng.choice((FP32, BF16)),
        "block_size": rng.choice((16, 32, 48)),
        "heads": (kv_heads * rng.choice((1, 2, 3, 4, 5, 7, 8)), kv_heads),
        "head_dim": rng.choice((32, 48, 64, 80, 96, 128, 256)),
        "threads": rng.choice((1, 2, 3)),
        "seed": seed,
    }
    return shape, rng.choice((Mask(), Mask(window=rng.randrange(1, 150)), Mask("full")))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(12))
def test_ragged_steps(request: pytest.FixtureRequest, isa: str, seed: int) -> None:
    shape, mask = random_case(seed)
    b = bench(request, isa, num_blocks=128, **shape)  # type: ignore[arg-type]
    jobs = [b.new_job() for _ in range(b.rng.randrange(1, 5))]
    for _ in range(4):
        stepping = b.rng.sample(jobs, b.rng.randrange(1, len(jobs) + 1))
        chunks = [(job, b.rng.choice((1, 1, 2, 7, 16, 33, 90))) for job in stepping]
        assert_true(b.step(chunks, mask), b.backend.dtype, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cap", (0.5, 50.0))
def test_capped_scores(request: pytest.FixtureRequest, isa: str, cap: float) -> None:
    """From caps that flatten everything to those that barely touch; queries large enough to reach both ends."""
    b = bench(request, isa, dtype=FP32, heads=(4, 2), head_dim=32)
    draw = b.draw
    b.draw = lambda n, heads: draw(n, heads) * 8  # type: ignore[method-assign]
    job = b.new_job()
    for mask in (Mask(cap=cap), Mask(window=20, cap=cap)):
        out, lse, wanted, wanted_lse = b.step([(job, 70)], mask)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("isa", ISAS)
def test_long_contexts_split_among_threads(
    request: pytest.FixtureRequest, isa: str, dtype: torch.dtype
) -> None:
    b = bench(request, isa, dtype=dtype, heads=(2, 1), head_dim=128, num_blocks=300, threads=3)
    long, short = b.new_job(), b.new_job()
    b.write([(long, 4090), (short, 5)], Mask(window=1))
    for mask in (Mask(), Mask(window=1000), Mask("full")):
        assert_true(b.step([(long, 2), (short, 1)], mask), dtype, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_stay_exact(request: pytest.FixtureRequest, isa: str) -> None:
    b = bench(request, isa, dtype=FP32, heads=(2, 2))
    b.generator.manual_seed(3)
    b.draw = lambda n, heads: torch.randn(n, heads, 64, generator=b.generator) * 5  # type: ignore[method-assign]
    job = b.new_job()
    out, lse, wanted, wanted_lse = b.step([(job, 300)], Mask())
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        out.double(), wanted, rtol=1e-5, atol=2e-4
    )  # scores near 100 round by 4e-6


@pytest.mark.parametrize("isa", ISAS)
def test_a_chunk_reads_what_another_chunk_of_the_step_writes(
    request: pytest.FixtureRequest, isa: str
) -> None:
    """One prompt of 40 tokens as two chunks of one step gives what it gives as one chunk."""
    outs = []
    for cuts in ([0, 40], [0, 17, 40]):
        b = bench(request, isa, dtype=FP32)
        q, k, v = (b.draw(40, n) for n in (4, 2, 2))
        table = torch.tensor([[5, 9, 3]] * (len(cuts) - 1), dtype=torch.int32)
        position = torch.arange(40)
        meta = StepMeta(
            query_start=torch.tensor(cuts, dtype=torch.int32),
            context=torch.tensor(cuts[1:], dtype=torch.int32),
            block_table=table,
            slots=table[0].long()[position // 16] * 16 + position % 16,
            max_query=40,
            max_context=40,
        )
        outs.append(b.backend(0, q, k, v, meta, Mask(), 0.125)[0])
        assert b.backend.cache[1].isnan().all()  # the other layer is untouched
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-6)


def test_rows_inside_wider_rows(request: pytest.FixtureRequest) -> None:
    """q, k and v may be slices of one fused projection."""
    outs = []
    for fused in (True, False):
        b = bench(request, "portable", dtype=BF16)
        qkv = b.draw(20, 8)
        parts = [x if fused else x.clone() for x in qkv.split((4, 2, 2), dim=1)]
        assert parts[0].is_contiguous() != fused
        table = torch.tensor([[1, 0]], dtype=torch.int32)
        slots = torch.cat((torch.arange(16, 32), torch.arange(4)))
        starts, context = (torch.tensor(x, dtype=torch.int32) for x in ([0, 20], [20]))
        meta = StepMeta(starts, context, table, slots, 20, 20)
        out, lse = b.backend(0, *parts, meta, Mask(), 0.125)
        assert lse is None
        outs.append(out)
    assert outs[0].equal(outs[1])


def test_copied_blocks_carry_the_context(request: pytest.FixtureRequest) -> None:
    b = bench(request, kernels.isas()[0], dtype=BF16)
    job = b.new_job()
    b.step([(job, 40)], Mask())
    b.step([(job, 3)], Mask())
    blocks = b.jobs[job][0]
    fresh = [b.free.pop() for _ in blocks]
    b.backend.copy_blocks(torch.tensor([*zip(blocks, fresh, strict=True)]))
    b.backend.cache[:, :, blocks] = math.nan
    b.jobs[job] = (fresh, *b.jobs[job][1:])
    assert_true(b.step([(job, 1)], Mask()), BF16, b.backend.isa or "")
    before = b.backend.cache[:, :, fresh[:2]].clone()
    b.backend.copy_blocks(torch.tensor([[fresh[0], fresh[1]], [fresh[1], fresh[0]]]))
    torch.testing.assert_close(b.backend.cache[:, :, fresh[1::-1]], before, equal_nan=True)
    assert b.backend.num_bytes == 2 * 2 * 64 * 2 * 16 * 64 * 2


def test_threads_without_openmp(request: pytest.FixtureRequest) -> None:
    results = []
    own = ctypes.CDLL(library.load().path)
    try:
        for region in (library.openmp_region(), None):
            own.penstock_use_threads(ctypes.c_void_p(region))
            b = bench(request, kernels.isas()[0], dtype=FP32, threads=3)
            results.append(b.step([(b.new_job(), 500)], Mask())[0])
    finally:
        own.penstock_use_threads(ctypes.c_void_p(library.openmp_region()))
    assert results[0].equal(results[1])


def test_shapes_that_are_refused() -> None:
    why_not_for = kernels.CpuPagedAttention.why_not_for
    assert why_not_for(64, 16, BF16) is None
    assert "head_dim" in str(why_not_for(40, 16, BF16))
    assert "block_size" in str(why_not_for(64, 8, BF16))
    assert "float16" in str(why_not_for(64, 16, torch.float16))
    assert kernels.CpuPagedAttention.available_for(576, 16, FP32)
    assert not kernels.CpuPagedAttention.available_for(2048, 16, FP32)


def test_a_wrong_instruction_set_is_noticed() -> None:
    good = library.load()
    name = next(iter(good.tables))
    idle = types.SimpleNamespace(
        tables=good.tables, attention=lambda *_: None, large_pages=good.large_pages
    )
    assert agrees(good, name)
    assert not agrees(idle, name)  # type: ignore[arg-type]
    half_idle = types.SimpleNamespace(
        tables=good.tables,
        attention=good.attention,
        large_pages=good.large_pages,
        quantised=lambda *_: None,
    )
    assert not agrees(half_idle, name)  # type: ignore[arg-type]
    no_shorts = types.SimpleNamespace(
        **{**vars(half_idle), "quantised": good.quantised},
        shorten=good.shorten,
        shorts=lambda *_: None,
    )
    assert not agrees(no_shorts, name)  # type: ignore[arg-type]
    no_numbers = types.SimpleNamespace(
        **{**vars(no_shorts), "shorts": good.shorts}, linear=lambda *_: None
    )
    assert not agrees(no_numbers, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", ((1, 16, 16), (3, 1040, 100), (70, 2064, 300), (4, 48, 7)))
def test_packed_linear(
    request: pytest.FixtureRequest, isa: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    rows, num_in, num_out = shape
    emulated = request.getfixturevalue("emulated") if isa == build.EMULATED_BF16.name else None
    method = kernels.PackedLinear(isa=isa, library=emulated)
    x = torch.randn(rows, num_in).to(dtype)
    weight, bias = (torch.randn(n).to(dtype) for n in ((num_out, num_in), (num_out,)))
    for b in (None, bias):
        wanted = F.linear(x.double(), weight.double(), None if b is None else b.double())
        got = method.pack(weight, b, ShardSpec())(x)
        assert got.dtype == dtype
        accurate = (
            {"rtol": 2.0**-8, "atol": 1e-3} if dtype == BF16 else {"rtol": 1e-5, "atol": 2e-4}
        )
        torch.testing.assert_close(got.double(), wanted, **accurate)


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("isa", ISAS)
def test_a_packed_row_is_the_same_among_others(
    request: pytest.FixtureRequest, isa: str, dtype: torch.dtype
) -> None:
    emulated = request.getfixturevalue("emulated") if isa == build.EMULATED_BF16.name else None
    method = kernels.PackedLinear(isa=isa, library=emulated)
    x = torch.randn(140, 592).to(dtype)  # more than a tile of rows, more than two blocks of inputs
    linear = method.pack(torch.randn(300, 592).to(dtype), None, ShardSpec())
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in (*range(2, 19), 31, 64, 127, 140):
        torch.testing.assert_close(linear(x[:rows]), alone[:rows], rtol=0, atol=0)
    for rows in (1, 5, 6, 7, 140):  # inside wider rows
        assert linear(x[:rows].repeat(1, 2)[:, 592:]).equal(alone[:rows])
    deep = method.pack(torch.randn(40, 8208).to(dtype), None, ShardSpec())
    x = torch.randn(13, 8208).to(dtype)  # more inputs than are passed at once even by few rows
    assert deep(x)[:12].equal(deep(x[:12])) and deep(x)[:1].equal(deep(x[:1]))
