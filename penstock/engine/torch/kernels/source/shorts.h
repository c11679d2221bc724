// Linear layers of numbers whose products are taken on whole numbers of 16 bits: out = x w^T + bias.
//
//     w[o, i] ~ 2^-e[o, g] short[o, i]        x[m, i] ~ 2^-e[m, g] short[m, i]        g = i / group
//     out[m, o] = sum over g of 2^-(e[m, g] + e[o, g]) (sum of short short over the group)
//
// A bfloat16 has eight digits. With the largest power of two that its group allows, all but the smallest numbers of a
// group are such shorts exactly, and the sum over a group has no rounding at all. Those over groups run in one order,
// so a row's result does not depend on what other rows are there.
//
// What a group allows: no short is above 32,767, and no group's length, the root of its sum of squares, above 46,340.
// The product of two lengths bounds the sum of products (Cauchy and Schwarz), and 46,340 squared is below 2^31: nothing
// overflows, whatever comes.
//
// An instruction multiplies eight pairs and adds each, twice as many products as one of floats; a panel lies as it does
// for bfloat16, 16 outputs of two inputs each in a line. Rows are made shorts once a call, and lie six abreast: a pair
// of each, then the next pairs. A tile passes a panel with six rows at a time: the first ones read it from memory, and
// all later ones ask for what comes next.
#pragma once
#include "bytes.h"
#include "calls.h"
#include "linear.h"

namespace VARIANT {

constexpr float MOST_SHORT = 32767, MOST_LENGTH = 46300;  // the second less what rounding may add
constexpr float SURELY = 4000;  // largest of a group of 128 with which no length is too great
constexpr float TINY_SQUARES = 1e-30f, HUGE_SQUARES = 1e30f;  // between these a sum of squares is no less than it should be
constexpr float GREATEST_POWER = 1.2676506e30f;  // 2^100
constexpr float LARGEST_FLOAT = 3.4028234e38f;

// The power of two below a positive number, or that number.
static inline float power_below(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits &= 0x7f800000u;
    memcpy(&value, &bits, 4);
    return value;
}

static inline void store_shorts(int16_t* to, const Ints& value) {
#if defined(__AVX512F__) && LANE_BYTES == 64
    _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)value.part[0]));
#elif defined(__AVX2__) && LANE_BYTES == 32
    const __m256i shorts = _mm256_packs_epi32((__m256i)value.part[0], (__m256i)value.part[1]);
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(shorts, 0xd8));
#else
    EACH_PART UNROLL for (int i = 0; i < WIDTH; ++i) to[p * WIDTH + i] = int16_t(value.part[p][i]);
#endif
}

// What a group's numbers are multiplied with to become shorts; 0 where all are 0.
static inline float factor_of(float largest, float squares) {
    if (!(largest > 0)) return 0;
    float most = MOST_SHORT / largest;
    if (squares > TINY_SQUARES && squares < HUGE_SQUARES) {
        const float length = MOST_LENGTH / __builtin_sqrtf(squares);
        most = length < most ? length : most;
    } else {
        most = SURELY / largest;
    }
    return power_below(most < GREATEST_POWER ? most : GREATEST_POWER);
}

constexpr int ROWS_ABREAST = IS_WIDE ? 12 : 6;  // sums of so many rows stay in registers
constexpr int MOST_OF_TWO = IS_WIDE ? SHORTS_ROWS : 2;  // rows of a tile that pass two panels at a time

// Where a row's shorts lie: its first pair, and how many shorts from there to the next.
struct ShortRow {
    int16_t* pairs;
    int64_t step;
};

static inline int64_t abreast_at(const ShortsCall& call, int64_t row) {
    return call.num_rows - row < ROWS_ABREAST ? call.num_rows - row : ROWS_ABREAST;
}

static inline ShortRow short_row(const ShortsCall& call, int64_t row) {
    if (call.is_plain) return {call.rows + row * call.num_in, 2};
    const int64_t first = row / ROWS_ABREAST * ROWS_ABREAST;
    return {call.rows + first * call.num_in + (row - first) * 2, abreast_at(call, first) * 2};
}

static inline void put_shorts(const ShortRow& row, int64_t at, const Ints& value) {
    if (row.step == 2) return store_shorts(row.pairs + at, value);
    int16_t shorts[GROUP];
    store_shorts(shorts, value);
    UNROLL for (int i = 0; i < GROUP; i += 2) memcpy(row.pairs + (at + i) / 2 * row.step, shorts + i, 4);
}

