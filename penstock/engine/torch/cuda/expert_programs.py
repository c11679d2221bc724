# mypy: ignore-errors
"""The Triton programs of mixtures. Triton compiles this text itself: it looks like Python and is typed otherwise."""

import triton
import triton.language as tl

from penstock.engine.torch.cuda.programs import _gated


@triton.jit
def row_by_expert(  # noqa: PLR0913 - kernels take what they read
    x, weight, chosen, out, num_out, num_in,
    EACH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    IS_GATED: tl.constexpr, IS_GELU: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """BN outputs of one pair a program: row pair // EACH of x by the expert that the pair has."""
    n = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), num_out - 1)
    pair = tl.program_id(1).to(tl.int64)
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.load(chosen + pair)
    rows = num_out * 2 if IS_GATED else num_out
    at = weight + (expert * rows + n)[:, None] * num_in
    at_up = weight + (expert * rows + n + num_out)[:, None] * num_in
    row = x + pair // EACH * num_in
    sums = tl.zeros([BN, BK], tl.float32)
    sums_up = sums
    for start in range(0, num_in, BK):
        k = start + tl.arange(0, BK)
        inside = (k < num_in)[None]
        each = tl.load(row + k, k < num_in, 0.0).to(tl.float32)[None]
        sums += tl.load(at + k[None], inside, 0.0).to(tl.float32) * each
        if IS_GATED:
            sums_up += tl.load(at_up + k[None], inside, 0.0).to(tl.float32) * each
    result = tl.sum(sums, 1).to(out.dtype.element_ty)
    if IS_GATED:
        result = _gated(result, tl.sum(sums_up, 1).to(out.dtype.element_ty), IS_GELU)
    tl.store(out + pair * num_out + n, result)


@triton.jit
def add_experts(
    parts, weights, out, width, TAKES: tl.constexpr, WIDTH: tl.constexpr, IS_CHAINED: tl.constexpr
):
    """A row's parts, weighted, to what is in `out`; rounded after each, as one after the other would be."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < width
    sums = tl.load(out + row * width + at, inside, 0.0)
    for place in range(TAKES):
        pair = row * TAKES + place
        part = tl.load(parts + pair * width + at, inside, 0.0)
        sums = sums + part * tl.load(weights + pair)
    tl.store(out + row * width + at, sums, inside)
