// The two products of attention over a tile of keys: scores = queries x keys (columns: tokens) and
// outputs += probabilities x values (columns: dimensions), a few rows and columns at a time so that the sums stay in
// registers.
//
// With few rows the stored numbers are widened on the way into each product; with many a tile is widened once, into
// floats (Groups<float>). Both add the same numbers in the same order, so a row does not depend on how many others
// there are. A bfloat16 dot-product instruction takes the stored pairs as they are, and eight bits widened to such.
//
// Blocks lie anywhere, so the processor cannot guess the next ones: the first rows to use a line of a tile ask for a
// line of the next tile, in the order in which these lie in memory. Into the second level: the first has no room
// for a tile beside the one in use.
#pragma once
#include "cached.h"

namespace VARIANT {

constexpr int TILE_GROUPS = 4;
constexpr int TILE = TILE_GROUPS * GROUP;
constexpr int LATENT_GROUPS = 1;  // a tile of latents: they are long
constexpr int LINE = 64;
constexpr int INTO = LANE_BYTES == 64 ? 2 : 3;  // the level that takes a decode's values: a fifth faster on Zen 4

// Where the keys and values of a tile lie; `count` groups.
template <class S>
struct Groups {
    int count;
    const S *keys[TILE_GROUPS], *values[TILE_GROUPS];
    const float *key_scales[TILE_GROUPS], *value_scales[TILE_GROUPS];  // of eight bits
};

// sum[r][n] += left[r] * column for all r
template <int R, int N, class Left>
static inline void add_column(Lanes (&sum)[R][N], int n, const Left* left, int64_t stride, const Lanes& column) {
    UNROLL for (int r = 0; r < R; ++r) {
        const float factor = left[r * stride];
        EACH_PART sum[r][n].part[p] = sum[r][n].part[p] + factor * column.part[p];
    }
}

// sum[r][n] += left[r] . right[n], over `count` steps of one number; right advances by `step` elements. `ahead`: what
// to ask for, a line for each line read, where ASKS.
template <bool ASKS, int R, int N, class S>
static inline void accumulate(Lanes (&sum)[R][N], const float* left, int64_t stride, const S* const (&right)[N],
                              int64_t step, int count, const char* const (&ahead)[N]) {
    constexpr int STEPS = LINE / (GROUP * sizeof(S));  // that a line holds
    for (int k = 0; k < count; k += STEPS) {
        if (ASKS) UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(ahead[n] + k / STEPS * LINE, 0, 2);
        UNROLL for (int i = 0; i < STEPS; ++i)
            UNROLL for (int n = 0; n < N; ++n)
                add_column<R, N>(sum, n, left + k + i, stride, read(right[n] + (k + i) * step));
    }
}

#ifdef DOT_BF16
// The k'th pairs of a column.
static inline Bits pairs_at(const bf16* right, int64_t step, int k) { return load_bits(right + k * step); }
static inline Bits pairs_at(const Byte* right, int64_t step, int k) {
    return paired(right + 2 * k * step, right + (2 * k + 1) * step);
}

template <bool ASKS, int R, int N, class S>
static inline void accumulate(Lanes (&sum)[R][N], const bf16* left, int64_t stride, const S* const (&right)[N],
                              int64_t step, int count, const char* const (&ahead)[N]) {
    constexpr int STEPS = 2 / sizeof(S);  // that a line holds
    for (int at = 0; at < count / 2; at += STEPS) {
        if (ASKS) UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(ahead[n] + at / STEPS * LINE, 0, 2);
        UNROLL for (int k = at; k < at + STEPS; ++k) {
            Bits column[N];
            UNROLL for (int n = 0; n < N; ++n) column[n] = pairs_at(right[n], step, k);
            UNROLL for (int r = 0; r < R; ++r) {
                uint32_t pair;
                memcpy(&pair, left + r * stride + 2 * k, 4);
                UNROLL for (int n = 0; n < N; ++n) sum[r][n] = dot_pairs(sum[r][n], pair, column[n]);
            }
        }
    }
}
#else
// Lower halves before upper ones, and the upper ones loaded again: both at once do not fit beside the sums.
template <bool ASKS, int R, int N>
static inline void accumulate(Lanes (&sum)[R][N], const float* left, int64_t stride, const bf16* const (&right)[N],
                              int64_t step, int count, const char* const (&ahead)[N]) {
    for (int k = 0; k < count / 2; ++k) {
        if (ASKS) UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(ahead[n] + k * LINE, 0, 2);
        UNROLL for (int n = 0; n < N; ++n)
            add_column<R, N>(sum, n, left + 2 * k, stride, lower(load_bits(right[n] + k * step)));
        asm volatile("" ::: "memory");
        UNROLL for (int n = 0; n < N; ++n)
            add_column<R, N>(sum, n, left + 2 * k + 1, stride, upper(load_bits(right[n] + k * step)));
    }
}
#endif

template <class S, bool ASKS>
struct ScorePiece {
    const typename Format<S>::Left* query;
    float* scores;  // [rows][TILE]
    const Groups<S>&here, &next;
    int dim;

