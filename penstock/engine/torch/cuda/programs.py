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
def attend(  # noqa: PLR0913, PLR0915 - one kernel, as nothing may be shared between programs but memory
    query, key_cache, value_cache, out, lse, query_start, context, block_table,
    num_chunks, query_stride, table_stride, block_stride, scale, cap, window,
    G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    L: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_CAP: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """See the module's text. `out` [T, H, SPLITS, L] and `lse` [T, H, SPLITS], each split's own result."""
    TILE: tl.constexpr = ROWS // GP
    PRECISION: tl.constexpr = "ieee" if IS_EXACT else "tf32"
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
    if D > L:
        q_rest = tl.load(at[:, None] + L + rest[None], is_row[:, None] & (L + rest < D)[None], 0.0)
    low, high = 0, end
    if IS_CAUSAL:
        high = tl.minimum(end, end - count + first + TILE)
        low = tl.maximum(0, end - count + first - window + 1) // N * N
    if SPLITS > 1:
        each = tl.cdiv(tl.cdiv(high - low, N), SPLITS) * N
        low += split * each
        high = tl.minimum(high, low + each)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, LP], tl.float32)
    for start in range(low, high, N):
        keys = start + tl.arange(0, N)
        is_key = keys < high
        block = tl.load(block_table + chunk * table_stride + keys // SIZE, is_key, 0).to(tl.int64)
        where = block * block_stride + (head * SIZE + keys % SIZE) * D
        k = tl.load(
            key_cache + where[:, None] + dims[None], is_key[:, None] & (dims < L)[None], 0.0
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if D > L:
            k_rest = tl.load(
                key_cache + where[:, None] + L + rest[None],
                is_key[:, None] & (L + rest < D)[None],
                0.0,
            )
            scores += tl.dot(q_rest, tl.trans(k_rest), input_precision=PRECISION)
            v = k
        else:
            v = tl.load(
                value_cache + where[:, None] + dims[None], is_key[:, None] & (dims < L)[None], 0.0
            )
        scores *= scale
        if HAS_CAP:  # tanh by exp2, which saturates where it should
            turned = 2 / (1 + tl.exp2(scores * (-2 * 1.4426950408889634 / cap))) - 1
            scores = cap * turned
        is_seen = is_key[None] & is_row[:, None]
        if IS_CAUSAL:
            is_seen &= (keys[None] <= position[:, None]) & (keys[None] > position[:, None] - window)
        scores = tl.where(is_seen, scores * 1.4426950408889634, float("-inf"))
        fresh = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(fresh == float("-inf"), 0.0, fresh)
        weights = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(most - safe)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        most = fresh
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    to = (token * H + head * G + place) * SPLITS + split
    tl.store(
        out + to[:, None] * L + dims[None],
        result.to(out.dtype.element_ty),
        is_row[:, None] & (dims < L)[None],
    )
    tl.store(lse + to, (most + tl.log2(total)) / 1.4426950408889634, is_row)


@triton.jit
def merge_parts(
    parts, part_lse, out, lse, L: tl.constexpr, LP: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """One token and head a program: its splits weighted by exp(lse)."""
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
    WIDTH: tl.constexpr, ADDS: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH)
    inside = dims < width
    value = tl.load(x + row * x_stride + dims, inside, 0.0)
    if ADDS:
        value = value + tl.load(residual + row * residual_stride + dims, inside, 0.0)
        tl.store(total + row * width + dims, value, inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    scale = tl.load(weight + dims, inside, 0.0)
    if IS_WIDE:
        tl.store(out + row * width + dims, (wide * scale).to(out.dtype.element_ty), inside)
    else:
        tl.store(out + row * width + dims, wide.to(out.dtype.element_ty) * scale, inside)


@triton.jit
def gate_rows(gate_up, out, stride, width, WIDTH: tl.constexpr, IS_GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < width
    gate = tl.load(gate_up + row * stride + at, inside, 0.0)
    up = tl.load(gate_up + row * stride + width + at, inside, 0.0)
    wide = gate.to(tl.float32)
    if IS_GELU:  # tanh(a) = 2 sigmoid(2 a) - 1
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        wide = wide * tl.sigmoid(2 * inner)
    else:
        wide = wide * tl.sigmoid(wide)
    tl.store(out + row * width + at, wide.to(gate.dtype) * up, inside)


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
