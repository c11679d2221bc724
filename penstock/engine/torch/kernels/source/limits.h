// A draw within limits: top-k, then min-p and top-p, then an entry drawn among what is left, the likeliest first.
//
// Nothing is sorted. One pass over the row collects candidates above a threshold: with top-k it rises as better ones
// are found; else it lies so far below the likeliest that the candidates surely hold what top-p keeps, which is checked
// and where it fails done again from farther below. The rest is selection among candidates by number or by mass, each
// linear in how many there are. Equal entries count in id order.
#pragma once
#include "calls.h"
#include "picks.h"

namespace VARIANT {

// How far below the likeliest candidates are looked for, in powers of two: first, and before all are taken.
constexpr float FIRST_DEPTH = 10, LAST_DEPTH = 40;

struct Candidate {
    float value, weight;  // of the logit divided by its heat, less the likeliest's; and two to the power of it
    int32_t id;
};

static inline bool is_before(const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

static inline void swap(Candidate& a, Candidate& b) {
    const Candidate kept = a;
    a = b, b = kept;
}

// Moves what comes before the pivot, a middle one of three, to the front of [from, upto); returns the pivot's place.
static int64_t divide(Candidate* all, int64_t from, int64_t upto) {
    const int64_t last = upto - 1, middle = from + (upto - from) / 2;
    if (is_before(all[middle], all[from])) swap(all[middle], all[from]);
    if (is_before(all[last], all[from])) swap(all[last], all[from]);
    if (is_before(all[middle], all[last])) swap(all[middle], all[last]);
    int64_t place = from;
    for (int64_t i = from; i < last; ++i)
        if (is_before(all[i], all[last])) swap(all[i], all[place++]);
    swap(all[place], all[last]);
    return place;
}

// Brings the first `wanted` in order to the front.
static void bring_first(Candidate* all, int64_t count, int64_t wanted) {
    int64_t from = 0, upto = count;
    while (upto - from > 1) {
        const int64_t place = divide(all, from, upto);
        if (place == wanted) return;
        place < wanted ? from = place + 1 : upto = place;
    }
}

static double mass_of(const Candidate* all, int64_t from, int64_t upto) {
    double sum = 0;
    for (int64_t i = from; i < upto; ++i) sum += double(all[i].weight);
    return sum;
}

// The place of the entry in which `goal` falls when weights are summed in order; all that come before it, and no
// others, lie in front of it. A goal on the edge between two belongs to the first where `is_closed`.
static int64_t place_of(Candidate* all, int64_t count, double goal, bool is_closed) {
    int64_t from = 0, upto = count;
    double before = 0;
    auto reaches = [&](double mass) { return is_closed ? goal <= mass : goal < mass; };
    while (from < upto) {
        const int64_t place = divide(all, from, upto);
        const double upper = before + mass_of(all, from, place);
        if (place > from && reaches(upper)) {
            upto = place;
            continue;
        }
        before = upper + double(all[place].weight);
        if (reaches(before)) return place;
        from = place + 1;
    }
    return count - 1;  // rounding: the last of all
}

struct Limits {
    int64_t top_k;
    float top_p, min_p;
};

// A row, its likeliest entry's logit, and what logits are multiplied with to become powers of two.
struct Row {
    const float* logits;
    int64_t width;
    float best, scale;
};

// Calls hit(id) for each entry above `floor`, which hit may raise.
template <class Hit>
static inline void each_above(const Row& row, float& floor, Hit hit) {
    constexpr int64_t STRIDE = ABREAST * GROUP;
    int64_t at = 0;
    for (; at + STRIDE <= row.width; at += STRIDE) {
        Mask above{};
        UNROLL for (int i = 0; i < ABREAST; ++i) {
            const Lanes value = load(row.logits + at + i * GROUP);
            EACH_PART above.part[p] |= (MaskPart)(value.part[p] > floor);
        }
        if (!any_of(above)) continue;
        for (int64_t i = at; i < at + STRIDE; ++i)
            if (row.logits[i] > floor) hit(i);
    }
    for (; at < row.width; ++at)
        if (row.logits[at] > floor) hit(at);
}

// The top_k likeliest. `found` has room for twice as many, and more.
static int64_t collect_first(const Row& row, int64_t top_k, Candidate* found) {
    const int64_t room = 2 * top_k + RUN;
    int64_t count = 0;
    float floor = -__builtin_inff();
    each_above(row, floor, [&](int64_t id) {
        found[count++] = {row.logits[id], 0, int32_t(id)};
        if (count < room) return;
        bring_first(found, count, top_k);
        count = top_k;
        for (int64_t i = 0; i < count; ++i) floor = i && found[i].value > floor ? floor : found[i].value;
    });
    if (count > top_k) bring_first(found, count, top_k);
    return count < top_k ? count : top_k;
}

static int64_t collect_above(const Row& row, float floor, Candidate* found) {
    int64_t count = 0;
    each_above(row, floor, [&](int64_t id) { found[count++] = {row.logits[id], 0, int32_t(id)}; });
    return count;
}

// Weighs candidates and drops those below min-p's floor.
static int64_t weigh(const Row& row, float min_p, Candidate* found, int64_t count) {
    int64_t left = 0;
    const float least = min_p > 0 ? __builtin_logf(min_p) * LOG2_OF_E : -__builtin_inff();
    for (int64_t from = 0; from < count; from += GROUP) {
        float value[GROUP], weight[GROUP];
        for (int64_t i = 0; i < GROUP; ++i) value[i] = from + i < count ? found[from + i].value : row.best;
        store(value, (load(value) - fill(row.best)) * fill(row.scale));
        store(weight, exp2(load(value)) - fill(SMALLEST));
        for (int64_t i = 0; i < GROUP && from + i < count; ++i)
            if (value[i] >= least) found[left++] = {value[i], weight[i], found[from + i].id};
    }
    return left;
}

static double mass_of_row(const Row& row) {
    double total = 0;
    for (int64_t begin = 0; begin < row.width; begin += RUN) {
        Lanes sum = fill(0);
        for (int64_t at = begin; at < begin + RUN && at < row.width; at += GROUP)
            sum = sum + weights(entries(row.logits, at, row.width), row.best, row.scale);
        total += double(sum_of(sum));
    }
    return total;
}

// What top-k, or min-p, or else top-p may keep; `mass` is what top-p is a share of.
static int64_t candidates(const Row& row, const Limits& limits, Candidate* found, double& mass) {
    const float all = -__builtin_inff();
    auto above = [&](float floor) { return weigh(row, limits.min_p, found, collect_above(row, floor, found)); };
    int64_t count;
    if (limits.top_k < row.width) {
        count = weigh(row, limits.min_p, found, collect_first(row, limits.top_k, found));
    } else if (limits.min_p > 0) {  // from a little below its floor: `weigh` decides
        count = above(row.best + 1.001f * __builtin_logf(limits.min_p) * LOG2_OF_E / row.scale - 1e-3f);
    } else {
        mass = mass_of_row(row);
        for (float depth = FIRST_DEPTH; depth <= LAST_DEPTH; depth *= 2) {
            count = above(row.best - depth / row.scale);
            if (mass_of(found, 0, count) >= double(limits.top_p) * mass) return count;
        }
        return above(all);
    }
    mass = mass_of(found, 0, count);
    return count;
}

static int64_t drawn_within(const Row& row, const Limits& limits, double chance, Candidate* found) {
    double mass;
    int64_t count = candidates(row, limits, found, mass);
    if (limits.top_p < 1) count = 1 + place_of(found, count, double(limits.top_p) * mass, true);
    const double goal = chance * mass_of(found, 0, count);
    return found[place_of(found, count, goal, false)].id;
}

}  // namespace VARIANT
