// Linear layers whose weights are of 8 or 4 bits: out = x w^T + bias.
//
//     w[o, i] = scale[o, g] (code[o, i] - zero[o, g])        x[m, i] ~ step[m, g] byte[m, i]        g = i / group
//     out[m, o] = sum over g of step[m, g] scale[o, g] (sum of byte code over the group - zero[o, g] sum of byte)
//
// Rows are quantised first, group by group: the largest of a group becomes 127. The sums inside a group are exact, and
// those over groups run in one order, so a row's result does not depend on what other rows are there.
//
// A few rows pass over a few panels of 16 outputs together, as many as there are registers for the sums of a group; those
// over groups are in memory. With few rows the weights are read once, from end to end. With many, all rows of a tile
// pass a block of some inputs, and the panels' part of it stays in the first level: the first rows to pass ask for it,
// the others for a quarter of the block that comes next.
#pragma once
#include "bytes.h"
#include "calls.h"
#include "linear.h"

namespace VARIANT {

// float16 to float takes a shift and a product with this; scales of rows have it in them already.
constexpr float HALF_UNIT = 5192296858534827628530496329220096.0f;  // 2^112

constexpr int QUANTISED_WIDE = QUANTISED_PANELS * GROUP;  // from a row's sums to the next one's
constexpr int QUANTISED_DEPTH = IS_WIDE ? 256 : 1024, QUANTISED_FEW = IS_WIDE ? 6 : 4;

// What is computed at a time.
struct QuantisedTile {
    int64_t row, panel;
    int rows, panels;
};

// What the codes that are summed are too small by.
static inline int32_t base_of(int bits) { return bits == 8 ? 128 - CODE_OF_ZERO_8 : 0; }

// What a row's sum is kept multiplied by: where all zeros are the same, sums over a group just begin there.
static inline int32_t shift_of(const QuantisedCall& call) {
    return call.zeros ? 1 : base_of(call.bits) - (call.bits == 8 ? 128 : 8);
}

// Of `count` inputs, the rest of the group being zeros: bytes, their step and their sum.
template <class T>
static inline RowGroup quantise_group(const QuantisedCall& call, const T* x, int count, int8_t* bytes) {
    const float ROUNDER = 12582912.0f;  // see exp2
    float padded[128];
    Lanes most = fill(0), never = fill(0);
    for (int i = 0; i < call.group; i += GROUP) {
        Lanes value;
        if (i + GROUP <= count) {
            value = load(x + i);
        } else {
            for (int k = i; k < i + GROUP; ++k) padded[k] = k < count ? to_float(x[k]) : 0;
            value = load(padded + i);
        }
        store(padded + i, value);
        most = greater_of(most, greater_of(value, fill(0) - value));
        never = never + value * fill(0);  // not zero where x is no number
    }
    const float largest = greatest_of(most);
    const Lanes inverse = fill(largest > 0 ? 127 / largest : 0);
    Ints sum = fill_ints(0);
    for (int i = 0; i < call.group; i += GROUP) {
        const Lanes value = load(padded + i) * inverse;
        Ints whole;
        EACH_PART {
            whole.part[p] = (MaskPart)(value.part[p] + ROUNDER) - 0x4b400000;
            sum.part[p] += whole.part[p];
        }
        store_bytes(bytes + i, whole);
    }
    int32_t total = 0;
    EACH_PART UNROLL for (int i = 0; i < WIDTH; ++i) total += sum.part[p][i];
    return {(largest / 127 + sum_of(never)) * call.unit * HALF_UNIT, total * shift_of(call)};
}

// From a row's bytes to the next one's: not a multiple of the nearest cache's size, or rows would push each other out.
static inline int64_t row_stride(const QuantisedCall& call) { return call.num_groups * call.group + QUANTISED_GAP; }

template <class T>
static void quantise_rows_as(const QuantisedCall& call, int64_t begin, int64_t end) {
    T ordered[128];
    for (int64_t row = begin; row < end; ++row) {
        const T* x = (const T*)call.x + row * call.x_stride;
        for (int64_t g = 0; g < call.num_groups; ++g) {
            const int64_t at = g * call.group;
            const int count = int(call.num_in - at < call.group ? call.num_in - at : call.group);
            if (call.order) {
                for (int i = 0; i < count; ++i) ordered[i] = x[call.order[at + i]];
            }
            int8_t* bytes = call.bytes + row * row_stride(call) + at;
            call.groups[row * call.num_groups + g] =
                quantise_group(call, call.order ? ordered : x + at, count, bytes);
        }
    }
}

static inline Lanes load_half(const uint16_t* from) {
    typedef int16_t Shorts __attribute__((vector_size(LANE_BYTES / 2), may_alias, aligned(2)));
    Lanes result;
    EACH_PART {
        const MaskPart wide = __builtin_convertvector(*(const Shorts*)(from + p * WIDTH), MaskPart);
        result.part[p] = (FloatPart)((wide << 13) & int32_t(0x8fffe000));
    }
    return result;
}

// Some groups of a tile. GROUP_CHUNKS: how many chunks a group has, if it is one; else 0.
template <int BITS, int GROUP_CHUNKS>
struct QuantisedBlock {
    static constexpr int LINES = GROUP * BITS / 8;  // bytes of an input of a panel
    static constexpr int64_t AHEAD = IS_WIDE ? WIDE_AHEAD : BITS == 8 ? AHEAD_BYTES / 2 : AHEAD_BYTES;  // measured
    const QuantisedCall& call;
    int64_t first_group, num_groups;

