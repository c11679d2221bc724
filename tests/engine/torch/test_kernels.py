"""The CPU kernels against float64 arithmetic, and against the operations of torch whose rounding they promise.

Every instruction set of this machine is tested, and besides them the bfloat16 dot-product code with its one special
instruction emulated, so that it is tested on processors without it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from penstock.engine.torch import kernels
from penstock.engine.torch.kernels import build, library
from penstock.engine.torch.ports import Mask, StepMeta

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_not()))
pytestmark = needs_kernels

BF16, FP32 = torch.bfloat16, torch.float32
ISAS = [*kernels.isas(), build.EMULATED_BF16.name]


@pytest.fixture(scope="session")
def emulated() -> library.Library:
    """Built in the user's cache like the library itself: a second run finds it."""
    return library.Library(
        build.build(variants=[build.PORTABLE, build.EMULATED_BF16]), [build.EMULATED_BF16]
    )


@dataclass
class Bench:
    """A backend, and beside it the plain history of every job, from which the truth is computed."""

    heads: int
    backend: kernels.CpuPagedAttention
    rng: random.Random
    generator: torch.Generator
    free: list[int]
    jobs: list[tuple[list[int], Tensor, Tensor]] = field(default_factory=list)

    def new_job(self) -> int:
        empty = torch.empty(
            0, self.backend.num_kv_heads, self.backend.head_dim, dtype=self.backend.dtype
        )
        self.jobs.append(([], empty, empty))
        return len(self.jobs) - 1

    def draw(self, tokens: int, heads: int) -> Tensor:
        shape = (tokens, heads, self.backend.head_dim)
        return torch.randn(shape, generator=self.generator).to(self.backend.dtype)

    def step(
        self, chunks: list[tuple[int, int]], mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs (job, tokens) chunks; returns (out, lse, wanted out, wanted lse)."""
        size, kv_heads = self.backend.block_size, self.backend.num_kv_heads
        total = sum(n for _, n in chunks)
        q, k, v = (self.draw(total, n) for n in (self.heads, kv_heads, kv_heads))
        slots, starts, contexts, wanted, at = [], [0], [], [], 0
        for job, n in chunks:
            blocks, keys, values = self.jobs[job]
            begin, end = len(keys), len(keys) + n
            while len(blocks) * size < end:
                blocks.append(self.free.pop())
            slots += [blocks[p // size] * size + p % size for p in range(begin, end)]
            keys, values = torch.cat((keys, k[at : at + n])), torch.cat((values, v[at : at + n]))
            self.jobs[job] = (blocks, keys, values)
            wanted.append(truth(q[at : at + n], keys, values, mask, self.scale))
            at += n
            starts.append(at)
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
        return out, lse, torch.cat([w[0] for w in wanted]), torch.cat([w[1] for w in wanted])

    @property
    def scale(self) -> float:
        return self.backend.head_dim**-0.5


def truth(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    n, context, share = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(share, 1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * scale
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
) -> Bench:
    emulated = isa == build.EMULATED_BF16.name
    backend = kernels.CpuPagedAttention(
        num_layers=2,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        num_threads=threads,
        isa=isa,
        library=request.getfixturevalue("emulated") if emulated else None,
    )
    backend.cache.fill_(math.nan)  # whatever was never written must not matter
    free = list(range(num_blocks))
    rng = random.Random(seed)
    rng.shuffle(free)
    return Bench(heads[0], backend, rng, torch.Generator().manual_seed(seed), free)


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
@pytest.mark.parametrize("seed", range(24))
def test_ragged_steps(request: pytest.FixtureRequest, isa: str, seed: int) -> None:
    shape, mask = random_case(seed)
    b = bench(request, isa, num_blocks=128, **shape)  # type: ignore[arg-type]
    jobs = [b.new_job() for _ in range(b.rng.randrange(1, 5))]
    for _ in range(4):
        stepping = b.rng.sample(jobs, b.rng.randrange(1, len(jobs) + 1))
        chunks = [(job, b.rng.choice((1, 1, 2, 7, 16, 33, 90))) for job in stepping]
        assert_true(b.step(chunks, mask), b.backend.dtype, isa)
