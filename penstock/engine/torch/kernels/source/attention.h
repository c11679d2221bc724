// Attention over paged memory, one Item at a time: online softmax over tiles of 64 keys.
//
// The rows of an item are its queries times the query heads that share the key/value head, so each key and value is
// loaded once for all of them. Both halves of the work are one product, `multiply_add`: scores = queries x keys
// (columns: tokens) and outputs += probabilities x values (columns: dimensions).
//
// Scores are kept in powers of two (scale * log2 e is folded in, and into a cap): p = 2^(score - highest).
// Keys outside [key_begin, key_end) may be anything, NaN included: their scores are replaced before use, and a value
// group that holds some is copied with zeros in their place, since 0 * NaN is NaN.
#pragma once
#include "calls.h"
#include "product.h"

namespace VARIANT {

constexpr int TILE_GROUPS = 4;
constexpr int TILE = TILE_GROUPS * GROUP;
constexpr float LOWEST = -1e30f;  // the running maximum before any key: finite, so that differences stay numbers
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

template <class T>
struct Scratch {
    float *out, *scores, *highest, *total;
    typename Format<T>::Left* query;
    T* edges;  // two value groups
};

static inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t scratch_bytes(const AttentionCall& call, int64_t rows) {
    int64_t dim = call.head_dim;
    return 2 * aligned(rows * dim * 4) + aligned(rows * TILE * 4) + 2 * aligned(rows * 4) + 2 * GROUP * dim * 4;
}

template <class T>
static Scratch<T> carve(char* at, int64_t rows, int64_t dim) {
    Scratch<T> scratch;
    scratch.out = (float*)at, at += aligned(rows * dim * 4);
    scratch.query = (typename Format<T>::Left*)at, at += aligned(rows * dim * 4);
    scratch.scores = (float*)at, at += aligned(rows * TILE * 4);
    scratch.highest = (float*)at, at += aligned(rows * 4);
    scratch.total = (float*)at, at += aligned(rows * 4);
    scratch.edges = (T*)at;
    return scratch;
}

// Where the keys and values of a tile lie; `count` groups.
template <class T>
struct Groups {
    int count;
    const T *keys[TILE_GROUPS], *values[TILE_GROUPS];
};

// The first rows to use a part of a tile ask for the same part of the next tile: blocks lie anywhere, so the
// processor cannot guess them.
template <class T>
struct ScorePiece {
    const Scratch<T>& scratch;
    const Groups<T>&here, &next;
    int dim;

    template <int R, int N>
    inline void run(int row, int group) const {
        constexpr int PAIR = Format<T>::PAIR;
        Lanes sum[R][N];
        const T *right[N], *ahead[N];
        UNROLL for (int n = 0; n < N; ++n) {
            right[n] = here.keys[group + n];
            ahead[n] = row == 0 && group + n < next.count ? next.keys[group + n] : right[n];
            UNROLL for (int r = 0; r < R; ++r) sum[r][n] = fill(0);
        }
        multiply_add<R, N>(sum, scratch.query + int64_t(row) * dim, dim, right, ahead, GROUP * PAIR, dim / PAIR);
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n)
                store(scratch.scores + (row + r) * TILE + (group + n) * GROUP, sum[r][n]);
    }
};

template <class T>
struct OutputPiece {
    const Scratch<T>& scratch;
    const Groups<T>&here, &next;
    int dim;

    template <int R, int N>
    inline void run(int row, int column) const {
        constexpr int PAIR = Format<T>::PAIR;
        typedef typename Format<T>::Left Left;
        constexpr int STRIDE = TILE * 4 / sizeof(Left);  // probabilities lie where the scores were
        const Left* left = (const Left*)(scratch.scores + row * TILE);
        float* out = scratch.out + int64_t(row) * dim + column * GROUP;
        Lanes sum[R][N];
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) sum[r][n] = load(out + r * dim + n * GROUP);
        for (int group = 0; group < here.count; ++group) {
            const T *right[N], *ahead[N];
            UNROLL for (int n = 0; n < N; ++n) {
                right[n] = here.values[group] + (column + n) * GROUP * PAIR;
                ahead[n] = row == 0 && group < next.count ? next.values[group] + (column + n) * GROUP * PAIR : right[n];
            }
            multiply_add<R, N>(sum, left + group * GROUP, STRIDE, right, ahead, dim * PAIR, GROUP / PAIR);
        }
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) store(out + r * dim + n * GROUP, sum[r][n]);
    }
};

// cap * tanh(x / cap)
static inline Lanes squeezed(const Lanes& x, float cap) {
    const Lanes power = exp2(x * fill(2 * LOG2_E / cap)), one = fill(1);
    return fill(cap) * (power - one) / (power + one);
}

