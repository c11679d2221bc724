// Attention over paged memory, one Item at a time: online softmax over tiles of 64 keys.
//
// The rows of an item are its queries times the query heads that share the key/value head, so each key and value is
// loaded once for all of them. T is what queries and results are, S what the cache holds.
//
// Scores are kept in powers of two (scale * log2 e is folded in, and into a cap): p = 2^(score - highest).
// Eight bits: a token's key scale multiplies its scores, its value scale its probabilities.
// Keys outside [key_begin, key_end) may be anything, NaN included: their scores are replaced before use, and a value
// group that holds some is copied with zeros in their place, since 0 * NaN is NaN.
//
// A step that decodes reads all there is once, so what counts is the order: the heads of an item pass each pair of
// groups one after the other, as they lie in a block, keys and then values of a tile.
#pragma once
#include "tiles.h"

namespace VARIANT {

constexpr float LOWEST = -1e30f;  // the running maximum before any key: finite, so that differences stay numbers
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr int WIDE_ROWS = 12;  // from here on a tile is widened once
constexpr int WIDE_STEP = LANE_BYTES == 32 ? 6 : 4;
constexpr int ABREAST_GROUPS = LANE_BYTES == 64 ? 2 : 1;  // that four rows of a decoding query are scored with

template <class S>
static constexpr bool takes_stored() {  // as the dot product takes them, whatever the rows
    return sizeof(S) == 2 && sizeof(typename Format<S>::Left) == 2;
}

struct Scratch {
    float *out, *scores, *highest, *total;
    float *keys, *values;  // a widened tile; what is read as it lies uses them for cleaned values
    char* query;           // Format<S>::Left
};

static inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int EDGES = 2 * GROUP;  // tokens of a head's cleaned values in a tile

static int64_t scratch_bytes(const AttentionCall& call, int64_t rows) {
    const int64_t dim = call.head_dim, tile = 2 * TILE > MOST_ABREAST * EDGES ? 2 * TILE : MOST_ABREAST * EDGES;
    return 2 * aligned(rows * dim * 4) + aligned(rows * TILE * 4) + 2 * aligned(rows * 4) + tile * dim * 4;
}

static Scratch carve(char* at, int64_t rows, int64_t dim) {
    Scratch scratch;
    scratch.out = (float*)at, at += aligned(rows * dim * 4);
    scratch.query = at, at += aligned(rows * dim * 4);
    scratch.scores = (float*)at, at += aligned(rows * TILE * 4);
    scratch.highest = (float*)at, at += aligned(rows * 4);
    scratch.total = (float*)at, at += aligned(rows * 4);
    scratch.keys = (float*)at, at += TILE * dim * 4;
    scratch.values = (float*)at;
    return scratch;
}

// Of one head among several that have `rows` rows each. Floats take the most room.
static Scratch scratch_of(const Scratch& all, int64_t head, int64_t rows, int64_t dim) {
    Scratch one = all;
    const int64_t first = head * rows;
    one.out += first * dim, one.query += first * dim * 4, one.scores += first * TILE;
    one.highest += first, one.total += first;
    one.values = all.keys + head * EDGES * dim;
    return one;
}

// cap * tanh(x / cap)
static inline Lanes squeezed(const Lanes& x, float cap) {
    const Lanes power = exp2(x * fill(2 * LOG2_E / cap)), one = fill(1);
    return fill(cap) * (power - one) / (power + one);
}

// Turns one row of scores into probabilities, in place; keys `seen` of the tile are visible.
template <class Left, class S>
static inline void soften(const AttentionCall& call, const Scratch& scratch, int row, const Groups<S>& here, Range seen) {
    float* scores = scratch.scores + row * TILE;
    const int dim = call.value_dim, groups = here.count;
    const bool capped = call.cap < __builtin_inff(), whole = seen.from <= 0 && seen.upto >= groups * GROUP;
    const Lanes factor = fill(call.scale * LOG2_E), hidden = fill(-__builtin_inff());
    Lanes best = hidden, x[TILE_GROUPS];
    for (int g = 0; g < groups; ++g) {
        x[g] = load(scores + g * GROUP) * factor;
        if (has_scales<S>()) x[g] = x[g] * load(here.key_scales[g]);
        if (capped) x[g] = squeezed(x[g], call.cap * LOG2_E);
        if (!whole) x[g] = choose(within(g * GROUP, seen.from, seen.upto), x[g], hidden);
        best = greater_of(x[g], best);
    }
    const float peak = greatest_of(best);
    if (peak > scratch.highest[row]) {
        const Lanes shrink = exp2(fill(scratch.highest[row] - peak));
        scratch.total[row] *= shrink.part[0][0];
        scratch.highest[row] = peak;
        float* out = scratch.out + int64_t(row) * dim;
        for (int d = 0; d < dim; d += GROUP) store(out + d, load(out + d) * shrink);
    }
    const Lanes highest = fill(scratch.highest[row]);
    Lanes total = fill(0);
    for (int g = 0; g < groups; ++g) {
        Lanes p = exp2(x[g] - highest);
        if (!whole) p = choose(within(g * GROUP, seen.from, seen.upto), p, fill(0));
        total = total + p;
        if (has_scales<S>()) {
            p = p * load(here.value_scales[g]);  // of a token never written: anything
            if (!whole) p = choose(within(g * GROUP, seen.from, seen.upto), p, fill(0));
        }
        store((Left*)scores + g * GROUP, p);
    }
    scratch.total[row] += sum_of(total);
}

// The positions that query `index` of a chunk sees.
static inline Range visible(const AttentionCall& call, int chunk, int index) {
    int context = call.context[chunk];
    if (!call.causal) return {0, context};
    int queries = call.query_start[chunk + 1] - call.query_start[chunk];
    int upto = context - queries + index + 1;
    return {upto > call.window ? upto - call.window : 0, upto};
}

template <class Left, class S>
static void soften_all(const AttentionCall& call, const Item& item, const Scratch& scratch, int rows, int start,
                       const Groups<S>& here) {
    const int share = call.num_heads / call.num_kv_heads;
    for (int row = 0, query = item.first_query; row < rows; ++query) {
        Range seen = visible(call, item.chunk, query);
        if (seen.from < item.key_begin) seen.from = item.key_begin;
        if (seen.upto > item.key_end) seen.upto = item.key_end;
        const Range here_seen{seen.from - start, seen.upto - start};
        for (int head = 0; head < share; ++head, ++row) soften<Left>(call, scratch, row, here, here_seen);
    }
}

template <class T, class Left>
static void load_queries(const AttentionCall& call, const Item& item, const Scratch& scratch, int rows) {
    const int dim = call.head_dim, share = call.num_heads / call.num_kv_heads;
    const int64_t token = call.query_start[item.chunk] + item.first_query;
    for (int row = 0; row < rows; ++row) {
        const T* from = (const T*)call.query + (token + row / share) * call.query_stride +
                        (int64_t(item.kv_head) * share + row % share) * dim;
        for (int d = 0; d < dim; d += GROUP) store((Left*)scratch.query + int64_t(row) * dim + d, load(from + d));
        scratch.highest[row] = LOWEST;
        scratch.total[row] = 0;
    }
    for (int at = 0; at < rows * call.value_dim; at += GROUP) store(scratch.out + at, fill(0));
}

template <class S>
static Groups<S> find_groups(const AttentionCall& call, const Item& item, int start, int most) {
    Groups<S> found;
    found.count = 0;
    for (int at = start; found.count < most && at < item.key_end; at += GROUP, ++found.count) {
        const int64_t block = call.block_table[item.chunk * call.table_stride + at / call.block_size];
        const int offset = at % call.block_size, n = found.count;
        const char* keys = head_at<S>(call, call.key_cache, block, item.kv_head);
        const char* values = call.is_latent ? keys : head_at<S>(call, call.value_cache, block, item.kv_head);
        found.keys[n] = (const S*)keys + offset * int64_t(call.head_dim);
        found.values[n] = (const S*)values + offset * int64_t(call.head_dim);
        if (!has_scales<S>()) continue;
        found.key_scales[n] = scales_at<S>(call, keys) + offset;
        found.value_scales[n] = scales_at<S>(call, values) + offset;
        __builtin_prefetch(found.key_scales[n]), __builtin_prefetch(found.value_scales[n]);
    }
    return found;
}

static inline Range valid_of(const Item& item, int at) { return {item.key_begin - at, item.key_end - at}; }

// What is read as it lies: at most two groups have tokens that do not count. Eight bits are never NaN.
template <class S>
static void clean_edges(const AttentionCall& call, const Item& item, int start, Groups<S>& groups, S* edges) {
    if (has_scales<S>()) return;
    for (int group = 0; group < groups.count; ++group) {
        const Range valid = valid_of(item, start + group * GROUP);
        if (valid.from <= 0 && valid.upto >= GROUP) continue;
        memcpy(edges, groups.values[group], sizeof(S) * GROUP * call.head_dim);
        clear_hidden(edges, valid, call.head_dim);
        groups.values[group] = edges;
        edges += GROUP * call.head_dim;
    }
}

// Groups in the scratch memory, widened to floats. Returns those of the keys; latents are their own values.
template <class S>
static const float* widen_group(const AttentionCall& call, float* keys, float*& values, const S* const (&from)[2],
                                const S* const (&next)[2]) {
    if (call.is_latent) {
        widen_rows(values = keys, from[0], next[0], call.head_dim);
        return keys;
    }
    widen_keys(keys, from[0], next[0], call.head_dim);
    widen_values(values, from[1], next[1], call.head_dim);
    return keys;
}

#ifdef DOT_BF16
// The same, widened to pairs of bfloat16.
template <class S>
static const bf16* widen_group(const AttentionCall& call, bf16* keys, bf16*& values, const S* const (&from)[2],
                               const S* const (&next)[2]) {
    widen_values(values, from[1], next[1], call.head_dim, call.value_dim);
    if (call.is_latent) return rows_of(keys, from[0], call.head_dim);
    if constexpr (!takes_stored<S>()) widen_keys(keys, from[0], next[0], call.head_dim);
    return keys;
}
#endif

template <class S>
static Groups<typename Format<S>::Left> widen(const AttentionCall& call, const Item& item, const Scratch& scratch,
                                              int start, const Groups<S>& from, const Groups<S>& next) {
    typedef typename Format<S>::Left Left;
    const int dim = call.head_dim;
    Groups<Left> wide;
    wide.count = from.count;
    for (int g = 0; g < from.count; ++g) {
        Left* values = (Left*)scratch.values + g * GROUP * dim;
        const Groups<S>& then = g < next.count ? next : from;
        wide.keys[g] = widen_group<S>(call, (Left*)scratch.keys + g * GROUP * dim, values,
                                      {from.keys[g], from.values[g]}, {then.keys[g], then.values[g]});
        clear_hidden(values, valid_of(item, start + g * GROUP), dim);
        wide.values[g] = values;
    }
    return wide;
}

template <class T>
static void put_row(const AttentionCall& call, const Item& item, int row, const float* out, float highest,
                    float total) {
    const int dim = call.value_dim, share = call.num_heads / call.num_kv_heads;
    const int64_t token = call.query_start[item.chunk] + item.first_query + row / share;
    const int64_t head = token * call.num_heads + item.kv_head * share + row % share;
    const Lanes weight = fill(total != 0 ? 1 / total : 0);
    for (int d = 0; d < dim; d += GROUP) store((T*)call.out + head * dim + d, load(out + d) * weight);
    if (call.lse)
        call.lse[head] = total != 0 ? highest * LN_2 + __builtin_logf(total) : -__builtin_inff();
}

template <class T>
static void finish(const AttentionCall& call, const Item& item, const Scratch& scratch, int rows) {
    const int dim = call.value_dim;
    if (item.partial) {
        memcpy(item.partial, scratch.out, int64_t(rows) * dim * 4);
        memcpy(item.partial + int64_t(rows) * dim, scratch.highest, rows * 4);
        memcpy(item.partial + int64_t(rows) * (dim + 1), scratch.total, rows * 4);
        return;
    }
    for (int row = 0; row < rows; ++row)
        put_row<T>(call, item, row, scratch.out + int64_t(row) * dim, scratch.highest[row], scratch.total[row]);
}

// How a tile is read: as it lies, widened first, or as latents, which are always widened.
enum class Way { AS_STORED, WIDENED, LATENT };

template <class S>
static void attend_tile(const AttentionCall& call, const Item& item, const Scratch& scratch, int rows, int start,
                        Groups<S> here, const Groups<S>& next) {
    typedef typename Format<S>::Left Left;
    const int dim = call.head_dim;
    clean_edges(call, item, start, here, (S*)scratch.values);
    cover<4>(ScorePiece<S, true>{(const Left*)scratch.query, scratch.scores, here, next, dim}, rows, here.count);
    soften_all<Left>(call, item, scratch, rows, start, here);
    cover<4>(OutputPiece<S, true>{scratch.scores, scratch.out, here, next, dim, dim}, rows, dim / GROUP);
}

// Some groups of a tile, of the head that lies `head` heads behind the one they were found for.
template <class S>
static Groups<S> groups_of(const AttentionCall& call, const Groups<S>& tile, int head, int first, int most) {
    const int64_t skip = head * head_bytes<S>(call);
    Groups<S> found;
    found.count = tile.count - first < most ? tile.count - first : most;
    for (int n = 0; n < found.count; ++n) {
        found.keys[n] = (const S*)((const char*)tile.keys[first + n] + skip);
        found.values[n] = (const S*)((const char*)tile.values[first + n] + skip);
        if (!has_scales<S>()) continue;
        found.key_scales[n] = (const float*)((const char*)tile.key_scales[first + n] + skip);
        found.value_scales[n] = (const float*)((const char*)tile.value_scales[first + n] + skip);
    }
    return found;
}

// One query, all heads of an item.
template <class T, class S>
struct Abreast {
    typedef typename Format<S>::Left Left;
    const AttentionCall& call;
    const Item& item;
    const Scratch scratch;
    const int rows;  // of each head
    const int together;  // groups that a head is scored with before the next one is

