// Linear layers whose weights are of 8 or 4 bits: out = x w^T + bias.
//
//     w[o, i] = scale[o, g] (code[o, i] - zero[o, g])        x[m, i] ~ step[m, g] byte[m, i]        g = i / group
//     out[m, o] = sum over g of step[m, g] scale[o, g] (sum of byte code over the group - zero[o, g] sum of byte)
//
// Rows are quantised first, group by group: the largest of a group becomes 127. The sums inside a group are exact, and
// those over groups run in one order, so a row's result does not depend on what other rows are there.
//
// A panel of 16 outputs is one run of memory, which one to four rows pass over together: with few rows the weights
// are read once, in order. With many, a tile is at most 64 rows, which stay in the second level cache as the panels
// pass, and each panel stays in the first.
#pragma once
#include "bytes.h"
#include "calls.h"
#include "linear.h"

namespace VARIANT {

// float16 to float takes a shift and a product with this; scales of rows have it in them already.
constexpr float HALF_UNIT = 5192296858534827628530496329220096.0f;  // 2^112

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
            int8_t* bytes = call.bytes + row * call.num_groups * call.group + at;
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

// GROUP_CHUNKS: how many chunks a group has, if it is one; else 0.
template <int BITS, int GROUP_CHUNKS>
struct QuantisedPiece {
    static constexpr int LINES = GROUP * BITS / 8;  // bytes of an input of a panel
    const QuantisedCall& call;

    // What the sums of a group begin at, so that they end as those of code - zero.
    inline Ints beginning(int32_t sum, int64_t panel, int64_t g) const {
        if (!call.zeros) return fill_ints(sum);
        Ints result = load_bytes(call.zeros + (panel * call.num_groups + g) * GROUP);
        EACH_PART result.part[p] = (base_of(BITS) - result.part[p]) * sum;
        return result;
    }

    // One text for both types of x and out: this is most of the code there is.
    template <int R, int N>
    __attribute__((noinline)) void sums(Lanes (&total)[R][N], int64_t row, int64_t panel, int64_t ahead) const {
        const int64_t groups = call.num_groups, chunks = GROUP_CHUNKS ? GROUP_CHUNKS : call.group / CHUNK;
        const int64_t width = groups * chunks * CHUNK;
        const RowGroup* of = call.groups + row * groups;
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int n = 0; n < N; ++n) total[r][n] = fill(0);
        Operands at{call.bytes + row * width, width, call.codes + panel * width * LINES, width * LINES};
        for (int64_t g = 0; g < groups; ++g) {
            Ints sum[R][N];
            UNROLL for (int r = 0; r < R; ++r)
                UNROLL for (int n = 0; n < N; ++n) sum[r][n] = beginning(of[r * groups + g].sum, panel + n, g);
            for (int64_t i = 0; i < chunks; ++i, at.row += CHUNK, at.codes += CHUNK * LINES) {
                UNROLL for (int n = 0; n < N; ++n)
                    for (int line = 0; line < CHUNK * LINES; line += 64)
                        __builtin_prefetch(at.codes + n * at.panel_stride + ahead + line);
                BITS == 8 ? add_chunk_8<R, N>(sum, at) : add_chunk_4<R, N>(sum, at);
            }
            UNROLL for (int n = 0; n < N; ++n) {
                const Lanes scale = load_half(call.scales + ((panel + n) * groups + g) * GROUP);
                UNROLL for (int r = 0; r < R; ++r)
                    total[r][n] = total[r][n] + to_lanes(sum[r][n]) * (scale * fill(of[r * groups + g].step));
            }
        }
    }

    template <class T, int R, int N>
    inline void run(int64_t row, int64_t panel, int64_t ahead) const {
        Lanes total[R][N];
        sums<R, N>(total, row, panel, ahead);
        float last[GROUP];
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) {
                store(last, total[r][n]);
                put_sums((const T*)call.bias, (T*)call.out + (row + r) * call.num_out, call.num_out, (panel + n) * GROUP, last);
            }
    }

    // All rows of the tile over N panels; only the first to pass asks for what comes next.
    template <class T, int N>
    inline void rows(int64_t row, int64_t end, int64_t panel) const {
        int64_t ahead = BITS == 8 ? AHEAD_BYTES / 2 : AHEAD_BYTES;  // measured: a sixth faster, and not with 4 bits
        for (; row + 4 <= end; row += 4, ahead = 0) run<T, 4, N>(row, panel, ahead);
        if (end - row == 3) run<T, 3, N>(row, panel, ahead);
        if (end - row == 2) run<T, 2, N>(row, panel, ahead);
        if (end - row == 1) run<T, 1, N>(row, panel, ahead);
    }
};

// Panels that are passed together: enough sums to hide how long one takes, no more than there are registers for.
constexpr int TOGETHER = LANE_BYTES == 64 ? 4 : 1;

template <int BITS, int GROUP_CHUNKS, class T>
static void quantised_as(const QuantisedCall& call, int64_t row, int64_t panel) {
    const QuantisedPiece<BITS, GROUP_CHUNKS> piece{call};
    const int64_t panels = (call.num_out + GROUP - 1) / GROUP;
    const int64_t end = call.num_rows - row < QUANTISED_ROWS ? call.num_rows : row + QUANTISED_ROWS;
    const int64_t last = panels - panel < QUANTISED_PANELS ? panels : panel + QUANTISED_PANELS;
    for (; panel + TOGETHER <= last; panel += TOGETHER) piece.template rows<T, TOGETHER>(row, end, panel);
    for (; panel < last; ++panel) piece.template rows<T, 1>(row, end, panel);
}

static void quantise_rows(const QuantisedCall& call, int64_t begin, int64_t end) {
    call.bf16 ? quantise_rows_as<bf16>(call, begin, end) : quantise_rows_as<float>(call, begin, end);
}

template <int BITS, int GROUP_CHUNKS>
static void quantised_in(const QuantisedCall& call, int64_t row, int64_t panel) {
    call.bf16 ? quantised_as<BITS, GROUP_CHUNKS, bf16>(call, row, panel)
              : quantised_as<BITS, GROUP_CHUNKS, float>(call, row, panel);
}

// Where registers are few, it pays to know that a group is one chunk.
constexpr int ONE = LANE_BYTES == 32 ? 1 : 0;

static void quantised(const QuantisedCall& call, int64_t row, int64_t panel) {
    const bool is_one = call.group == CHUNK;
    if (call.bits == 8)
        is_one ? quantised_in<8, ONE>(call, row, panel) : quantised_in<8, 0>(call, row, panel);
    else
        is_one ? quantised_in<4, ONE>(call, row, panel) : quantised_in<4, 0>(call, row, panel);
}

}  // namespace VARIANT