// Turns one row of scores into probabilities, in place; keys [from, upto) of the tile are visible.
template <class T>
static inline void soften(const Scratch<T>& scratch, int row, int groups, int from, int upto, const AttentionCall& call) {
    typedef typename Format<T>::Left Left;
    float* scores = scratch.scores + row * TILE;
    Left* probabilities = (Left*)scores;
    const int dim = call.head_dim;
    const bool capped = call.cap < __builtin_inff();
    const Lanes factor = fill(call.scale * LOG2_E), hidden = fill(-__builtin_inff());
    const bool whole = from <= 0 && upto >= groups * GROUP;
    Lanes best = hidden, x[TILE_GROUPS];
    for (int g = 0; g < groups; ++g) {
        x[g] = load(scores + g * GROUP) * factor;
        if (capped) x[g] = squeezed(x[g], call.cap * LOG2_E);
        if (!whole) x[g] = choose(within(g * GROUP, from, upto), x[g], hidden);
        best = greater_of(x[g], best);
    }
    float peak = greatest_of(best);
    if (peak > scratch.highest[row]) {
        Lanes shrink = exp2(fill(scratch.highest[row] - peak));
        scratch.total[row] *= shrink.part[0][0];
        scratch.highest[row] = peak;
        float* out = scratch.out + int64_t(row) * dim;
        for (int d = 0; d < dim; d += GROUP) store(out + d, load(out + d) * shrink);
    }
    const Lanes highest = fill(scratch.highest[row]);
    Lanes total = fill(0);
    for (int g = 0; g < groups; ++g) {
        Lanes p = exp2(x[g] - highest);
        if (!whole) p = choose(within(g * GROUP, from, upto), p, fill(0));
        total = total + p;
        store(probabilities + g * GROUP, p);
    }
    scratch.total[row] += sum_of(total);
}

struct Range {
    int from, upto;
};

// The positions that query `index` of a chunk sees.
static inline Range visible(const AttentionCall& call, int chunk, int index) {
    int context = call.context[chunk];
    if (!call.causal) return {0, context};
    int queries = call.query_start[chunk + 1] - call.query_start[chunk];
    int upto = context - queries + index + 1;
    return {upto > call.window ? upto - call.window : 0, upto};
}

template <class T>
static void copy_visible(T* to, const T* group, Range valid, int dim) {
    constexpr int PAIR = Format<T>::PAIR;
    for (int t = 0; t < GROUP; ++t)
        for (int d = 0; d < dim; ++d) {
            int64_t at = (t / PAIR) * dim * PAIR + d * PAIR + t % PAIR;
            to[at] = t >= valid.from && t < valid.upto ? group[at] : T(0);
        }
}

template <class T>
static void load_queries(const AttentionCall& call, const Item& item, const Scratch<T>& scratch) {
    int dim = call.head_dim, share = call.num_heads / call.num_kv_heads;
    int64_t token = call.query_start[item.chunk] + item.first_query;
    for (int row = 0; row < item.num_queries * share; ++row) {
        const T* from = (const T*)call.query + (token + row / share) * call.query_stride +
                        (int64_t(item.kv_head) * share + row % share) * dim;
        for (int d = 0; d < dim; d += GROUP) {
            store(scratch.query + int64_t(row) * dim + d, load(from + d));
            store(scratch.out + int64_t(row) * dim + d, fill(0));
        }
        scratch.highest[row] = LOWEST;
        scratch.total[row] = 0;
    }
}

template <class T>
static Groups<T> find_groups(const AttentionCall& call, const Item& item, int start) {
    Groups<T> found;
    found.count = 0;
    for (int at = start; found.count < TILE_GROUPS && at < item.key_end; at += GROUP, ++found.count) {
        int64_t block = call.block_table[item.chunk * call.table_stride + at / call.block_size];
        int64_t offset = ((block * call.num_kv_heads + item.kv_head) * call.block_size + at % call.block_size) *
                         int64_t(call.head_dim);
        found.keys[found.count] = (const T*)call.key_cache + offset;
        found.values[found.count] = (const T*)call.value_cache + offset;
    }
    return found;
}

template <class T>
static void clean_edges(const AttentionCall& call, const Item& item, int start, Groups<T>& groups, T* edges) {
    for (int group = 0; group < groups.count; ++group) {
        int at = start + group * GROUP;
        Range valid = {item.key_begin - at, item.key_end - at};
        if (valid.from <= 0 && valid.upto >= GROUP) continue;
        copy_visible(edges, groups.values[group], valid, call.head_dim);
        groups.values[group] = edges;
        edges += GROUP * call.head_dim;
    }
}

template <class T>
static void put_row(const AttentionCall& call, const Item& item, int row, const float* out, float highest,
                    float total) {
    int dim = call.head_dim, share = call.num_heads / call.num_kv_heads;
    int64_t token = call.query_start[item.chunk] + item.first_query + row / share;
    int64_t head = token * call.num_heads + item.kv_head * share + row % share;
    Lanes weight = fill(total != 0 ? 1 / total : 0);
    for (int d = 0; d < dim; d += GROUP) store((T*)call.out + head * dim + d, load(out + d) * weight);
    if (call.lse)
        call.lse[head] = total != 0 ? highest * LN_2 + __builtin_logf(total) : -__builtin_inff();
}