    Item item_of(int head) const {
        Item one = item;
        one.kv_head += head, one.num_kv_heads = 1;
        return one;
    }
    Scratch scratch_at(int head) const { return scratch_of(scratch, head, rows, call.head_dim); }

    // The at'th groups that are scored together, and the at'th that is put out, in the order in which they are read.
    Groups<S> scored(const Groups<S>& tile, int at) const {
        const int heads = item.num_kv_heads;
        return groups_of(call, tile, at % heads, at / heads * together, together);
    }
    Groups<S> put(const Groups<S>& tile, int at) const {
        return groups_of(call, tile, at % item.num_kv_heads, at / item.num_kv_heads, 1);
    }

    void score(const Groups<S>& tile) const {
        const int heads = item.num_kv_heads, pieces = (tile.count + together - 1) / together * heads;
        for (int at = 0; at < pieces; ++at) {
            const Scratch own = scratch_at(at % heads);
            const Groups<S> here = scored(tile, at);
            Groups<S> next = at + 1 < pieces ? scored(tile, at + 1) : put(tile, 0);
            if (at + 1 == pieces) next.keys[0] = next.values[0];
            float* scores = own.scores + at / heads * together * GROUP;
            cover<4>(ScorePiece<S, true>{(const Left*)own.query, scores, here, next, call.head_dim}, rows, here.count);
        }
    }

