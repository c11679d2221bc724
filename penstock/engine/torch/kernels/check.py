"""A small attention step and layers of every form, by our kernels and by torch: do they agree?

Run when the library is loaded, in milliseconds. It guards against a compiler or a machine that the tests have not
seen; the tests are far more thorough.
"""

from __future__ import annotations

import torch

from penstock.engine.torch.kernels.attention import CpuPagedAttention
from penstock.engine.torch.kernels.library import Library
from penstock.engine.torch.kernels.linear import PackedLinear
from penstock.engine.torch.kernels.quantised import PackedQuantised
from penstock.engine.torch.kernels.shorts import ShortsLinear
from penstock.engine.torch.ports import Mask, ShardSpec, StepMeta
from penstock.engine.torch.quantised import Bits, Quantised

WIDTHS: tuple[Bits, ...] = (8, 4)
CONTEXT, QUERIES, HEADS, KV_HEADS, DIM, BLOCK = 83, 5, 6, 2, 48, 16


def agrees(library: Library, isa: str) -> bool:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(CONTEXT, n, DIM, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS)]
    exact, coarse = ((torch.float32, 1e-5), (torch.bfloat16, 3e-2))
    attends = all(
        _error(library, isa, [x.to(t) for x in draw]) < bound for t, bound in (exact, coarse)
    )
    has_few_bits = attends and all(_error_in(library, isa, bits) < 1e-5 for bits in WIDTHS)
    if not has_few_bits:
        return False
    generator = torch.Generator().manual_seed(3)
    weight, x = (torch.randn(n, 256, generator=generator).bfloat16() for n in (72, 7))
    wanted = x.double() @ weight.double().T
    shorts = ShortsLinear(isa=isa, library=library).pack(weight, None, ShardSpec())
    numbers = PackedLinear(isa=isa, library=library).pack(weight, None, ShardSpec())
    return _off(shorts(x.float()), wanted) < 1e-4 and _off(numbers(x), wanted) < 4e-3


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """By how much at most, in multiples of the largest that is wanted."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def _error_in(library: Library, isa: str, bits: Bits) -> float:
    """Of rows that bytes hold exactly."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-127, 128, (5, 128), generator=generator).float()
    x[:, ::32] = 127
    weight = Quantised(
        bits=bits,
        codes=torch.randint(2**bits, (24, 128), dtype=torch.uint8, generator=generator),
        scales=torch.rand(24, 2, generator=generator).half().float(),
        group=64,
    )
    layer = PackedQuantised(isa=isa, library=library).pack_quantised(weight, None)
    return _off(layer(x), x.double() @ weight.expand().double().T)


def _error(library: Library, isa: str, qkv: list[torch.Tensor]) -> float:
    q, k, v = qkv
    num_blocks = -(-CONTEXT // BLOCK)
    backend = CpuPagedAttention(
        num_layers=1,
        num_blocks=num_blocks,
        block_size=BLOCK,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=q.dtype,
        num_threads=1,
        isa=isa,
        library=library,
    )
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).int()
    slots = table.long().repeat_interleave(BLOCK)[:CONTEXT] * BLOCK + torch.arange(CONTEXT) % BLOCK
    done = CONTEXT - QUERIES
    for begin, end in ((0, done), (done, CONTEXT)):
        meta = StepMeta(
            query_start=torch.tensor([0, end - begin], dtype=torch.int32),
            context=torch.tensor([end], dtype=torch.int32),
            block_table=table[None],
            slots=slots[begin:end],
            max_query=end - begin,
            max_context=end,
        )
        part = slice(begin, end)
        out, _ = backend(0, q[part], k[part], v[part], meta, Mask(), DIM**-0.5)
    q, k, v = (x.double().transpose(0, 1) for x in (q[done:], k, v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    hidden = torch.arange(CONTEXT)[None] > torch.arange(done, CONTEXT)[:, None]
    scores = (q @ k.transpose(1, 2) * DIM**-0.5).masked_fill(hidden, float("-inf"))
    wanted = (scores.softmax(-1) @ v).transpose(0, 1)
    difference = (out.double() - wanted).abs().max().item()
    return difference if difference == difference else float("inf")