    template <int R, int N>
    inline void run(int row, int group) const {
        Lanes sum[R][N];
        const S* right[N];
        const char* ahead[N];
        UNROLL for (int n = 0; n < N; ++n) {
            right[n] = here.keys[group + n];
            ahead[n] = (const char*)(ASKS && row == 0 && group + n < next.count ? next.keys[group + n] : right[n]);
            UNROLL for (int r = 0; r < R; ++r) sum[r][n] = fill(0);
        }
        accumulate<ASKS, R, N>(sum, query + int64_t(row) * dim, dim, right, GROUP * Format<S>::PAIR, dim, ahead);
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) store(scores + (row + r) * TILE + (group + n) * GROUP, sum[r][n]);
    }
};

template <class S, bool ASKS>
struct OutputPiece {
    const float* scores;  // probabilities lie where the scores were
    float* out;           // [rows][dim]
    const Groups<S>&here, &next;
    int dim, value_stride;  // of a row of outputs, and of what lies between a value's token and the next

    // The part of the next tile's values that goes with a column of a group of this one.
    const char* ahead_of(int row, int column, int group, const S* right) const {
        if (!ASKS || row > 0 || next.count < here.count) return (const char*)right;
        const int columns = dim / GROUP, index = column * here.count + group;
        return (const char*)(next.values[index / columns] + index % columns * GROUP * GROUP);
    }

    template <int R, int N>
    inline void run(int row, int column) const {
        typedef typename Format<S>::Left Left;
        constexpr int STRIDE = TILE * 4 / sizeof(Left), PAIR = Format<S>::PAIR;
        const Left* left = (const Left*)(scores + row * TILE);
        float* to = out + int64_t(row) * dim + column * GROUP;
        Lanes sum[R][N];
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) sum[r][n] = load(to + r * dim + n * GROUP);
        for (int group = 0; group < here.count; ++group) {
            const S* right[N];
            const char* ahead[N];
            UNROLL for (int n = 0; n < N; ++n) {
                right[n] = here.values[group] + (column + n) * GROUP * PAIR;
                ahead[n] = ahead_of(row, column + n, group, right[n]);
            }
            accumulate<ASKS, R, N>(sum, left + group * GROUP, STRIDE, right, value_stride * PAIR, GROUP, ahead);
        }
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) store(to + r * dim + n * GROUP, sum[r][n]);
    }
};

// sum[r] += the tokens of a line of values, or of two that the dot product pairs, each times its probability; `next`:
// from a line to the other
template <int R, class S>
static inline void add_line(Lanes (&sum)[R], const float* left, int64_t stride, const S* line, int64_t) {
    const Lanes column = read(line);
    UNROLL for (int r = 0; r < R; ++r) {
        const float factor = left[r * stride];
        EACH_PART sum[r].part[p] = sum[r].part[p] + factor * column.part[p];
    }
}

#ifdef DOT_BF16
template <int R, class S>
static inline void add_line(Lanes (&sum)[R], const bf16* left, int64_t stride, const S* line, int64_t next) {
    const Bits pairs = pairs_at(line, next, 0);
    UNROLL for (int r = 0; r < R; ++r) {
        uint32_t pair;
        memcpy(&pair, left + r * stride, 4);
        sum[r] = dot_pairs(sum[r], pair, pairs);
    }
}
#else
template <int R>
static inline void add_line(Lanes (&sum)[R], const float* left, int64_t stride, const bf16* line, int64_t) {
    const Bits pairs = load_bits(line);
    const Lanes first = lower(pairs), second = upper(pairs);
    UNROLL for (int r = 0; r < R; ++r) {
        const float one = left[r * stride], other = left[r * stride + 1];
        EACH_PART sum[r].part[p] = sum[r].part[p] + one * first.part[p];
        EACH_PART sum[r].part[p] = sum[r].part[p] + other * second.part[p];
    }
}
#endif

// As OutputPiece, of one group and all columns, in the order in which values lie: for what is read from memory.
template <class S>
struct OutputPass {
    static constexpr int PAIR = Format<S>::PAIR, LINES = sizeof(S) == 1 ? 8 : 4;  // side by side
    static constexpr int STEP = sizeof(typename Format<S>::Left) == 2 && PAIR == 1 ? 2 : 1;  // of them in a product
    const float* scores;  // of the group, in rows of TILE
    float* out;           // [rows][dim]
    const S *values, *next;
    int dim;

