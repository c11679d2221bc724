// Linear layers over packed weights, one tile of the output at a time.
//
// An output is one chain of sums over its inputs, in order, whatever else is computed beside it. A tile is at most 128
// rows by 256 outputs. With few rows the weights are read once, in order, and widened on the way into each product.
// With many, a panel's next 256 inputs are widened once, into a block that stays in the nearest cache while all rows
// pass: then nothing but products is left in the inner loop, and the registers hold six rows of sums. Meanwhile what
// the next block is made of is asked for.
//
// An instruction that multiplies pairs of bfloat16 (DOT_BF16) takes weights and rows as they are. Twelve rows by two
// panels are 24 sums in registers, and 14 loads for 24 instructions. Rows that are no more pass two panels from end to
// end. Of more, all pass a block of two panels: the first read it from memory, the others ask for the block after it.
#pragma once
#include "calls.h"
#include "product.h"
#include "tiles.h"

namespace VARIANT {

constexpr int64_t AHEAD_BYTES = 2048;  // how far in front of the sums the weights are asked for
constexpr bool IS_WIDE = LANE_BYTES == 64;
constexpr int64_t WIDE_AHEAD = 3072;  // the same into the second level, which is faster by a third where AVX-512 is
constexpr int WIDE = LINEAR_PANELS * GROUP;  // from a row's sums to the next one's
constexpr int FEW_ROWS = 64, FEW_DEPTH = 1024;  // of rows that stay in the second level while weights pass as they lie

template <class T>
struct LinearPiece {
    const typename Format<T>::Left* rows;  // [rows][FEW_DEPTH]
    const T* panels;                       // the first panel, at the first input of this pass
    float* sums;                           // [rows][WIDE]
    int64_t panel_size;
    int depth;

    template <int R, int N>
    inline void run(int row, int panel) const {
        constexpr int PAIR = Format<T>::PAIR;
            float* at = sums + row * WIDE + panel * GROUP;
        Lanes sum[R][N];
        const T *right[N], *ahead[N];
        UNROLL for (int n = 0; n < N; ++n) {
            right[n] = panels + (panel + n) * panel_size;
            ahead[n] = right[n] + AHEAD_BYTES / sizeof(T);
            UNROLL for (int r = 0; r < R; ++r) sum[r][n] = load(at + r * WIDE + n * GROUP);
        }
        const typename Format<T>::Left* left = rows + int64_t(row) * FEW_DEPTH;
        multiply_add<R, N>(sum, left, FEW_DEPTH, right, ahead, GROUP * PAIR, depth / PAIR);
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) store(at + r * WIDE + n * GROUP, sum[r][n]);
    }
};

// Many rows: where a block of widened weights pays, and how many of its inputs lie between two lines asked for.
constexpr int WIDENED_ROWS = LANE_BYTES == 32 ? 16 : LINEAR_ROWS + 1;
constexpr int WIDENED_DEPTH = 256, ASKING_STEP = 4;

#define SEPARATE __attribute__((noinline))  // beside other code, sums are put on the stack and a fifth of the speed goes

// Two inputs of a panel, from as they are stored to floats.
static inline Lanes first_of(const float* from) { return load(from); }
static inline Lanes second_of(const float* from) { return load(from + GROUP); }
static inline Lanes first_of(const bf16* from) { return lower(load_bits(from)); }
static inline Lanes second_of(const bf16* from) { return upper(load_bits(from)); }

template <class T>
struct WidenedPanel {
    const T* stored;
    float* block;
    int depth;
    const char* next;  // what the block after this one is made of

    // The first R rows: makes the block on the way.
    template <int R>
    SEPARATE void first(float* sums, const float* rows) const {
            Lanes sum[R][1];
        UNROLL for (int r = 0; r < R; ++r) sum[r][0] = load(sums + r * WIDE);
        for (int d = 0; d < depth; d += 2) {
            const Lanes even[1] = {first_of(stored + d * GROUP)};
            store(block + d * GROUP, even[0]);
            add_products<R, 1>(sum, rows + d, WIDENED_DEPTH, even);
            asm volatile("" ::: "memory");  // both at once do not fit beside the sums
            const Lanes odd[1] = {second_of(stored + d * GROUP)};
            store(block + d * GROUP + GROUP, odd[0]);
            add_products<R, 1>(sum, rows + d + 1, WIDENED_DEPTH, odd);
        }
        UNROLL for (int r = 0; r < R; ++r) store(sums + r * WIDE, sum[r][0]);
    }

