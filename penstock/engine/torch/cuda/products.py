# mypy: ignore-errors
"""The Triton programs of linear layers. Triton compiles this text itself: it looks like Python and is typed otherwise.

A weight is [out, in] with inputs side by side. In 4 bits byte j of a row holds code j in its low half and code
j + in / 2 in its high half, so both halves of a run of bytes multiply runs of inputs. Codes are taken off their zero
point as whole numbers, so what a group sums is exact until its scale multiplies it.
"""

import triton
import triton.language as tl

from penstock.engine.torch.cuda.programs import _gated


@triton.jit
def row_by_numbers(  # noqa: PLR0913 - kernels take what they read
    x, weight, bias, out, num_out, num_in,
    BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr, IS_GELU: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """BN outputs a program: what counts is that many loads are under way at once, so each is begun a turn ahead.

    The first are begun before the program that x comes from has ended. Gated: the weight has 2 num_out rows, gates
    first, and out = activate(gate) * up.
    """
    n = tl.minimum(
        tl.program_id(0) * BN + tl.arange(0, BN), num_out - 1
    )  # the last may be computed twice
    at = weight + n.to(tl.int64)[:, None] * num_in
    at_up = weight + (n + num_out).to(tl.int64)[:, None] * num_in
    k = tl.arange(0, BK)
    w = tl.load(at + k[None], (k < num_in)[None], 0.0)
    up = w
    if IS_GATED:
        up = tl.load(at_up + k[None], (k < num_in)[None], 0.0)
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([BN, BK], tl.float32)
    sums_up = sums
    for start in range(0, num_in, BK):
        k = start + tl.arange(0, BK)
        each = tl.load(x + k, k < num_in, 0.0).to(tl.float32)[None]
        is_next = (k + BK < num_in)[None]
        following = tl.load(at + (k + BK)[None], is_next, 0.0)
        sums += w.to(tl.float32) * each
        w = following
        if IS_GATED:
            following = tl.load(at_up + (k + BK)[None], is_next, 0.0)
            sums_up += up.to(tl.float32) * each
            up = following
    total = tl.sum(sums, 1)
    if HAS_BIAS:
        total += tl.load(bias + n).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    if IS_GATED:
        total_up = tl.sum(sums_up, 1)
        if HAS_BIAS:
            total_up += tl.load(bias + num_out + n).to(tl.float32)
        result = _gated(result, total_up.to(out.dtype.element_ty), IS_GELU)
    tl.store(out + n, result)


@triton.jit
def whole_row_by_numbers(  # noqa: PLR0913 - kernels take what they read
    x, weight, bias, out, num_out, num_in,
    BN: tl.constexpr, WIDTH: tl.constexpr, IS_FULL: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr, IS_GELU: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """The same of a row that is read at once: all of a program's weights are under way before it waits for x.

    It holds little else, so many programs wait together. Full: num_in is WIDTH.
    """
    n = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), num_out - 1)
    k = tl.arange(0, WIDTH)
    inside = k < num_in
    at = weight + n.to(tl.int64)[:, None] * num_in + k[None]
    at_up = weight + (n + num_out).to(tl.int64)[:, None] * num_in + k[None]
    if IS_FULL:
        w = tl.load(at)
    else:
        w = tl.load(at, inside[None], 0.0)
    up = w
    if IS_GATED:
        if IS_FULL:
            up = tl.load(at_up)
        else:
            up = tl.load(at_up, inside[None], 0.0)
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    each = tl.load(x + k, inside, 0.0).to(tl.float32)[None]
    found = tl.sum(w.to(tl.float32) * each, 1)
    if HAS_BIAS:
        found += tl.load(bias + n).to(tl.float32)
    result = found.to(out.dtype.element_ty)
    if IS_GATED:
        found_up = tl.sum(up.to(tl.float32) * each, 1)
        if HAS_BIAS:
            found_up += tl.load(bias + num_out + n).to(tl.float32)
        result = _gated(result, found_up.to(out.dtype.element_ty), IS_GELU)
    tl.store(out + n, result)


@triton.jit
def _taken_off(codes, MIDDLE: tl.constexpr):
    """codes - MIDDLE in fp32. Bytes as the last bits of 2^23 + codes: where tiles are made that is faster."""
    if MIDDLE == 128:
        found = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    else:
        found = (codes.to(tl.int32) - MIDDLE).to(tl.float32)
    return found


