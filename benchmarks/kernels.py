"""The CPU kernels beside what torch offers for the same work, in one run.

    python -m benchmarks.kernels [--json] [--seconds 0.5] [--only decode] [--against avx2]

Each line measures both sides in turns, on one thread, by that thread's CPU time (other processes then disturb less),
and takes the lower quartile. Attention is compared with `scaled_dot_product_attention` on a contiguous cache, which
is what torch is best at; a paged cache would have to be gathered first. Ratios above 1 favour the kernels.

`--against` puts the same kernels in another instruction set in torch's place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.core.types import Sampling
from penstock.engine.torch import kernels
from penstock.engine.torch.kernels import draw, library
from penstock.engine.torch.kernels.draw import Limits
from penstock.engine.torch.ports import Mask, ShardSpec, StepMeta
from penstock.engine.torch.sampler import limited_in_torch
from penstock.engine.torch.wishes import Wishes, wishes_of

BF16, FP32 = torch.bfloat16, torch.float32
BLOCK = 16
COPIES_BYTES = 64 << 20  # weights rotate through at least this much, as a model's do
TURNS = 5

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison; `gflops` and `gbytes_per_s` are the kernel's."""

    name: str
    ours_us: float
    torch_us: float
    ratio: float
    gflops: float | None = None
    gbytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class How:
    """How long each side is measured, and the instruction set that ours is compared with instead of torch."""

    seconds: float
    against: str | None


@contextmanager
def led_by(isa: str | None) -> Iterator[None]:
    """Whoever asks for the best instruction set gets this one."""
    loaded = library.load()
    kept = loaded.tables
    loaded.tables = {name: kept[name] for name in sorted(kept, key=lambda name: name != isa)}
    try:
        yield
    finally:
        loaded.tables = kept


def measure(run: Call, seconds: float) -> list[float]:
    run()
    took: list[float] = []
    until = time.perf_counter() + seconds
    while not took or time.perf_counter() < until:
        begin = time.thread_time()
        run()
        took.append(time.thread_time() - begin)
    return took


def compare(
    name: str,
    ours: Callable[[], Call],
    theirs: Call,
    how: How,
    *,
    flops: float | None = None,
    bytes_read: float | None = None,
) -> Line:
    """`ours` makes the call, for the instruction set that is best when it is asked."""
    sides = [(None, ours()), (None, theirs)]
    if how.against is not None:
        with led_by(how.against):
            sides[1] = (how.against, ours())
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for (isa, run), times in zip(sides, took, strict=True):
            with led_by(isa):
                times += measure(run, how.seconds / TURNS)
    our_s, their_s = (statistics.quantiles(times, n=4)[0] for times in took)
    return Line(
        name,
        our_s * 1e6,
        their_s * 1e6,
        their_s / our_s,
        None if flops is None else flops / our_s / 1e9,
        None if bytes_read is None else bytes_read / our_s / 1e9,
    )