    template <int R>
    inline void run(int row) const {
        typedef typename Format<S>::Left Left;
        constexpr int STRIDE = TILE * 4 / sizeof(Left);
        const Left* left = (const Left*)(scores + row * TILE);
        const int64_t line = dim * PAIR, most = GROUP / PAIR;
        for (int first = 0; first < most; first += LINES) {
            const S* from = values + first * line;
            const S* ahead = row ? from : first + LINES < most ? from + LINES * line : next;
            for (int d = 0; d < dim; d += GROUP) {
                Lanes sum[R];
                UNROLL for (int r = 0; r < R; ++r) sum[r] = load(out + int64_t(row + r) * dim + d);
                if (sizeof(S) > 1 || d % LINE == 0)
                    UNROLL for (int i = 0; i < LINES; ++i) __builtin_prefetch(ahead + i * line + d * PAIR, 0, INTO);
                UNROLL for (int i = 0; i < LINES; i += STEP)
                    add_line<R>(sum, left + (first + i) * PAIR, STRIDE, from + i * line + d * PAIR, line);
                UNROLL for (int r = 0; r < R; ++r) store(out + int64_t(row + r) * dim + d, sum[r]);
            }
        }
    }

    void all(int rows) const {
        int row = 0;
        for (; row + 4 <= rows; row += 4) run<4>(row);
        if (rows - row == 3) run<3>(row);
        if (rows - row == 2) run<2>(row);
        if (rows - row == 1) run<1>(row);
    }
};

// Scores of R rows and two tokens whose numbers lie side by side: lanes run along the vectors.
template <int R>
static inline void dot_pair(float* scores, const float* query, const float* keys, int dim) {
    FloatPart sum[R][2];
    UNROLL for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = FloatPart{};
    for (int d = 0; d < dim; d += WIDTH) {
        const FloatPart first = *(const FloatsAt*)(keys + d), second = *(const FloatsAt*)(keys + dim + d);
        UNROLL for (int r = 0; r < R; ++r) {
            const FloatPart left = *(const FloatsAt*)(query + r * dim + d);
            sum[r][0] = sum[r][0] + left * first, sum[r][1] = sum[r][1] + left * second;
        }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < 2; ++t) {
        float part[WIDTH];
        UNROLL for (int i = 0; i < WIDTH; ++i) part[i] = sum[r][t][i];
        UNROLL for (int half = WIDTH / 2; half > 0; half /= 2)
            UNROLL for (int i = 0; i < half; ++i) part[i] += part[i + half];
        scores[r * TILE + t] = part[0];
    }
}

#ifdef DOT_BF16
// The same for pairs of bfloat16, N tokens at a time.
template <int R, int N>
static inline void dot_tokens(float* scores, const bf16* query, const bf16* keys, int dim) {
    constexpr int STEP = 2 * WIDTH;
    static_assert(PARTS == 1, "a vector is all lanes");
    Lanes sum[R][N];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int n = 0; n < N; ++n) sum[r][n] = fill(0);
    auto add = [&](int d, int count) __attribute__((always_inline)) {
        auto numbers = [&](const bf16* from) __attribute__((always_inline)) {
            Bits found{};
            memcpy(&found, from + d, sizeof(bf16) * count);
            return found;
        };
        Bits key[N];
        UNROLL for (int n = 0; n < N; ++n) key[n] = numbers(keys + n * dim);
        UNROLL for (int r = 0; r < R; ++r) {
            const Bits row = numbers(query + r * dim);
            UNROLL for (int n = 0; n < N; ++n) sum[r][n] = dot_pairs(sum[r][n], row, key[n]);
        }
    };
    int d = 0;
    for (; d + STEP <= dim; d += STEP) add(d, STEP);
    if (d < dim) add(d, STEP / 2);
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int n = 0; n < N; ++n) scores[r * TILE + n] = sum_of(sum[r][n]);
}

static void dot_group(float* scores, const bf16* query, int rows, const bf16* keys, int dim) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        for (int t = 0; t < GROUP; t += 4)
            dot_tokens<4, 4>(scores + row * TILE + t, query + int64_t(row) * dim, keys + t * dim, dim);
    for (; row < rows; ++row)
        for (int t = 0; t < GROUP; t += 4)
            dot_tokens<1, 4>(scores + row * TILE + t, query + int64_t(row) * dim, keys + t * dim, dim);
}
#endif

static void dot_group(float* scores, const float* query, int rows, const float* keys, int dim) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        for (int t = 0; t < GROUP; t += 2)
            dot_pair<4>(scores + row * TILE + t, query + int64_t(row) * dim, keys + t * dim, dim);
    for (; row < rows; ++row)
        for (int t = 0; t < GROUP; t += 2)
            dot_pair<1>(scores + row * TILE + t, query + int64_t(row) * dim, keys + t * dim, dim);
}

// Calls piece.template run<R, N>(row, column) until rows x columns are covered, MOST rows at a time.
template <int MOST, class Piece>
static inline void cover(const Piece& piece, int rows, int columns) {
    int row = 0;
    for (; row + MOST <= rows; row += MOST) sweep_columns<MOST>(piece, row, columns);
    if constexpr (MOST > 4)
        if (rows - row >= 4) sweep_columns<4>(piece, row, columns), row += 4;
    if (rows - row == 3) sweep_columns<3>(piece, row, columns);
    if (rows - row == 2) sweep_columns<2>(piece, row, columns);
    if (rows - row == 1) sweep_columns<1>(piece, row, columns);
}

}  // namespace VARIANT