// Makes a group shorts, from input `at` on, and says what they are to be multiplied with.
template <class T>
static inline float shorten_group(const T* x, int group, const ShortRow& row, int64_t at) {
    const float ROUNDER = 12582912.0f;  // see exp2
    Lanes most = fill(0), squares = fill(0);
    for (int i = 0; i < group; i += GROUP) {
        const Lanes value = load(x + at + i);
        most = greater_of(most, greater_of(value, fill(0) - value));
        squares = squares + value * value;
    }
    const float sum = sum_of(squares), largest = greatest_of(most), factor = factor_of(largest, sum);
    const Lanes factors = fill(factor);
    for (int i = 0; i < group; i += GROUP) {
        const Lanes value = load(x + at + i) * factors;
        Ints whole;
        EACH_PART whole.part[p] = (MaskPart)(value.part[p] + ROUNDER) - 0x4b400000;
        put_shorts(row, at + i, whole);
    }
    if (sum != sum || largest > LARGEST_FLOAT) return __builtin_nanf("");  // something is no number
    return factor > 0 ? 1 / factor : 0;
}

template <class T>
static void shorten_as(const ShortsCall& call, int64_t begin, int64_t end) {
    const int64_t groups = call.num_in / call.group;
    for (int64_t i = begin; i < end; ++i) {
        const T* x = (const T*)call.x + i * call.x_stride;
        const ShortRow row = short_row(call, i);
        for (int64_t g = 0; g < groups; ++g)
            call.steps[i * groups + g] = shorten_group(x, call.group, row, g * call.group);
    }
}

static void shorten_rows(const ShortsCall& call, int64_t begin, int64_t end) {
    call.bf16 ? shorten_as<bf16>(call, begin, end) : shorten_as<float>(call, begin, end);
}

static inline int32_t pair_at(const int16_t* from) {
    int32_t result;
    memcpy(&result, from, 4);
    return result;
}

// sum + the products of two shorts in each lane of `column` and those of `left`. The sum is added in place: compilers
// that are left to it copy sums about.
static inline void add_pairs(Ints& sum, const Bits& column, int32_t left) {
#if defined(__AVX512VNNI__) && LANE_BYTES == 64
    sum.part[0] = (MaskPart)_mm512_dpwssd_epi32((__m512i)sum.part[0], (__m512i)column.part[0], _mm512_set1_epi32(left));
#elif defined(__AVX512BW__) && LANE_BYTES == 64
    const __m512i products = _mm512_madd_epi16((__m512i)column.part[0], _mm512_set1_epi32(left));
    sum.part[0] = (MaskPart)_mm512_add_epi32((__m512i)sum.part[0], products);
#elif defined(__AVX2__) && LANE_BYTES == 32
    const __m256i pair = _mm256_set1_epi32(left);
    EACH_PART {
        const __m256i products = _mm256_madd_epi16((__m256i)column.part[p], pair);
        asm("vpaddd %1, %0, %0" : "+x"(sum.part[p]) : "x"(products));
    }
#else
    const int32_t low = int16_t(left), high = left >> 16;
    EACH_PART {
        const MaskPart pairs = (MaskPart)column.part[p];
        sum.part[p] += ((MaskPart)(column.part[p] << 16) >> 16) * low + (pairs >> 16) * high;
    }
#endif
}

static_assert(SHORTS_ROWS % ROWS_ABREAST == 0, "a tile begins where rows begin to lie abreast");
constexpr int SHORTS_DEPTH = IS_WIDE ? 512 : 1024;  // inputs of a full tile's rows that stay in the second level
constexpr int SHORTS_WIDE = SHORTS_PANELS * GROUP;
// Bytes, of one panel; of several beside each other half as many.
template <int N>
constexpr int64_t SHORTS_AHEAD = IS_WIDE ? WIDE_AHEAD : N > 1 ? 1024 : 2048;
constexpr int PAIRS_A_STEP = 4;

// Some groups of a panel, or of some panels that so few rows pass that these are read beside each other.
struct ShortsPiece {
    const ShortsCall& call;
    const int16_t* codes;
    const bf16* scales;
    int64_t first_group, num_groups;
    const char* next;  // what comes after it