template <class T>
static void finish(const AttentionCall& call, const Item& item, const Scratch<T>& scratch) {
    int dim = call.head_dim, rows = item.num_queries * (call.num_heads / call.num_kv_heads);
    if (item.partial) {
        memcpy(item.partial, scratch.out, int64_t(rows) * dim * 4);
        memcpy(item.partial + int64_t(rows) * dim, scratch.highest, rows * 4);
        memcpy(item.partial + int64_t(rows) * (dim + 1), scratch.total, rows * 4);
        return;
    }
    for (int row = 0; row < rows; ++row)
        put_row<T>(call, item, row, scratch.out + int64_t(row) * dim, scratch.highest[row], scratch.total[row]);
}

template <class T>
static void attend_as(const AttentionCall& call, const Item& item, char* memory) {
    int dim = call.head_dim, share = call.num_heads / call.num_kv_heads, rows = item.num_queries * share;
    Scratch<T> scratch = carve<T>(memory, rows, dim);
    load_queries(call, item, scratch);
    int start = item.key_begin / GROUP * GROUP;
    Groups<T> next = find_groups<T>(call, item, start);
    for (; start < item.key_end; start += TILE) {
        Groups<T> here = next;
        next = find_groups<T>(call, item, start + TILE);
        clean_edges(call, item, start, here, scratch.edges);
        sweep(ScorePiece<T>{scratch, here, next, dim}, rows, here.count);
        for (int row = 0; row < rows; ++row) {
            Range seen = visible(call, item.chunk, item.first_query + row / share);
            if (seen.from < item.key_begin) seen.from = item.key_begin;
            if (seen.upto > item.key_end) seen.upto = item.key_end;
            soften(scratch, row, here.count, seen.from - start, seen.upto - start, call);
        }
        sweep(OutputPiece<T>{scratch, here, next, dim}, rows, dim / GROUP);
    }
    finish(call, item, scratch);
}

static void attend(const AttentionCall& call, const Item& item, char* scratch) {
    if (call.bf16)
        attend_as<bf16>(call, item, scratch);
    else
        attend_as<float>(call, item, scratch);
}

// Joins the partial results of one item's key ranges, always in the order given.
template <class T>
static void merge_as(const AttentionCall& call, const Item& item, const float* const* partials, int count) {
    int dim = call.head_dim, rows = item.num_queries * (call.num_heads / call.num_kv_heads);
    float out[1024];
    for (int row = 0; row < rows; ++row) {
        float highest = LOWEST, total = 0;
        for (int i = 0; i < count; ++i) {
            float one = partials[i][int64_t(rows) * dim + row];
            highest = one > highest ? one : highest;
        }
        for (int d = 0; d < dim; ++d) out[d] = 0;
        for (int i = 0; i < count; ++i) {
            const float* part = partials[i] + int64_t(row) * dim;
            Lanes weight = exp2(fill(partials[i][int64_t(rows) * dim + row] - highest));
            total += weight.part[0][0] * partials[i][int64_t(rows) * (dim + 1) + row];
            for (int d = 0; d < dim; d += GROUP) store(out + d, load(out + d) + load(part + d) * weight);
        }
        put_row<T>(call, item, row, out, highest, total);
    }
}

static void merge(const AttentionCall& call, const Item& item, const float* const* partials, int count) {
    if (call.bf16)
        merge_as<bf16>(call, item, partials, count);
    else
        merge_as<float>(call, item, partials, count);
}

template <class T>
static void write_as(const AttentionCall& call, int64_t begin, int64_t end) {
    constexpr int PAIR = Format<T>::PAIR;
    int64_t dim = call.head_dim;
    for (int64_t token = begin; token < end; ++token) {
        int64_t slot = call.slots[token], block = slot / call.block_size, offset = slot % call.block_size;
        int64_t in_group = offset % GROUP;
        for (int64_t head = 0; head < call.num_kv_heads; ++head) {
            int64_t group = ((block * call.num_kv_heads + head) * call.block_size + offset - in_group) * dim;
            const T* key = (const T*)call.key + token * call.key_stride + head * dim;
            const T* value = (const T*)call.value + token * call.value_stride + head * dim;
            T* to_key = (T*)call.key_cache + group + in_group * PAIR;
            T* to_value = (T*)call.value_cache + group + (in_group / PAIR) * dim * PAIR + in_group % PAIR;
            for (int64_t d = 0; d < dim; d += PAIR)
                for (int i = 0; i < PAIR; ++i) to_key[d * GROUP + i] = key[d + i];
            for (int64_t d = 0; d < dim; ++d) to_value[d * PAIR] = value[d];
        }
    }
}

static void write(const AttentionCall& call, int64_t begin, int64_t end) {
    if (call.bf16)
        write_as<bf16>(call, begin, end);
    else
        write_as<float>(call, begin, end);
}

}  // namespace VARIANT
