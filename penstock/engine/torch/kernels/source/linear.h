// Linear layers over packed weights, one tile of the output at a time.
//
// A tile is at most 64 rows by 128 outputs, summed over 1024 inputs at a time, so that the rows stay in the second
// level cache while the weights pass. With few rows the weights are simply read once, in order.
#pragma once
#include "calls.h"
#include "product.h"

namespace VARIANT {

constexpr int64_t AHEAD_BYTES = 2048;  // how far in front of the sums the weights are asked for

template <class T>
struct LinearPiece {
    const typename Format<T>::Left* rows;  // [rows][LINEAR_DEPTH]
    const T* panels;                       // the first panel, at the first input of this pass
    float* sums;                           // [rows][LINEAR_PANELS * 16]
    int64_t panel_size;
    int depth;

    template <int R, int N>
    inline void run(int row, int panel) const {
        constexpr int PAIR = Format<T>::PAIR;
        constexpr int WIDE = LINEAR_PANELS * GROUP;
        float* at = sums + row * WIDE + panel * GROUP;
        Lanes sum[R][N];
        const T *right[N], *ahead[N];
        UNROLL for (int n = 0; n < N; ++n) {
            right[n] = panels + (panel + n) * panel_size;
            ahead[n] = right[n] + AHEAD_BYTES / sizeof(T);
            UNROLL for (int r = 0; r < R; ++r) sum[r][n] = fill(0);
        }
        const typename Format<T>::Left* left = rows + int64_t(row) * LINEAR_DEPTH;
        multiply_add<R, N>(sum, left, LINEAR_DEPTH, right, ahead, GROUP * PAIR, depth / PAIR);
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) {
                float* to = at + r * WIDE + n * GROUP;
                store(to, load(to) + sum[r][n]);
            }
    }
};

// Sixteen sums of a row, from `column` on, to where they belong.
template <class T>
static inline void put_sums(const T* bias, T* out, int64_t num_out, int64_t column, const float* sums) {
    if (column + GROUP <= num_out) {
        Lanes value = load(sums);
        if (bias) value = value + load(bias + column);
        store(out + column, value);
        return;
    }
    T last[GROUP];
    float padded[GROUP];
    for (int i = 0; i < GROUP; ++i) {
        bool inside = bias && column + i < num_out;
        padded[i] = sums[i] + (inside ? to_float(bias[column + i]) : 0);
    }
    store(last, load(padded));
    for (int i = 0; column + i < num_out; ++i) out[column + i] = last[i];
}

template <class T>
static void linear_as(const LinearCall& call, int64_t first_row, int64_t first_panel, char* scratch) {
    typedef typename Format<T>::Left Left;
    constexpr int WIDE = LINEAR_PANELS * GROUP;
    const int64_t all_panels = (call.num_out + GROUP - 1) / GROUP;
    const int rows = int(call.num_rows - first_row < LINEAR_ROWS ? call.num_rows - first_row : LINEAR_ROWS);
    const int panels = int(all_panels - first_panel < LINEAR_PANELS ? all_panels - first_panel : LINEAR_PANELS);
    float* sums = (float*)scratch;
    Left* left = (Left*)(sums + LINEAR_ROWS * WIDE);
    const T* x = (const T*)call.x + first_row * call.x_stride;
    const T* weight = (const T*)call.weight + first_panel * GROUP * call.num_in;
    for (int i = 0; i < rows * WIDE; i += GROUP) store(sums + i, fill(0));
    for (int64_t begin = 0; begin < call.num_in; begin += LINEAR_DEPTH) {
        const int depth = int(call.num_in - begin < LINEAR_DEPTH ? call.num_in - begin : LINEAR_DEPTH);
        for (int row = 0; row < rows; ++row)
            for (int d = 0; d < depth; d += GROUP)
                store(left + row * LINEAR_DEPTH + d, load(x + row * call.x_stride + begin + d));
        const LinearPiece<T> piece{left, weight + begin * GROUP, sums, GROUP * call.num_in, depth};
        sweep(piece, rows, panels);
    }
    for (int row = 0; row < rows; ++row)
        for (int panel = 0; panel < panels; ++panel)
            put_sums((const T*)call.bias, (T*)call.out + (first_row + row) * call.num_out, call.num_out,
                     (first_panel + panel) * GROUP, sums + row * WIDE + panel * GROUP);
}

static void linear(const LinearCall& call, int64_t row, int64_t panel, char* scratch) {
    call.bf16 ? linear_as<bf16>(call, row, panel, scratch) : linear_as<float>(call, row, panel, scratch);
}

}  // namespace VARIANT