    // R more rows; asks for the part'th part of what comes next.
    template <int R>
    SEPARATE void more(float* sums, const float* rows, int part) const {
            const char* ahead = next + part % int(sizeof(T)) * (depth / ASKING_STEP * LINE);
        Lanes sum[R][1];
        UNROLL for (int r = 0; r < R; ++r) sum[r][0] = load(sums + r * WIDE);
        for (int d = 0; d < depth; d += ASKING_STEP, ahead += LINE) {
            __builtin_prefetch(ahead, 0, 2);
            UNROLL for (int i = 0; i < ASKING_STEP; ++i) {
                const Lanes column[1] = {load(block + (d + i) * GROUP)};
                add_products<R, 1>(sum, rows + d + i, WIDENED_DEPTH, column);
            }
        }
        UNROLL for (int r = 0; r < R; ++r) store(sums + r * WIDE, sum[r][0]);
    }

    // Five rows at a time keep both multipliers busy, and the registers full; four or six where fives do not fit.
    void all(float* sums, const float* rows, int count) const {
        const int pieces = (count + 2) / 5;
        for (int i = 0, row = 0; i < pieces; ++i) {
            const int end = count * (i + 1) / pieces;
            float* to = sums + row * WIDE;
            const float* left = rows + row * WIDENED_DEPTH;
            if (end - row == 4) i ? more<4>(to, left, i) : first<4>(to, left);
            if (end - row == 5) i ? more<5>(to, left, i) : first<5>(to, left);
            if (end - row == 6) i ? more<6>(to, left, i) : first<6>(to, left);
            row = end;
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

// The rows and panels of a call's tile.
template <class T>
struct LinearTile {
    const T *x, *weight;
    int64_t x_stride, num_in;
    int rows, panels;
};

// Rows as the products take them: `depth` inputs from `begin` on.
template <class T, class Left>
static void take_rows(const LinearTile<T>& tile, Left* left, int64_t stride, int64_t begin, int depth) {
    for (int row = 0; row < tile.rows; ++row)
        for (int d = 0; d < depth; d += GROUP)
            store(left + row * stride + d, load(tile.x + row * tile.x_stride + begin + d));
}

template <class T>
static void few_rows(const LinearTile<T>& tile, float* sums, typename Format<T>::Left* left) {
    for (int64_t begin = 0; begin < tile.num_in; begin += FEW_DEPTH) {
        const int depth = int(tile.num_in - begin < FEW_DEPTH ? tile.num_in - begin : FEW_DEPTH);
        take_rows(tile, left, FEW_DEPTH, begin, depth);
        const LinearPiece<T> piece{left, tile.weight + begin * GROUP, sums, GROUP * tile.num_in, depth};
        sweep(piece, tile.rows, tile.panels);
    }
}

template <class T>
static void many_rows(const LinearTile<T>& tile, float* sums, float* left) {
    float* block = left + LINEAR_ROWS * WIDENED_DEPTH;
    for (int64_t begin = 0; begin < tile.num_in; begin += WIDENED_DEPTH) {
        const int depth = int(tile.num_in - begin < WIDENED_DEPTH ? tile.num_in - begin : WIDENED_DEPTH);
        take_rows(tile, left, WIDENED_DEPTH, begin, depth);
        for (int panel = 0; panel < tile.panels; ++panel) {
            const T* here = tile.weight + (panel * tile.num_in + begin) * GROUP;
            const bool is_last = panel + 1 == tile.panels;
            const T* next = is_last ? tile.weight + (begin + depth) * GROUP : here + tile.num_in * GROUP;
            const WidenedPanel<T> widened{here, block, depth, (const char*)next};
            widened.all(sums + panel * GROUP, left, tile.rows);
        }
    }
}

static int64_t linear_scratch() {
    constexpr int WIDENED = (LINEAR_ROWS + GROUP) * WIDENED_DEPTH, FEW = FEW_ROWS * FEW_DEPTH;
    return sizeof(float) * (LINEAR_ROWS * WIDE + (WIDENED > FEW ? WIDENED : FEW));
}

template <class T>
static void multiply(const LinearTile<T>& tile, float* sums, float* left) {
    if (tile.rows >= WIDENED_ROWS) return many_rows(tile, sums, left);
    for (int row = 0; row < tile.rows; row += FEW_ROWS) {
        LinearTile<T> part = tile;
        part.x += row * tile.x_stride;
        part.rows = tile.rows - row < FEW_ROWS ? tile.rows - row : FEW_ROWS;
        few_rows(part, sums + row * WIDE, (typename Format<T>::Left*)left);
    }
}

#ifdef DOT_BF16
constexpr int DOT_ROWS = 12, DOT_PANELS = 2, DOT_DEPTH = 256, DOT_FEW_DEPTH = 8192;

// Some inputs of a few panels beside each other, and of the rows that pass them.
struct DotBlock {
    const bf16 *rows, *panels;
    int64_t row_stride, panel_size;
    int depth;
    const bf16* next;  // what comes after it

    // The first rows to pass ask for the panels themselves, those of other parts for one of the panels that come next.
    template <int R, int N>
    SEPARATE void run(float* sums, const bf16* left, int part) const {
        Lanes sum[R][N];
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) sum[r][n] = load(sums + r * WIDE + n * GROUP);
        const bf16* ahead = next + (part - 1) % N * panel_size;
        for (int d = 0; d < depth; d += 2) {
            Bits column[N];
            UNROLL for (int n = 0; n < N; ++n) {
                const bf16* line = panels + n * panel_size + d * GROUP;
                if (!part) __builtin_prefetch((const char*)line + WIDE_AHEAD, 0, 2);
                column[n] = load_bits(line);
            }
            if (part) __builtin_prefetch(ahead + d * GROUP, 0, 2);
            UNROLL for (int r = 0; r < R; ++r) {
                uint32_t pair;
                memcpy(&pair, left + r * row_stride + d, 4);
                UNROLL for (int n = 0; n < N; ++n) sum[r][n] = dot_pairs(sum[r][n], pair, column[n]);
            }
        }
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) store(sums + r * WIDE + n * GROUP, sum[r][n]);
    }

    template <int R, int N>
    void pick(float* sums, const bf16* left, int count, int part) const {
        if (count == R) return run<R, N>(sums, left, part);
        if constexpr (R > 1) pick<R - 1, N>(sums, left, count, part);
    }

    // All rows, in parts of nearly one size.
    template <int N>
    void all(float* sums, int count) const {
        const int parts = (count + DOT_ROWS - 1) / DOT_ROWS;
        for (int part = 0, row = 0; part < parts; ++part) {
            const int end = count * (part + 1) / parts;
            pick<DOT_ROWS, N>(sums + row * WIDE, rows + row * row_stride, end - row, part);
            row = end;
        }
    }
};

static_assert(DOT_ROWS * (DOT_FEW_DEPTH + 2 * GROUP) <= 2 * FEW_ROWS * FEW_DEPTH, "a copy of few rows fits");

static void multiply(const LinearTile<bf16>& tile, float* sums, float* scratch) {
    // Rows' strides are not multiples of the nearest cache's size, or they would push each other out of it.
    const int most = tile.rows <= DOT_ROWS ? DOT_FEW_DEPTH : DOT_DEPTH, stride = most + GROUP * 2;
    bf16* copy = (bf16*)scratch;
    const int64_t panel_size = tile.num_in * GROUP;
    for (int64_t begin = 0, end; begin < tile.num_in; begin = end) {
        end = tile.num_in - begin < most ? tile.num_in : begin + most;
        for (int row = 0; row < tile.rows; ++row)
            memcpy(copy + row * stride, tile.x + row * tile.x_stride + begin, size_t(end - begin) * sizeof(bf16));
        const bf16* onward = tile.weight + (end < tile.num_in ? end * GROUP : tile.panels * panel_size);
        DotBlock block{copy, nullptr, stride, panel_size, int(end - begin), nullptr};
        for (int panel = 0, beside; panel < tile.panels; panel += beside) {
            beside = tile.panels - panel < DOT_PANELS ? 1 : DOT_PANELS;
            block.panels = tile.weight + panel * panel_size + begin * GROUP;
            block.next = panel + beside < tile.panels ? block.panels + beside * panel_size : onward;
            float* to = sums + panel * GROUP;
            beside == 1 ? block.all<1>(to, tile.rows) : block.all<DOT_PANELS>(to, tile.rows);
        }
    }
}
#endif

template <class T>
static void linear_as(const LinearCall& call, int64_t first_row, int64_t first_panel, int panels, char* scratch) {
    const int64_t all_panels = (call.num_out + GROUP - 1) / GROUP;
    LinearTile<T> tile{(const T*)call.x + first_row * call.x_stride,
                       (const T*)call.weight + first_panel * GROUP * call.num_in, call.x_stride, call.num_in, 0, 0};
    tile.rows = int(call.num_rows - first_row < LINEAR_ROWS ? call.num_rows - first_row : LINEAR_ROWS);
    tile.panels = int(all_panels - first_panel < panels ? all_panels - first_panel : panels);
    float* sums = (float*)scratch;
    for (int row = 0; row < tile.rows; ++row)
        for (int panel = 0; panel < tile.panels; ++panel) store(sums + row * WIDE + panel * GROUP, fill(0));
    multiply(tile, sums, sums + LINEAR_ROWS * WIDE);
    for (int row = 0; row < tile.rows; ++row)
        for (int panel = 0; panel < tile.panels; ++panel)
            put_sums((const T*)call.bias, (T*)call.out + (first_row + row) * call.num_out, call.num_out,
                     (first_panel + panel) * GROUP, sums + row * WIDE + panel * GROUP);
}

static void linear(const LinearCall& call, int64_t row, int64_t panel, int panels, char* scratch) {
    call.bf16 ? linear_as<bf16>(call, row, panel, panels, scratch) : linear_as<float>(call, row, panel, panels, scratch);
}

}  // namespace VARIANT