    // What the sums of a group begin at, so that they end as those of code - zero.
    inline Ints beginning(int32_t sum, int64_t panel, int64_t g) const {
        if (!call.zeros) return fill_ints(sum);
        Ints result = load_bytes(call.zeros + (panel * call.num_groups + g) * GROUP);
        EACH_PART result.part[p] = (base_of(BITS) - result.part[p]) * sum;
        return result;
    }

    // `onward`: from a panel's codes to those that come next.
    template <int R, int N>
    SEPARATE void run(float* totals, int64_t row, int64_t panel, int part, int64_t onward) const {
        const int64_t groups = call.num_groups, chunks = GROUP_CHUNKS ? GROUP_CHUNKS : call.group / CHUNK;
        const int64_t width = groups * chunks * CHUNK, begin = first_group * chunks * CHUNK;
        const RowGroup* of = call.groups + row * groups;
        Operands at{call.bytes + row * row_stride(call) + begin, row_stride(call),
                    call.codes + (panel * width + begin) * LINES, width * LINES};
        const int share = part % 4 * 64;
        for (int64_t g = first_group; g < first_group + num_groups; ++g) {
            Ints sum[R][N];
            UNROLL for (int r = 0; r < R; ++r)
                UNROLL for (int n = 0; n < N; ++n) sum[r][n] = beginning(of[r * groups + g].sum, panel + n, g);
            for (int64_t i = 0; i < chunks; ++i, at.row += CHUNK, at.codes += CHUNK * LINES) {
                UNROLL for (int n = 0; n < N; ++n) {
                    const uint8_t* codes = at.codes + n * at.panel_stride;
                    if (part == 0)
                        for (int line = 0; line < CHUNK * LINES; line += 64)
                            __builtin_prefetch(codes + AHEAD + line, 0, IS_WIDE ? 2 : 3);
                    else
                        for (int line = share; line < CHUNK * LINES; line += 256)
                            __builtin_prefetch(codes + onward + line, 0, 2);
                }
                BITS == 8 ? add_chunk_8<R, N>(sum, at) : add_chunk_4<R, N>(sum, at);
            }
            UNROLL for (int n = 0; n < N; ++n) {
                const Lanes scale = load_half(call.scales + ((panel + n) * groups + g) * GROUP);
                UNROLL for (int r = 0; r < R; ++r) {
                    float* to = totals + r * QUANTISED_WIDE + n * GROUP;
                    store(to, load(to) + to_lanes(sum[r][n]) * (scale * fill(of[r * groups + g].step)));
                }
            }
        }
    }

