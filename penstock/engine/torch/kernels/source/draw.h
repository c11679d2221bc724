// From logits to tokens, row by row: the likeliest entry, or where there is a temperature one drawn among all, or among
// those that the row's limits leave.
#pragma once
#include "limits.h"

namespace VARIANT {

static void draw(const DrawCall& call, int64_t begin, int64_t end, char* scratch) {
    for (int64_t r = begin; r < end; ++r) {
        const float* row = call.logits + r * call.stride;
        call.best[r] = likeliest(row, call.width, call.ids[r]);
        const bool is_finite = call.best[r] - call.best[r] == 0;
        if (!call.heat || !(call.heat[r] > 0) || !is_finite) continue;
        const float scale = LOG2_OF_E / call.heat[r];
        if (call.top_k && (call.top_k[r] < call.width || call.top_p[r] < 1 || call.min_p[r] > 0)) {
            const Limits limits{call.top_k[r], call.top_p[r], call.min_p[r]};
            call.ids[r] = drawn_within({row, call.width, call.best[r], scale}, limits, call.chance[r], (Candidate*)scratch);
        } else {
            call.ids[r] = drawn(row, call.width, call.best[r], scale, call.chance[r], (double*)scratch);
        }
    }
}

// Words of all ones or all zeros are most of them.
static void ban(const BanCall& call, int64_t begin, int64_t end) {
    constexpr int64_t WORD = 32;
    const Lanes banned = fill(-__builtin_inff());
    for (int64_t at = begin; at < end; at += WORD) {
        const uint32_t word = call.allowed[at / WORD];
        float* entry = call.logits + at;
        if (word == 0xffffffffu) continue;
        if (at + WORD > call.width) {
            for (int64_t i = 0; at + i < call.width; ++i)
                if (!(word >> i & 1)) entry[i] = -__builtin_inff();
            continue;
        }
        UNROLL for (int half = 0; half < WORD; half += GROUP) {
            Mask allowed;
            EACH_PART {
                BitsPart shift;
                UNROLL for (int i = 0; i < WIDTH; ++i) shift[i] = uint32_t(half + p * WIDTH + i);
                allowed.part[p] = (MaskPart)(((BitsPart{} + word) >> shift & 1) != 0);
            }
            store(entry + half, choose(allowed, load(entry + half), banned));
        }
    }
}

}  // namespace VARIANT
