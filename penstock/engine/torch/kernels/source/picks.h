// One row of logits: its likeliest entry, and an entry drawn through the inverse of the running sum. Sums are of runs
// of RUN entries first, in double, then inside the run that was hit.
#pragma once
#include "calls.h"
#include "lanes.h"

namespace VARIANT {

constexpr int64_t RUN = DRAW_RUN;
constexpr float LOG2_OF_E = 1.44269504f, SMALLEST = 1.17549435e-38f;

// Entries [at, at + 16) of a row; minus infinity beyond its end.
static inline Lanes entries(const float* row, int64_t at, int64_t width) {
    if (at + GROUP <= width) return load(row + at);
    float tail[GROUP];
    for (int64_t i = 0; i < GROUP; ++i) tail[i] = at + i < width ? row[at + i] : -__builtin_inff();
    return load(tail);
}

// Whether any lane was set.
static inline bool any_of(const Mask& mask) {
    MaskPart all = mask.part[0];
    UNROLL for (int p = 1; p < PARTS; ++p) all |= mask.part[p];
#if defined(__AVX512F__) && LANE_BYTES == 64
    return _mm512_test_epi32_mask((__m512i)all, (__m512i)all) != 0;
#elif defined(__AVX2__) && LANE_BYTES == 32
    return !_mm256_testz_si256((__m256i)all, (__m256i)all);
#else
    int32_t found = 0;
    UNROLL for (int i = 0; i < WIDTH; ++i) found |= all[i];
    return found != 0;
#endif
}

// Four vectors at a time, so that a comparison need not wait for the one before it.
constexpr int ABREAST = 4;

// The greatest value of a row and the first entry that has it. NaN when any entry is.
static inline float likeliest(const float* row, int64_t width, int64_t& entry) {
    constexpr int64_t STRIDE = 8 * RUN;
    float best = -__builtin_inff();
    int64_t begin = 0;
    Mask strange{};
    for (int64_t from = 0; from < width; from += STRIDE) {
        Lanes greatest[ABREAST];
        UNROLL for (int i = 0; i < ABREAST; ++i) greatest[i] = fill(-__builtin_inff());
        auto take = [&](int i, const Lanes& value) __attribute__((always_inline)) {
            EACH_PART strange.part[p] |= (MaskPart)(value.part[p] != value.part[p]);
            greatest[i] = greater_of(value, greatest[i]);
        };
        int64_t at = from;
        const int64_t end = from + STRIDE < width ? from + STRIDE : width;
        for (; at + ABREAST * GROUP <= end; at += ABREAST * GROUP)
            UNROLL for (int i = 0; i < ABREAST; ++i) take(i, load(row + at + i * GROUP));
        for (; at < end; at += GROUP) take(0, entries(row, at, width));
        for (int i = 1; i < ABREAST; ++i) greatest[0] = greater_of(greatest[0], greatest[i]);
        const float found = greatest_of(greatest[0]);
        if (found > best) best = found, begin = from;
    }
    entry = begin;
    while (entry < width - 1 && row[entry] != best) ++entry;
    return any_of(strange) ? __builtin_nanf("") : best;
}

// Weights relative to the likeliest's. What exp2 leaves of the impossible is taken away again: it is never drawn.
static inline Lanes weights(const Lanes& value, float best, float scale) {
    return exp2((value - fill(best)) * fill(scale)) - fill(SMALLEST);
}

static inline int64_t drawn(const float* row, int64_t width, float best, float scale, double chance, double* edges) {
    const int64_t runs = (width + RUN - 1) / RUN;
    double total = 0;
    for (int64_t run = 0; run < runs; ++run) {
        Lanes sum = fill(0);
        for (int64_t at = run * RUN; at < (run + 1) * RUN && at < width; at += GROUP)
            sum = sum + weights(entries(row, at, width), best, scale);
        edges[run] = total += double(sum_of(sum));
    }
    const double goal = chance * total;
    int64_t run = 0;
    while (edges[run] <= goal && edges[run] < total) ++run;
    double left = run ? goal - edges[run - 1] : goal;
    float inside[RUN];
    const int64_t begin = run * RUN, count = width - begin < RUN ? width - begin : RUN;
    for (int64_t i = 0; i < count; i += GROUP) store(inside + i, weights(entries(row, begin + i, width), best, scale));
    int64_t last = 0;  // rounding may leave the goal beyond the run's end: then the last entry that weighs anything
    for (int64_t i = 0; i < count; ++i) {
        if (inside[i] > 0) last = i;
        left -= double(inside[i]);
        if (left < 0) break;
    }
    return begin + last;
}

}  // namespace VARIANT