    void put_out(const Groups<S>& tile, const Groups<S>& next_tile, int start) const {
        const int dim = call.head_dim, heads = item.num_kv_heads, pieces = tile.count * heads;
        for (int at = 0; at < pieces; ++at) {
            const Scratch own = scratch_at(at % heads);
            Groups<S> here = put(tile, at);
            const S* next = here.values[0];
            if (at + 1 < pieces)
                next = put(tile, at + 1).values[0];
            else if (next_tile.count)
                next = next_tile.keys[0];
            clean_edges(call, item, start + at / heads * GROUP, here, (S*)own.values);
            const float* scores = own.scores + at / heads * GROUP * sizeof(Left) / sizeof(float);
            OutputPass<S>{scores, own.out, here.values[0], next, dim}.all(rows);
        }
    }

    void attend() const {
        for (int head = 0; head < item.num_kv_heads; ++head)
            load_queries<T, Left>(call, item_of(head), scratch_at(head), rows);
        int start = item.key_begin / GROUP * GROUP;
        Groups<S> next = find_groups<S>(call, item, start, TILE_GROUPS);
        for (; start < item.key_end; start += TILE) {
            const Groups<S> tile = next;
            next = find_groups<S>(call, item, start + TILE, TILE_GROUPS);
            score(tile);
            for (int head = 0; head < item.num_kv_heads; ++head)
                soften_all<Left>(call, item_of(head), scratch_at(head), rows, start,
                                 groups_of(call, tile, head, 0, TILE_GROUPS));
            put_out(tile, next, start);
        }
        for (int head = 0; head < item.num_kv_heads; ++head) finish<T>(call, item_of(head), scratch_at(head), rows);
    }
};

template <Way W, class S>
static void attend_widened(const AttentionCall& call, const Item& item, const Scratch& scratch, int rows, int start,
                           const Groups<S>& here, const Groups<S>& next) {
    typedef typename Format<S>::Left Left;
    const int dim = call.head_dim, out_dim = call.value_dim;
    const Left* query = (const Left*)scratch.query;
    const Groups<Left> wide = widen(call, item, scratch, start, here, next), none{};
    if (W == Way::LATENT)
        for (int g = 0; g < wide.count; ++g) dot_group(scratch.scores + g * GROUP, query, rows, wide.keys[g], dim);
    else
        cover<WIDE_STEP>(ScorePiece<Left, false>{query, scratch.scores, wide, none, dim}, rows, wide.count);
    soften_all<Left>(call, item, scratch, rows, start, here);
    const OutputPiece<Left, false> piece{scratch.scores, scratch.out, wide, none, out_dim, dim};
    cover<WIDE_STEP>(piece, rows, out_dim / GROUP);
}

template <Way W, class T, class S>
static void attend_by(const AttentionCall& call, const Item& item, char* memory, int rows) {
    constexpr int MOST = W == Way::LATENT ? LATENT_GROUPS : TILE_GROUPS;
    const Scratch scratch = carve(memory, rows, call.head_dim);
    load_queries<T, typename Format<S>::Left>(call, item, scratch, rows);
    int start = item.key_begin / GROUP * GROUP;
    Groups<S> next = find_groups<S>(call, item, start, MOST);
    for (; start < item.key_end; start += MOST * GROUP) {
        const Groups<S> here = next;
        next = find_groups<S>(call, item, start + MOST * GROUP, MOST);
        if constexpr (W == Way::AS_STORED)
            attend_tile(call, item, scratch, rows, start, here, next);
        else
            attend_widened<W>(call, item, scratch, rows, start, here, next);
    }
    finish<T>(call, item, scratch, rows);
}

template <class T, class S>
static void attend_abreast(const AttentionCall& call, const Item& item, char* memory, int rows) {
    const int few = rows == 1 ? TILE_GROUPS : 2, together = rows >= 4 ? ABREAST_GROUPS : few;  // sums that fill registers
    const Scratch scratch = carve(memory, int64_t(rows) * item.num_kv_heads, call.head_dim);
    Abreast<T, S>{call, item, scratch, rows, together}.attend();
}

template <class T, class S>
static void attend_as(const AttentionCall& call, const Item& item, char* memory) {
    const int rows = item.num_queries * (call.num_heads / call.num_kv_heads);
    if (item.num_queries == 1 && !call.is_latent && (takes_stored<S>() || rows < WIDE_ROWS))
        return attend_abreast<T, S>(call, item, memory, rows);
    if (item.num_kv_heads > 1) {
        Item one = item;
        for (one.num_kv_heads = 1; one.kv_head < item.kv_head + item.num_kv_heads; ++one.kv_head)
            attend_as<T, S>(call, one, memory);
        return;
    }
    if (call.is_latent)
        attend_by<Way::LATENT, T, S>(call, item, memory, rows);
    else if (takes_stored<S>() || rows < WIDE_ROWS)
        attend_by<Way::AS_STORED, T, S>(call, item, memory, rows);
    else
        attend_by<Way::WIDENED, T, S>(call, item, memory, rows);
}

static void attend(const AttentionCall& call, const Item& item, char* scratch) {
    if (call.eight_bits)
        call.bf16 ? attend_as<bf16, Byte>(call, item, scratch) : attend_as<float, int8_t>(call, item, scratch);
    else
        call.bf16 ? attend_as<bf16, bf16>(call, item, scratch) : attend_as<float, float>(call, item, scratch);
}

// Joins the partial results of one item's key ranges, always in the order given.
template <class T>
static void merge_as(const AttentionCall& call, const Item& item, const float* const* partials, int count) {
    const int dim = call.value_dim, rows = item.num_queries * (call.num_heads / call.num_kv_heads);
    float out[LARGEST_DIM];
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

}  // namespace VARIANT
