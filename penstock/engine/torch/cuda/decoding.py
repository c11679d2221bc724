# mypy: ignore-errors
"""Attention of single tokens in one program: turning q and k, storing k and v, attending, and merging the parts.

A program takes a token, a key/value head and a part of the keys. Each turns its queries anew, as that is less than
another program would cost. The first part turns and stores the token's own key and value, and begins with them, so
nobody reads from the cache what is written in the same step: the first keys and values of a part are under way before
the program that q comes from has ended. Of several parts the last to end merges them all: it is known by a counter,
which it sets back.
"""

import triton
import triton.language as tl

from penstock.engine.torch.cuda.programs import _scaled, _seen


@triton.jit
def _around(weight, dims, across, D: tl.constexpr, IS_NORMED: tl.constexpr):
    """A norm's weight for each dimension and for the one that it is turned with."""
    own = 1.0
    other = 1.0
    if IS_NORMED:
        own = tl.load(weight + dims, dims < D, 0.0)
        other = tl.load(weight + across, dims < D, 0.0)
    return own, other


@triton.jit
def _turned(  # noqa: PLR0913 - kernels take what they read
    row, scales, turn, dims, across, is_read, eps,
    D: tl.constexpr, HALF: tl.constexpr, IS_NORMED: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Heads at row [R, 1], normed and turned: [R, DP]."""
    inside = (dims < D) & is_read
    value = tl.load(row + dims, inside, 0.0)
    other = tl.load(row + across, inside, 0.0)
    if IS_NORMED:
        wide = value.to(tl.float32)
        shrink = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
        value = _scaled(wide * shrink, scales[0], value.dtype, IS_WIDE)
        other = _scaled(other.to(tl.float32) * shrink, scales[1], value.dtype, IS_WIDE)
    cos, sin = turn[0].to(value.dtype), turn[1].to(value.dtype)
    return value * cos + tl.where(dims < HALF, -other, other) * sin


@triton.jit
def _after(  # noqa: PLR0913 - kernels take what they read
    state, q, k, v, is_seen, scale, cap, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr
):
    """(greatest score, sum of weights, weighted sum) after keys k [N, DP], of which `is_seen` [N]."""
    most, total, sums = state
    scores = _squeezed(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, HAS_CAP)
    scores = tl.where(is_seen[None], scores, float("-inf"))
    fresh = tl.maximum(most, tl.max(scores, 1))
    safe = tl.where(fresh == float("-inf"), 0.0, fresh)
    weights = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(most - safe)
    total = total * fade + tl.sum(weights, 1)
    sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return fresh, total, sums


@triton.jit
def _squeezed(scores, scale, cap, HAS_CAP: tl.constexpr):
    """In powers of two."""
    scores *= scale
    if HAS_CAP:  # tanh by exp2, which saturates where it should
        turned = 2 / (1 + tl.exp2(scores * (-2 * 1.4426950408889634 / cap))) - 1
        scores = cap * turned
    return scores * 1.4426950408889634


@triton.jit
def _merge(  # noqa: PLR0913 - kernels take what they read
    parts, part_lse, out, first, used,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The parts of G heads from `first` on, weighted by exp(lse); what others wrote is not in the nearest cache."""
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DP)
    for start in range(0, G, AT_ONCE):
        head = start + tl.arange(0, AT_ONCE)
        is_used = (head < G)[:, None] & (splits < used)[None]
        at = (first + head)[:, None] * SPLITS + splits[None]
        each = tl.load(part_lse + at, is_used, -1e30, cache_modifier=".cg")
        is_read = is_used[:, :, None] & (dims < D)[None, None]
        read = tl.load(
            parts + at[:, :, None] * D + dims[None, None], is_read, 0.0, cache_modifier=".cg"
        )
        weights = tl.exp(each - tl.max(each, 1)[:, None])
        result = tl.sum(read * weights[:, :, None], 1) / tl.sum(weights, 1)[:, None]
        to = out + (first + head)[:, None] * D + dims[None]
        tl.store(to, result.to(out.dtype.element_ty), (head < G)[:, None] & (dims < D)[None])


