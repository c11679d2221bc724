# mypy: ignore-errors
"""The Triton programs of this folder. Triton compiles this text itself: it looks like Python and is typed otherwise.

Sizes in capitals are fixed when a program is compiled; whatever else differs between calls is read when it runs.
"""

import triton
import triton.language as tl


@triton.jit
def write_cache(  # noqa: PLR0913 - kernels take what they read
    key, value, key_cache, value_cache, slots,
    key_stride, value_stride, block_stride,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr, HAS_VALUE: tl.constexpr,
):  # fmt: skip
    """One token and head a program."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    at = (slot // SIZE) * block_stride + (head * SIZE + slot % SIZE) * D
    dims = tl.arange(0, DP)
    inside = dims < D
    tl.store(
        key_cache + at + dims, tl.load(key + token * key_stride + head * D + dims, inside), inside
    )
    if HAS_VALUE:
        read = tl.load(value + token * value_stride + head * D + dims, inside)
        tl.store(value_cache + at + dims, read, inside)


@triton.jit
def _chunk_of(tile, query_start, num_chunks, TILE: tl.constexpr):
    low, high = 0, num_chunks
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TILE + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _seen(  # noqa: PLR0913 - kernels take what they read
    state, q, q_rest, key_cache, value_cache, row_of_table, first_key, high, head,
    position, block_stride, scale, cap, window,
    SIZE: tl.constexpr, D: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr,
    N: tl.constexpr, IS_MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(greatest score, sum of weights, weighted sum) of the rows after N more keys."""
    most, total, sums = state
    dims, rest = tl.arange(0, LP), tl.arange(0, RP)
    keys = first_key + tl.arange(0, N)
    is_key = keys < high
    if IS_MASKED:
        block = tl.load(row_of_table + keys // SIZE, is_key, 0).to(tl.int64)
    else:
        block = tl.load(row_of_table + keys // SIZE).to(tl.int64)
    where = block * block_stride + (head * SIZE + keys % SIZE) * D
    if IS_MASKED or L != LP:
        is_read = is_key[:, None] & (dims < L)[None]
        k = tl.load(key_cache + where[:, None] + dims[None], is_read, 0.0)
    else:
        k = tl.load(key_cache + where[:, None] + dims[None])
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if D > L:
        k_rest = tl.load(
            key_cache + where[:, None] + L + rest[None],
            is_key[:, None] & (L + rest < D)[None],
            0.0,
        )
        scores += tl.dot(q_rest, tl.trans(k_rest), input_precision=PRECISION)
        v = k
    elif IS_MASKED or L != LP:
        v = tl.load(value_cache + where[:, None] + dims[None], is_read, 0.0)
    else:
        v = tl.load(value_cache + where[:, None] + dims[None])
    if HAS_CAP:  # tanh by exp2, which saturates where it should
        scores *= scale
        turned = 2 / (1 + tl.exp2(scores * (-2 * 1.4426950408889634 / cap))) - 1
        scores = cap * turned * 1.4426950408889634
    else:
        scores *= scale * 1.4426950408889634
    if IS_MASKED:
        is_seen = is_key[None]
        if IS_CAUSAL:
            is_seen &= (keys[None] <= position[:, None]) & (keys[None] > position[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
    fresh = tl.maximum(most, tl.max(scores, 1))
    safe = fresh
    if IS_MASKED:
        safe = tl.where(fresh == float("-inf"), 0.0, fresh)
    weights = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(most - safe)
    total = total * fade + tl.sum(weights, 1)
    sums = sums * fade[:, None]
    sums += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return fresh, total, sums


@triton.jit(do_not_specialize=["num_chunks", "table_stride"])  # which change from step to step
def attend(  # noqa: PLR0913, PLR0915 - one kernel, as nothing may be shared between programs but memory
    query, key_cache, value_cache, out, lse, query_start, context, block_table,
    num_chunks, query_stride, table_stride, block_stride, scale, cap, window,
    G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    L: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_SINGLE: tl.constexpr, IS_EXACT: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """See attention.py. `out` [T, H, SPLITS, L] and `lse` [T, H, SPLITS], each split's own result.

    Keys that every row of the tile sees come first, without a mask. The longest tiles are begun first. Single: every
    chunk has one token, so a tile is a chunk and nothing need be looked up.
    """
    TILE: tl.constexpr = ROWS // GP
    PRECISION: tl.constexpr = "ieee" if IS_EXACT else "tf32"
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile, head, split = (
        tl.num_programs(0) - 1 - tl.program_id(0),
        tl.program_id(1),
        tl.program_id(2),
    )
    chunk, begin, count, first = tile, tile, 1, 0
    if not IS_SINGLE:
        chunk = _chunk_of(tile, query_start, num_chunks, TILE)
        begin = tl.load(query_start + chunk)
        count = tl.load(query_start + chunk + 1) - begin
        first = (tile - begin // TILE - chunk) * TILE
        if first >= count:
            return
    end = tl.load(context + chunk)
    rows = tl.arange(0, ROWS)
    local, place = first + rows // GP, rows % GP
    is_row = (local < count) & (place < G)
    position = end - count + local
    token = (begin + local).to(tl.int64)
    dims, rest = tl.arange(0, LP), tl.arange(0, RP)
    at = query + token * query_stride + (head * G + place) * D
    q = tl.load(at[:, None] + dims[None], is_row[:, None] & (dims < L)[None], 0.0)
    q_rest = q
    if D > L:
        q_rest = tl.load(at[:, None] + L + rest[None], is_row[:, None] & (L + rest < D)[None], 0.0)
    low, high, open_to = 0, end, end
    if IS_CAUSAL:
        high = tl.minimum(end, end - count + first + TILE)
        open_to = end - count + first + 1
        if HAS_WINDOW:
            low = tl.maximum(0, end - count + first - window + 1) // N * N
    if SPLITS > 1:
        each = tl.cdiv(tl.cdiv(high - low, N), SPLITS) * N
        low += split * each
        high = tl.minimum(high, low + each)
    if HAS_WINDOW:
        open_to = low
    open_to = low + tl.maximum(0, tl.minimum(open_to, high) - low) // N * N
    row_of_table = block_table + chunk.to(tl.int64) * table_stride
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, LP], tl.float32)
    for start in range(low, open_to, N):
        most, total, sums = _seen(
            (most, total, sums), q, q_rest, key_cache, value_cache, row_of_table, start, high, head,
            position, block_stride, scale, cap, window, SIZE, D, L, LP, RP, N,
            False, IS_CAUSAL, HAS_CAP, PRECISION,
        )  # fmt: skip
    for start in range(open_to, high, N):
        most, total, sums = _seen(
            (most, total, sums), q, q_rest, key_cache, value_cache, row_of_table, start, high, head,
            position, block_stride, scale, cap, window, SIZE, D, L, LP, RP, N,
            True, IS_CAUSAL, HAS_CAP, PRECISION,
        )  # fmt: skip
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    to = (token * H + head * G + place) * SPLITS + split
    tl.store(
        out + to[:, None] * L + dims[None],
        result.to(out.dtype.element_ty),
        is_row[:, None] & (dims < L)[None],
    )
    tl.store(lse + to, (most + tl.log2(total)) / 1.4426950408889634, is_row)


@triton.jit
def merge_parts(  # noqa: PLR0913 - kernels take what they read
    parts, part_lse, out, lse,
    L: tl.constexpr, LP: tl.constexpr, SPLITS: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """One token and head a program: its splits weighted by exp(lse)."""
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, LP)
    each = tl.load(part_lse + at * SPLITS + splits)
    most = tl.max(each, 0)
    weights = tl.exp(each - most)
    total = tl.sum(weights, 0)
    places = parts + (at * SPLITS + splits)[:, None] * L + dims[None]
    read = tl.load(places, (dims < L)[None] & (weights > 0)[:, None], 0.0)
    result = tl.sum(read * weights[:, None], 0) / total
    tl.store(out + at * L + dims, result.to(out.dtype.element_ty), dims < L)
    tl.store(lse + at, most + tl.log(total))


@triton.jit
def norm(  # noqa: PLR0913 - kernels take what they read
    x, residual, weight, out, total, x_stride, residual_stride, width, eps,
    WIDTH: tl.constexpr, ADDS: tl.constexpr, IS_WIDE: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH)
    inside = dims < width
    scale = tl.load(weight + dims, inside, 0.0)
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * x_stride + dims, inside, 0.0)
    if ADDS:
        value = value + tl.load(residual + row * residual_stride + dims, inside, 0.0)
        tl.store(total + row * width + dims, value, inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    if IS_WIDE:
        tl.store(out + row * width + dims, (wide * scale).to(out.dtype.element_ty), inside)
    else:
        tl.store(out + row * width + dims, wide.to(out.dtype.element_ty) * scale, inside)


@triton.jit
def _gated(gate, up, IS_GELU: tl.constexpr):
    """gate and up in their own type -> activate(gate) * up"""
    wide = gate.to(tl.float32)
    if IS_GELU:  # tanh(a) = 2 sigmoid(2 a) - 1
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        wide = wide * tl.sigmoid(2 * inner)
    else:
        wide = wide * tl.sigmoid(wide)
    return wide.to(gate.dtype) * up


@triton.jit
def gate_rows(
    gate_up, out, stride, width,
    WIDTH: tl.constexpr, IS_GELU: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < width
    gate = tl.load(gate_up + row * stride + at, inside, 0.0)
    up = tl.load(gate_up + row * stride + width + at, inside, 0.0)
    tl.store(out + row * width + at, _gated(gate, up, IS_GELU), inside)


@triton.jit
def turn_heads(  # noqa: PLR0913 - kernels take what they read
    x, weight, cos_sin, positions, stride, eps,
    DIM: tl.constexpr, DIMS: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
    IS_NORMED: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """One token and head a program: its norm, then its turn, both in place."""
    token = tl.program_id(0).to(tl.int64)
    row = x + token * stride + tl.program_id(1) * DIM
    if IS_NORMED:
        dims = tl.arange(0, DIMS)
        value = tl.load(row + dims, dims < DIM, 0.0)
        wide = value.to(tl.float32)
        wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
        scale = tl.load(weight + dims, dims < DIM, 0.0)
        normed = (wide * scale).to(value.dtype) if IS_WIDE else wide.to(value.dtype) * scale
        tl.store(row + dims, normed, dims < DIM)
        tl.debug_barrier()  # what follows reads it in another arrangement
    halves = tl.arange(0, HALVES)
    inside = halves < HALF
    table = cos_sin + tl.load(positions + token) * (2 * HALF)
    first = tl.load(row + halves, inside, 0.0)
    second = tl.load(row + HALF + halves, inside, 0.0)
    cos = tl.load(table + halves, inside, 0.0).to(first.dtype)
    sin = tl.load(table + HALF + halves, inside, 0.0).to(first.dtype)
    tl.store(row + halves, first * cos - second * sin, inside)
    tl.store(row + HALF + halves, second * cos + first * sin, inside)


@triton.jit(do_not_specialize=["tokens"])
def place_heads(  # noqa: PLR0913, PLR0915 - kernels take what they read
    qkv, q_weight, k_weight, key_cache, value_cache, cos_sin, positions, slots,
    stride, block_stride, tokens, eps, ROWS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    HALF: tl.constexpr, IS_NORMED: tl.constexpr, IS_WIDE: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens of [q, k, v]: q turned in place, k turned into the cache, v into the cache."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    is_token = token < tokens
    row = qkv + token[:, None] * stride + head * DIM
    dims = tl.arange(0, DIMS)[None]
    inside = (dims < DIM) & is_token[:, None]
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + token, is_token, 0)[:, None]
    at = (slot // SIZE) * block_stride + (slot % SIZE) * DIM
    value = tl.load(row + dims, inside, 0.0)
    if head >= H + K:
        tl.store(value_cache + at + (head - H - K) * (SIZE * DIM) + dims, value, inside)
        return
    # The other half of a pair is read again, so that nothing waits for what another thread wrote.
    is_turned, is_low = dims < 2 * HALF, dims < HALF
    across = tl.where(is_low, dims + HALF, tl.where(is_turned, dims - HALF, dims))
    other = tl.load(row + across, inside, 0.0)
    if IS_NORMED:
        wide = value.to(tl.float32)
        shrink = tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None]
        weight = q_weight if head < H else k_weight
        scale = tl.load(weight + dims, dims < DIM, 0.0)
        other_scale = tl.load(weight + across, dims < DIM, 0.0)
        value = _scaled(wide * shrink, scale, value.dtype, IS_WIDE)
        other = _scaled(other.to(tl.float32) * shrink, other_scale, value.dtype, IS_WIDE)
    table = cos_sin + tl.load(positions + token, is_token, 0)[:, None] * (2 * HALF)
    pair = tl.where(is_low, dims, dims - HALF)
    is_read = is_turned & is_token[:, None]
    cos = tl.load(table + pair, is_read, 1.0).to(value.dtype)
    sin = tl.load(table + HALF + pair, is_read, 0.0).to(value.dtype)
    turned = value * cos + tl.where(is_low, -other, other) * sin
    if head < H:
        tl.debug_barrier()  # every thread has read
        tl.store(row + dims, turned, inside)
    else:
        tl.store(key_cache + at + (head - H) * (SIZE * DIM) + dims, turned, inside)


@triton.jit
def _scaled(wide, scale, dtype: tl.constexpr, IS_WIDE: tl.constexpr):
    if IS_WIDE:
        scaled = (wide * scale).to(dtype)
    else:
        scaled = wide.to(dtype) * scale
    return scaled