    // The first rows to pass ask for the panels themselves; of what comes next, the part'th part is asked for by others.
    template <int R, int N, bool IS_FIRST>
    SEPARATE void run(float* sums, int64_t row, int part) const {
        const int64_t all_groups = call.num_in / call.group, panel = call.num_in * GROUP;
        const int16_t* left = call.rows + row * call.num_in + first_group * call.group * R;
        const float* steps = call.steps + row * all_groups + first_group;
        const int16_t* column = codes;
        const int64_t share = num_groups * call.group / 2 / PAIRS_A_STEP * 64;
        const char* ahead = next + part % PAIRS_A_STEP * share + part / PAIRS_A_STEP % N * panel * int64_t(sizeof(*codes));
        for (int64_t g = 0; g < num_groups; ++g) {
            Ints sum[R][N];
            UNROLL for (int r = 0; r < R; ++r) UNROLL for (int n = 0; n < N; ++n) sum[r][n] = fill_ints(0);
            for (int i = 0; i < call.group; i += 2 * PAIRS_A_STEP) {
                if (!IS_FIRST) __builtin_prefetch(ahead, 0, 2), ahead += 64;
                UNROLL for (int pair = 0; pair < PAIRS_A_STEP; ++pair, column += 2 * GROUP, left += 2 * R) {
                    Bits line[N];
                    UNROLL for (int n = 0; n < N; ++n) {
                        if (IS_FIRST) __builtin_prefetch((const char*)(column + n * panel) + SHORTS_AHEAD<N>, 0, IS_WIDE ? 2 : 3);
                        line[n] = load_bits(column + n * panel);
                    }
                    UNROLL for (int r = 0; r < R; ++r)
                        UNROLL for (int n = 0; n < N; ++n) add_pairs(sum[r][n], line[n], pair_at(left + 2 * r));
                }
            }
            UNROLL for (int n = 0; n < N; ++n) {
                const Lanes scale = load(scales + (n * all_groups + g) * GROUP);
                UNROLL for (int r = 0; r < R; ++r) {
                    float* to = sums + r * SHORTS_WIDE + n * GROUP;
                    store(to, load(to) + to_lanes(sum[r][n]) * (scale * fill(steps[r * all_groups + g])));
                }
            }
        }
    }

    template <int R, int N>
    void pick(float* sums, int64_t row, int count, int part) const {
        if (count == R) return part ? run<R, N, false>(sums, row, part) : run<R, N, true>(sums, row, part);
        if constexpr (R > 1) pick<R - 1, N>(sums, row, count, part);
    }

    // All rows of a tile.
    template <int N>
    void all(float* sums, int64_t row, int64_t end) const {
        for (int part = 0; row < end; ++part) {
            const int64_t count = abreast_at(call, row);
            pick<ROWS_ABREAST, N>(sums, row, int(count), part);
            sums += count * SHORTS_WIDE, row += count;
        }
    }
};

static int64_t shorts_scratch() { return sizeof(float) * SHORTS_ROWS * SHORTS_WIDE; }

template <class T>
static void shorts_as(const ShortsCall& call, int64_t row, int64_t panel, char* scratch) {
    const int64_t all_panels = (call.num_out + GROUP - 1) / GROUP, groups = call.num_in / call.group;
    const int rows = int(call.num_rows - row < SHORTS_ROWS ? call.num_rows - row : SHORTS_ROWS);
    const int panels = int(all_panels - panel < SHORTS_PANELS ? all_panels - panel : SHORTS_PANELS);
    float* sums = (float*)scratch;
    memset(sums, 0, sizeof(float) * rows * SHORTS_WIDE);
    const int64_t fit = rows <= ROWS_ABREAST ? groups : SHORTS_DEPTH / call.group;
    const int abreast = rows == 1 && panels >= 4 ? 4 : rows <= MOST_OF_TWO && panels >= 2 ? 2 : 1;
    for (int64_t g = 0; g < groups; g += fit)
        for (int p = 0, beside; p < panels; p += beside) {
            beside = panels - p < abreast ? 1 : abreast;
            const int64_t depth = groups - g < fit ? groups - g : fit, at = (panel + p) * groups + g;
            const int16_t* codes = call.codes + at * call.group * GROUP;
            const int64_t onward = p + beside < panels     ? beside * groups
                                   : g + depth < groups ? depth - p * groups
                                                        : (panels - p) * groups - g;
            const ShortsPiece piece{call, codes, (const bf16*)call.scales + at * GROUP, g, depth,
                                    (const char*)(codes + onward * call.group * GROUP)};
            float* to = sums + p * GROUP;
            if (beside == 4)
                piece.run<1, 4, true>(to, row, 0);
            else if (beside == 1)
                piece.all<1>(to, row, row + rows);
            else if constexpr (MOST_OF_TWO > 2)
                piece.all<2>(to, row, row + rows);
            else
                piece.pick<2, 2>(to, row, rows, 0);
        }
    for (int r = 0; r < rows; ++r)
        for (int p = 0; p < panels; ++p)
            put_sums((const T*)call.bias, (T*)call.out + (row + r) * call.num_out, call.num_out, (panel + p) * GROUP,
                     sums + r * SHORTS_WIDE + p * GROUP);
}

static void shorts(const ShortsCall& call, int64_t row, int64_t panel, char* scratch) {
    call.bf16 ? shorts_as<bf16>(call, row, panel, scratch) : shorts_as<float>(call, row, panel, scratch);
}

}  // namespace VARIANT