def step(batch: int, context: int, queries: int) -> StepMeta:
    """`batch` jobs that each add `queries` positions to reach `context`, on blocks in random order."""
    blocks = -(-context // BLOCK)
    table = torch.randperm(batch * blocks).int().view(batch, blocks)
    position = torch.arange(context - queries, context)
    slots = table[:, position // BLOCK].long() * BLOCK + position % BLOCK
    return StepMeta(
        query_start=torch.arange(batch + 1, dtype=torch.int32) * queries,
        context=torch.full((batch,), context, dtype=torch.int32),
        block_table=table,
        slots=slots.reshape(-1),
        max_query=queries,
        max_context=context,
    )


def attention(
    shape: tuple[int, int, int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    how: How,
    *,
    stored: torch.dtype | None = None,
    latent: int | None = None,
) -> Line:
    """shape: (batch, context, queries); heads: (query heads, key/value heads, head size).

    `stored` int8 and `latent` as the backend has them; torch always gets contiguous keys and values of `dtype`.
    """
    (batch, context, queries), (num_heads, kv_heads, dim) = shape, heads
    meta, value_dim = step(*shape), latent or dim

    def drawn(tokens: int) -> list[Tensor]:
        dims = ((num_heads, dim), (kv_heads, dim), (kv_heads, value_dim))
        return [torch.randn(tokens, *each).to(dtype) for each in dims]

    q, k, v = drawn(batch * queries)

    def ours() -> Call:
        backend = kernels.CpuPagedAttention(
            num_layers=1,
            num_blocks=meta.block_table.numel(),
            block_size=BLOCK,
            num_kv_heads=kv_heads,
            head_dim=dim,
            dtype=dtype,
            stored=stored,
            latent=latent,
            num_threads=1,
        )
        filled = step(batch, context, context)
        past = drawn(batch * context)
        backend(0, *past, filled, Mask(window=1), dim**-0.5)  # type: ignore[arg-type]
        return lambda: backend(0, q, k, v, meta, Mask(), dim**-0.5)

    past = [torch.randn(batch, kv_heads, context, d).to(dtype) for d in (dim, value_dim)]
    query = torch.randn(batch, num_heads, queries, dim).to(dtype)

    def theirs() -> Tensor:
        causal = queries == context
        return F.scaled_dot_product_attention(query, *past, is_causal=causal, enable_gqa=True)

    seen = queries * context - queries * (queries - 1) / 2
    kind = "decode" if queries == 1 else "prefill"
    cached = ("" if stored is None else " int8") + ("" if latent is None else " latents")
    vector = dim + 4 if stored == torch.int8 else dim * dtype.itemsize
    return compare(
        f"{kind} {name_of(dtype)}{cached} batch {batch} context {context} heads {num_heads}/{kv_heads}x{dim}",
        ours,
        theirs,
        how,
        flops=2 * batch * num_heads * (dim + value_dim) * seen,
        bytes_read=(2 if latent is None else 1) * batch * context * kv_heads * vector,
    )


def linear(rows: int, size: int, dtype: torch.dtype, how: How) -> Line:
    copies = max(2, COPIES_BYTES // (size * size * dtype.itemsize))
    weights = [torch.randn(size, size).to(dtype) for _ in range(copies)]
    x = torch.randn(rows, size).to(dtype)

    def in_turn(run: Callable[[int], object]) -> Call:
        calls = iter(range(1 << 30))
        return lambda: run(next(calls) % copies)

    def ours() -> Call:
        packed = [kernels.PackedLinear().pack(weight, None, ShardSpec()) for weight in weights]
        return in_turn(lambda i: packed[i](x))

    return compare(
        f"linear {name_of(dtype)} {rows} rows {size}x{size}",
        ours,
        in_turn(lambda i: F.linear(x, weights[i])),
        how,
        flops=2 * rows * size * size,
        bytes_read=size * size * dtype.itemsize,
    )


def small(rows: int, dtype: torch.dtype, how: How) -> Iterator[Line]:
    """The operations between matrix products, at the sizes of a 0.6B model, beside their eager forms."""
    x, residual = (torch.randn(rows, 1024).to(dtype) for _ in range(2))
    weight, gate_up = torch.ones(1024, dtype=dtype), torch.randn(rows, 6144).to(dtype)
    q, k = (torch.randn(rows, n, 128).to(dtype) for n in (16, 8))
    positions, angle = torch.arange(rows), torch.randn(4096, 64)
    cos_sin = torch.cat((angle.cos(), angle.sin()), -1)
    cos, sin = (x.repeat(1, 2).to(dtype)[:, None] for x in cos_sin[positions].chunk(2, -1))

    def eager_norm(x: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    def eager_rope(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def eager_gate() -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    cases: dict[str, tuple[Call, Call]] = {
        "rms_norm 1024": (lambda: kernels.rms_norm(x, weight, 1e-6), lambda: eager_norm(x)),
        "add_rms_norm 1024": (
            lambda: kernels.add_rms_norm(x, residual, weight, 1e-6),
            lambda: eager_norm(x + residual),
        ),
        "rope_ 16+8 heads x128": (
            lambda: kernels.rope_(q, k, cos_sin, positions),
            lambda: (eager_rope(q), eager_rope(k)),
        ),
        "silu_mul 3072": (lambda: kernels.silu_mul(gate_up), eager_gate),
    }
    for name, (ours, theirs) in cases.items():
        yield compare(f"{name} {name_of(dtype)} {rows} rows", lambda ours=ours: ours, theirs, how)


def draws(rows: int, how: How) -> Iterator[Line]:
    """Tokens out of a large vocabulary; within limits beside torch's topk of the same candidates and what follows."""
    width = 151_936
    logits = torch.randn(rows, width) * 2
    for name, heat, chance in (("likeliest", None, None), ("any", [1.0] * rows, [0.5] * rows)):
        yield compare(
            f"draw {name}, {width} entries, {rows} rows",
            lambda heat=heat, chance=chance: lambda: kernels.pick_tokens(logits, heat, chance),
            lambda heat=heat, chance=chance: draw._pick_in_torch(logits, heat, chance),
            how,
        )
    for name, limits in (
        ("top-k 50, top-p 0.9", Limits(50, 0.9, 0.0)),
        ("top-p 0.95", Limits(width, 0.95, 0.0)),
        ("min-p 0.05", Limits(width, 1.0, 0.05)),
    ):
        sampling = Sampling(
            top_k=None if limits.top_k == width else limits.top_k,
            top_p=limits.top_p,
            min_p=limits.min_p,
        )
        wishes = [wishes_of(sampling, vocab_size=width, seed=1, answer=0)] * rows
        heat, chance = [1.0] * rows, [0.5] * rows

        def theirs(wishes: list[Wishes] = wishes, chance: list[float] = chance) -> object:
            best = logits.amax(-1).tolist()
            return limited_in_torch(logits, range(rows), wishes, best, chance)

        def ours(
            limits: Limits = limits, heat: list[float] = heat, chance: list[float] = chance
        ) -> object:
            return kernels.pick_tokens(logits, heat, chance, limits=[limits] * rows)

        yield compare(
            f"draw {name}, {width} entries, {rows} rows", lambda ours=ours: ours, theirs, how
        )


def name_of(dtype: torch.dtype) -> str:
    return "bf16" if dtype == BF16 else "fp32"


def lines(how: How, only: str) -> Iterator[Line]:
    for dtype in (BF16, FP32):
        for shape in ((1, 512, 1), (8, 1024, 1), (1, 4096, 1)):
            if only in "decode":
                yield attention(shape, (32, 8, 128), dtype, how)
                yield attention(shape, (32, 8, 128), dtype, how, stored=torch.int8)
        if only in "decode latents":
            yield attention((8, 1024, 1), (16, 1, 576), dtype, how, latent=512)
        for shape in ((1, 512, 512), (1, 2048, 2048)):
            if only in "prefill":
                yield attention(shape, (32, 8, 128), dtype, how)
                yield attention(shape, (32, 8, 128), dtype, how, stored=torch.int8)
        if only in "prefill latents":
            yield attention((1, 512, 512), (16, 1, 576), dtype, how, latent=512)
        for rows in (1, 8, 64):
            if only in "linear":
                yield linear(rows, 2048, dtype, how)
        for rows in (1, 8, 256):
            if only in "small":
                yield from small(rows, dtype, how)
    for rows in (1, 8):
        if only in "draw":
            yield from draws(rows, how)


def show(line: Line) -> str:
    speed = (
        "" if line.gflops is None else f"{line.gflops:7.1f} GFLOP/s {line.gbytes_per_s:6.1f} GB/s"
    )
    return f"{line.name:58s} {line.ours_us:11.1f} us {line.torch_us:11.1f} us {line.ratio:6.1f}x {speed}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each side is measured")
    parser.add_argument(
        "--only", default="", help="decode, latents, prefill, linear, small or draw"
    )
    parser.add_argument(
        "--against",
        choices=kernels.isas(),
        help="an instruction set: its kernels instead of torch's",
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if not kernels.available():
        raise SystemExit(f"no kernels here: {kernels.why_not()}")
    if not chosen.json:
        print(f"instruction set: {kernels.isas()[0]}")
        print(f"{'':58s} {'kernels':>14s} {chosen.against or 'torch':>14s} {'ratio':>7s}")
    for line in lines(How(chosen.seconds, chosen.against), chosen.only):
        print(json.dumps(asdict(line)) if chosen.json else show(line), flush=True)


if __name__ == "__main__":
    main()
