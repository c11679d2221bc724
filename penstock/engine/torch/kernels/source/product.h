// The one inner loop of attention and of linear layers: a few rows of floats or bfloat16 times packed columns.
//
// A packed column block is [steps][16][P]: 16 columns side by side, P = 2 elements of each together for bfloat16, so
// that 64 bytes are one step. Rows (`left`) are taken one number, or one pair, at a time and spread over the lanes.
#pragma once
#include "calls.h"
#include "lanes.h"

namespace VARIANT {

// How `left` rows (queries, probabilities) are kept for a product: as the dot product wants them, or as floats.
template <class T>
struct Format {
    static constexpr int PAIR = 1;
    typedef float Left;
};
template <>
struct Format<bf16> {
    static constexpr int PAIR = 2;
#ifdef DOT_BF16
    typedef bf16 Left;
#else
    typedef float Left;
#endif
};

// Eight bits beside rows of bfloat16. The dot product takes them as pairs of bfloat16, which hold them.
#ifdef DOT_BF16
struct Byte {
    int8_t value;
};
template <>
struct Format<Byte> {
    static constexpr int PAIR = 1;
    typedef bf16 Left;
};
#else
typedef int8_t Byte;
#endif

// sum[r][n] += left[r] * column[n]
template <int R, int N>
static inline void add_products(Lanes (&sum)[R][N], const float* left, int64_t left_stride, const Lanes (&column)[N]) {
    UNROLL for (int r = 0; r < R; ++r) {
        const float factor = left[r * left_stride];
        UNROLL for (int n = 0; n < N; ++n)
            EACH_PART sum[r][n].part[p] = sum[r][n].part[p] + factor * column[n].part[p];
    }
}

// sum[r][n] += left[r] . right[n], over `count` steps (pairs for bf16); right advances by `step` elements.
template <int R, int N>
static inline void multiply_add(Lanes (&sum)[R][N], const float* left, int64_t left_stride,
                                const float* const (&right)[N], const float* const (&next)[N], int64_t step, int count) {
    for (int k = 0; k < count; ++k) {
        Lanes column[N];
        UNROLL for (int n = 0; n < N; ++n) column[n] = load(right[n] + k * step), __builtin_prefetch(next[n] + k * step);
        add_products<R, N>(sum, left + k, left_stride, column);
    }
}

#ifdef DOT_BF16
template <int R, int N>
static inline void multiply_add(Lanes (&sum)[R][N], const bf16* left, int64_t left_stride,
                                const bf16* const (&right)[N], const bf16* const (&next)[N], int64_t step, int count) {
    for (int k = 0; k < count; ++k) {
        Bits column[N];
        UNROLL for (int n = 0; n < N; ++n) column[n] = load_bits(right[n] + k * step), __builtin_prefetch(next[n] + k * step);
        UNROLL for (int r = 0; r < R; ++r) {
            uint32_t pair;
            memcpy(&pair, left + r * left_stride + 2 * k, 4);
            UNROLL for (int n = 0; n < N; ++n) sum[r][n] = dot_pairs(sum[r][n], pair, column[n]);
        }
    }
}
#else
template <int R, int N>
static inline void multiply_add(Lanes (&sum)[R][N], const float* left, int64_t left_stride,
                                const bf16* const (&right)[N], const bf16* const (&next)[N], int64_t step, int count) {
    for (int k = 0; k < count; ++k) {
        Lanes even[N], odd[N];
        UNROLL for (int n = 0; n < N; ++n) {
            Bits pairs = load_bits(right[n] + k * step);
            __builtin_prefetch(next[n] + k * step);
            EACH_PART {
                even[n].part[p] = (FloatPart)(pairs.part[p] << 16);
                odd[n].part[p] = (FloatPart)(pairs.part[p] & 0xffff0000u);
            }
        }
        add_products<R, N>(sum, left + 2 * k, left_stride, even);
        add_products<R, N>(sum, left + 2 * k + 1, left_stride, odd);
    }
}
#endif

// Calls piece.template run<R, N>(row, column) until rows x columns are covered, in pieces that fill the registers.
constexpr int SUMS = LANE_BYTES == 64 ? 16 : 4;  // Lanes that fit beside the operands

template <int R, class Piece>
static inline void sweep_columns(const Piece& piece, int row, int columns) {
    constexpr int N = SUMS / R < 1 ? 1 : (SUMS / R > 4 ? 4 : SUMS / R);
    int column = 0;
    for (; column + N <= columns; column += N) piece.template run<R, N>(row, column);
    if constexpr (N > 2)
        if (column + 2 <= columns) piece.template run<R, 2>(row, column), column += 2;
    for (; column < columns; ++column) piece.template run<R, 1>(row, column);
}

template <class Piece>
static inline void sweep(const Piece& piece, int rows, int columns) {
    int row = 0;
    for (; row + 4 <= rows; row += 4) sweep_columns<4>(piece, row, columns);
    if (rows - row == 3) sweep_columns<3>(piece, row, columns);
    if (rows - row == 2) sweep_columns<2>(piece, row, columns);
    if (rows - row == 1) sweep_columns<1>(piece, row, columns);
}

}  // namespace VARIANT