@triton.jit
def _times_group(  # noqa: PLR0913 - kernels take what they read
    x, codes, zeros, scales, at_k, at_g, is_group, MIDDLE: tl.constexpr, HAS_ZEROS: tl.constexpr
):  # fmt: skip
    """codes [BN, BG, GROUP] with x[at_k] -> [BN, BG], scaled; at_g [BN, BG] finds their scales."""
    each = tl.load(x + at_k, is_group[:, None], 0.0).to(tl.float32)
    part = tl.sum((codes.to(tl.int32) - MIDDLE).to(tl.float32) * each[None], 2)
    if HAS_ZEROS:
        shift = tl.load(zeros + at_g, is_group[None], MIDDLE).to(tl.int32) - MIDDLE
        part -= shift.to(tl.float32) * tl.sum(each, 1)[None]
    return part * tl.load(scales + at_g, is_group[None], 0.0)


@triton.jit
def _row_of_codes(  # noqa: PLR0913 - kernels take what they read
    x, read, codes, scales, zeros, wide, num_in,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """The sums of outputs `wide` [BN], of whose codes `read` are the first."""
    MIDDLE: tl.constexpr = 128 if BITS == 8 else 8
    width = num_in if BITS == 8 else num_in // 2
    groups = num_in // GROUP
    own = width // GROUP
    sums = tl.zeros([BN, BG], tl.float32)
    for start in range(0, own, BG):
        g = start + tl.arange(0, BG)
        at_k = g[:, None] * GROUP + tl.arange(0, GROUP)[None]
        at_g = wide[:, None] * groups + g[None]
        is_next = (g + BG < own)[None, :, None]
        following = tl.load(
            codes + wide[:, None, None] * width + (at_k + BG * GROUP)[None], is_next, 0
        )
        if BITS == 8:
            sums += _times_group(x, read, zeros, scales, at_k, at_g, g < own, MIDDLE, HAS_ZEROS)
        else:
            sums += _times_group(
                x, read & 15, zeros, scales, at_k, at_g, g < own, MIDDLE, HAS_ZEROS
            )
            at_g += own
            sums += _times_group(
                x, read >> 4, zeros, scales, at_k + width, at_g, g < own, MIDDLE, HAS_ZEROS
            )
        read = following
    return tl.sum(sums, 1)


@triton.jit
def row_by_codes(  # noqa: PLR0913 - kernels take what they read
    x, codes, scales, zeros, bias, out, num_out, num_in,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr, IS_GELU: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """The same of a weight in few bits, BG groups of it at a time (4 bits: of each half)."""
    n = tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), num_out - 1)
    wide = n.to(tl.int64)
    width = num_in if BITS == 8 else num_in // 2
    g = tl.arange(0, BG)
    at_k = (g[:, None] * GROUP + tl.arange(0, GROUP)[None])[None]
    is_group = (g < width // GROUP)[None, :, None]
    read = tl.load(codes + wide[:, None, None] * width + at_k, is_group, 0)
    read_up = read
    if IS_GATED:
        read_up = tl.load(codes + (wide + num_out)[:, None, None] * width + at_k, is_group, 0)
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = _row_of_codes(
        x, read, codes, scales, zeros, wide, num_in, BITS, GROUP, BN, BG, HAS_ZEROS
    )
    if HAS_BIAS:
        total += tl.load(bias + n).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    if IS_GATED:
        total_up = _row_of_codes(
            x, read_up, codes, scales, zeros, wide + num_out, num_in, BITS, GROUP, BN, BG, HAS_ZEROS
        )
        if HAS_BIAS:
            total_up += tl.load(bias + num_out + n).to(tl.float32)
        result = _gated(result, total_up.to(out.dtype.element_ty), IS_GELU)
    tl.store(out + n, result)


@triton.jit
def _numbers(  # noqa: PLR0913 - kernels take what they read
    codes, scales, zeros, at_g, dtype: tl.constexpr, MIDDLE: tl.constexpr, HAS_ZEROS: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """codes [BN, BG * GROUP] as numbers: at_g [BN, BG] finds their scales."""
    near = tl.reshape(_taken_off(codes, MIDDLE), [BN, BG, GROUP])
    if HAS_ZEROS:
        near -= (tl.load(zeros + at_g).to(tl.int32) - MIDDLE).to(tl.float32)[:, :, None]
    wide = near * tl.load(scales + at_g)[:, :, None]
    return tl.reshape(wide.to(dtype), [BN, BG * GROUP])


@triton.jit(do_not_specialize=["num_rows", "steps"])  # which change from step to step
def rows_by_codes(  # noqa: PLR0913 - kernels take what they read
    x, codes, scales, zeros, out, num_rows, num_out, num_in, x_stride, steps,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
    HAS_ZEROS: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of rows and outputs, over one of the parts that the inputs are cut into: out [parts, rows, num_out].

    `steps` of BG groups a part. Weights are numbers in x's type before they are multiplied.
    """
    MIDDLE: tl.constexpr = 128 if BITS == 8 else 8
    PRECISION: tl.constexpr = "ieee" if IS_EXACT else "tf32"
    BK: tl.constexpr = BG * GROUP
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    is_row, is_out = m < num_rows, n < num_out
    wide = tl.minimum(n, num_out - 1).to(tl.int64)
    width = num_in if BITS == 8 else num_in // 2
    groups = num_in // GROUP
    at_x = x + m.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros([BM, BN], tl.float32)
    first = part * steps * BG
    for start in range(first, tl.minimum(first + steps * BG, width // GROUP), BG):
        k = start * GROUP + tl.arange(0, BK)
        at_g = wide[:, None] * groups + (start + tl.arange(0, BG))[None]
        read = tl.load(codes + wide[:, None] * width + k[None])
        some = tl.load(at_x + k[None], is_row[:, None], 0.0)
        if BITS == 8:
            w = _numbers(
                read, scales, zeros, at_g, x.dtype.element_ty, MIDDLE, HAS_ZEROS, BN, BG, GROUP
            )
            sums += tl.dot(some, tl.trans(w), input_precision=PRECISION)
        else:
            more = tl.load(at_x + (k + width)[None], is_row[:, None], 0.0)
            w = _numbers(
                read & 15, scales, zeros, at_g, x.dtype.element_ty, MIDDLE, HAS_ZEROS, BN, BG, GROUP
            )
            sums += tl.dot(some, tl.trans(w), input_precision=PRECISION)
            w = _numbers(
                read >> 4,
                scales,
                zeros,
                at_g + groups // 2,
                x.dtype.element_ty,
                MIDDLE,
                HAS_ZEROS,
                BN,
                BG,
                GROUP,
            )
            sums += tl.dot(more, tl.trans(w), input_precision=PRECISION)
    to = out + (part * num_rows + m).to(tl.int64)[:, None] * num_out + n[None]
    tl.store(to, sums.to(out.dtype.element_ty), is_row[:, None] & is_out[None])


@triton.jit
def widen_codes(  # noqa: PLR0913 - kernels take what they read
    codes, scales, zeros, out, num_in,
    BITS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """Numbers again: one output a program and BG groups, of each half where there are two."""
    MIDDLE: tl.constexpr = 128 if BITS == 8 else 8
    n = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    width = num_in if BITS == 8 else num_in // 2
    groups = num_in // GROUP
    g = tl.program_id(1) * BG
    k = g * GROUP + tl.arange(0, BG * GROUP)
    at_g = n[:, None] * groups + (g + tl.arange(0, BG))[None]
    read = tl.load(codes + n[:, None] * width + k[None])
    to = out + n[:, None] * num_in + k[None]
    if BITS == 8:
        tl.store(
            to,
            _numbers(
                read, scales, zeros, at_g, out.dtype.element_ty, MIDDLE, HAS_ZEROS, 1, BG, GROUP
            ),
        )
    else:
        low = _numbers(
            read & 15, scales, zeros, at_g, out.dtype.element_ty, MIDDLE, HAS_ZEROS, 1, BG, GROUP
        )
        high = _numbers(
            read >> 4,
            scales,
            zeros,
            at_g + groups // 2,
            out.dtype.element_ty,
            MIDDLE,
            HAS_ZEROS,
            1,
            BG,
            GROUP,
        )
        tl.store(to, low)
        tl.store(to + width, high)