@triton.jit(do_not_specialize=["table_stride"])  # which changes from step to step
def decode_heads(  # noqa: PLR0913, PLR0915 - one kernel, as nothing may be shared between programs but memory
    qkv, q_weight, k_weight, key_cache, value_cache, cos_sin, positions, slots, context, block_table,
    parts, part_lse, arrived, out, stride, table_stride, block_stride, eps, scale, cap, window,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, IS_NORMED: tl.constexpr, IS_WIDE: tl.constexpr, IS_EXACT: tl.constexpr,
    AT_ONCE: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """See the module's text. `parts` [T, H, SPLITS, D] and `part_lse` [T, H, SPLITS] are of several parts only."""
    PRECISION: tl.constexpr = "ieee" if IS_EXACT else "tf32"
    token, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    end = tl.load(context + token)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(0, end - window) // N * N
    turns = tl.maximum(1, tl.cdiv(end - 1 - low, N))
    each = tl.cdiv(turns, SPLITS)
    used = tl.cdiv(turns, each)
    if split >= used:
        return
    low += split * each * N
    high = tl.minimum(end - 1, low + each * N)
    # All that earlier steps have left is read before this one's q, k and v are waited for.
    row_of_table = block_table + token * table_stride
    keys = low + tl.arange(0, N)
    is_seen = keys < high
    block = tl.load(row_of_table + keys // SIZE, is_seen, 0).to(tl.int64)
    where = (block * block_stride + (head * SIZE + keys % SIZE) * D)[:, None] + tl.arange(0, DP)[
        None
    ]
    is_read = is_seen[:, None] & (tl.arange(0, DP) < D)[None]
    k = tl.load(key_cache + where, is_read, 0.0)
    v = tl.load(value_cache + where, is_read, 0.0)
    dims = tl.arange(0, DP)[None]
    is_turned, is_low = dims < 2 * HALF, dims < HALF
    across = tl.where(is_low, dims + HALF, tl.where(is_turned, dims - HALF, dims))
    table = cos_sin + tl.load(positions + token) * (2 * HALF) + tl.where(is_low, dims, dims - HALF)
    turn = (tl.load(table, is_turned, 1.0), tl.load(table + HALF, is_turned, 0.0))
    q_scales = _around(q_weight, dims, across, D, IS_NORMED)
    k_scales = _around(k_weight, dims, across, D, IS_NORMED)
    slot = tl.load(slots + token)
    if IS_CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.arange(0, ROWS)
    is_row = place < G
    row = qkv + token * stride + tl.zeros([1, 1], tl.int32)
    q = _turned(
        row + (head * G + place)[:, None] * D, q_scales, turn, dims, across, is_row[:, None], eps,
        D, HALF, IS_NORMED, IS_WIDE,
    )  # fmt: skip
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    if split == 0:
        inside = dims < D
        at = (slot // SIZE) * block_stride + (slot % SIZE) * D + head * (SIZE * D)
        key = _turned(
            row + (H + head) * D, k_scales, turn, dims, across, inside, eps, D, HALF, IS_NORMED, IS_WIDE
        )  # fmt: skip
        value = tl.load(row + (H + K + head) * D + dims, inside, 0.0)
        tl.store(key_cache + at + dims, key, inside)
        tl.store(value_cache + at + dims, value, inside)
        most = _squeezed(tl.sum(q.to(tl.float32) * key.to(tl.float32), 1), scale, cap, HAS_CAP)
        total += 1.0
        sums += value.to(tl.float32)
    if HAS_WINDOW:
        is_seen &= keys > end - 1 - window
    most, total, sums = _after(
        (most, total, sums), q, k, v, is_seen, scale, cap, HAS_CAP, PRECISION
    )
    position = end - 1 + tl.zeros([ROWS], tl.int32)
    low += N
    open_to = low
    if not HAS_WINDOW:
        open_to = low + tl.maximum(0, high - low) // N * N
    for start in range(low, open_to, N):
        most, total, sums = _seen(
            (most, total, sums), q, q, key_cache, value_cache, row_of_table, start, high, head,
            position, block_stride, scale, cap, window, SIZE, D, D, DP, 16, N,
            False, True, HAS_CAP, PRECISION,
        )  # fmt: skip
    for start in range(open_to, high, N):
        most, total, sums = _seen(
            (most, total, sums), q, q, key_cache, value_cache, row_of_table, start, high, head,
            position, block_stride, scale, cap, window, SIZE, D, D, DP, 16, N,
            True, True, HAS_CAP, PRECISION,
        )  # fmt: skip
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    is_kept = is_row[:, None] & (dims < D)
    to = token * H + head * G + place
    if SPLITS == 1:
        tl.store(out + to[:, None] * D + dims, result.to(out.dtype.element_ty), is_kept)
    else:
        if used == 1:
            tl.store(out + to[:, None] * D + dims, result.to(out.dtype.element_ty), is_kept)
        else:
            to = to * SPLITS + split
            tl.store(parts + to[:, None] * D + dims, result, is_kept)
            tl.store(part_lse + to, (most + tl.log2(total)) / 1.4426950408889634, is_row)
            tl.debug_barrier()  # all of them are written before it is said
            counter = arrived + token * K + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                _merge(parts, part_lse, out, token * H + head * G, used, G, D, DP, SPLITS, AT_ONCE)
                tl.store(counter, 0)