    template <int R, int N>
    void pick(float* totals, int64_t row, int64_t count, int64_t panel, int part, int64_t onward) const {
        if (count == R) return run<R, N>(totals, row, panel, part, onward);
        if constexpr (R > 1) pick<R - 1, N>(totals, row, count, panel, part, onward);
    }

    // R rows at most at a time, and nearly equally many, over panels from number `at` of a tile on, N at a time.
    // Returns how far it came.
    template <int R, int N>
    int sweep(const QuantisedTile& tile, float* totals, int at) const {
        const int64_t size = call.num_groups * call.group * LINES, depth = num_groups * call.group * LINES;
        const int parts = (tile.rows + R - 1) / R;
        for (; at + N <= tile.panels; at += N) {
            const int64_t onward = at + N < tile.panels ? N * size : depth - at * size;
            for (int part = 0; part < parts; ++part) {
                const int begin = tile.rows * part / parts, end = tile.rows * (part + 1) / parts;
                float* to = totals + begin * QUANTISED_WIDE + at * GROUP;
                pick<R, N>(to, tile.row + begin, end - begin, tile.panel + at, part, onward);
            }
        }
        return at;
    }
};

template <int BITS, int GROUP_CHUNKS>
static void sum_tile(const QuantisedCall& call, const QuantisedTile& tile, float* totals) {
    const int64_t fit = tile.rows <= QUANTISED_FEW ? call.num_groups : QUANTISED_DEPTH / call.group;
    for (int64_t g = 0; g < call.num_groups; g += fit) {
        const QuantisedBlock<BITS, GROUP_CHUNKS> block{call, g, call.num_groups - g < fit ? call.num_groups - g : fit};
        int at = 0;
        if constexpr (IS_WIDE)  // 24 sums hide how long one takes, and leave registers for what is multiplied
            at = block.template sweep<6, 4>(tile, totals, at);
        block.template sweep<4, 1>(tile, totals, at);
    }
}

static void quantise_rows(const QuantisedCall& call, int64_t begin, int64_t end) {
    call.bf16 ? quantise_rows_as<bf16>(call, begin, end) : quantise_rows_as<float>(call, begin, end);
}

// Where registers are few, it pays to know that a group is one chunk.
constexpr int ONE = LANE_BYTES == 32 ? 1 : 0;

template <class T>
static void put_tile(const QuantisedCall& call, const QuantisedTile& tile, const float* totals) {
    for (int r = 0; r < tile.rows; ++r)
        for (int p = 0; p < tile.panels; ++p)
            put_sums((const T*)call.bias, (T*)call.out + (tile.row + r) * call.num_out, call.num_out,
                     (tile.panel + p) * GROUP, totals + r * QUANTISED_WIDE + p * GROUP);
}

static int64_t quantised_scratch() { return sizeof(float) * QUANTISED_ROWS * QUANTISED_WIDE; }

static void quantised(const QuantisedCall& call, int64_t row, int64_t panel, char* scratch) {
    const int64_t panels = (call.num_out + GROUP - 1) / GROUP - panel, rows = call.num_rows - row;
    const QuantisedTile tile{row, panel, int(rows < QUANTISED_ROWS ? rows : QUANTISED_ROWS),
                             int(panels < QUANTISED_PANELS ? panels : QUANTISED_PANELS)};
    float* totals = (float*)scratch;
    memset(totals, 0, sizeof(float) * tile.rows * QUANTISED_WIDE);
    const bool is_one = call.group == CHUNK;
    if (call.bits == 8)
        is_one ? sum_tile<8, ONE>(call, tile, totals) : sum_tile<8, 0>(call, tile, totals);
    else
        is_one ? sum_tile<4, ONE>(call, tile, totals) : sum_tile<4, 0>(call, tile, totals);
    call.bf16 ? put_tile<bf16>(call, tile, totals) : put_tile<float>(call, tile, totals);
}

}  // namespace VARIANT
