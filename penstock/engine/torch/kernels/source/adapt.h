// What adapters of low rank add to the rows that use them. Neighbouring users of one slot pass its arrays together, so that
// these are read once for up to four of them; a row's sums run in one order whoever passes beside it.
#pragma once
#include "calls.h"
#include "lanes.h"

namespace VARIANT {

constexpr int MOST_RANK = 256;

// inner[u] = down . x[u], one number of it
template <int U, class T>
static inline void narrow(const AdaptCall& call, const T* const (&x)[U], const float* down, float* (&inner)[U], int64_t k) {
    Lanes sum[U];
    UNROLL for (int u = 0; u < U; ++u) sum[u] = fill(0);
    for (int64_t i = 0; i < call.num_in; i += GROUP) {
        const Lanes weight = load(down + i);
        UNROLL for (int u = 0; u < U; ++u) sum[u] = sum[u] + load(x[u] + i) * weight;
    }
    UNROLL for (int u = 0; u < U; ++u) inner[u][k] = sum_of(sum[u]);
}

template <int U, class T>
static void adapt_users(const AdaptCall& call, int64_t user) {
    float numbers[U][MOST_RANK];
    float* inner[U];
    const T* x[U];
    T* out[U];
    const float* down = call.down + call.slots[user] * call.down_stride;
    const float* up = call.up + call.slots[user] * call.up_stride;
    UNROLL for (int u = 0; u < U; ++u) {
        inner[u] = numbers[u];
        x[u] = (const T*)call.x + call.rows[user + u] * call.x_stride;
        out[u] = (T*)call.out + call.rows[user + u] * call.out_stride;
    }
    for (int64_t k = 0; k < call.rank; ++k) narrow<U, T>(call, x, down + k * call.num_in, inner, k);
    for (int64_t j = 0; j < call.num_out; j += GROUP) {
        Lanes sum[U];
        UNROLL for (int u = 0; u < U; ++u) sum[u] = fill(0);
        for (int64_t k = 0; k < call.rank; ++k) {
            const Lanes weight = load(up + k * call.num_out + j);
            UNROLL for (int u = 0; u < U; ++u) sum[u] = sum[u] + fill(inner[u][k]) * weight;
        }
        UNROLL for (int u = 0; u < U; ++u) store(out[u] + j, load(out[u] + j) + sum[u]);
    }
}

template <class T>
static void adapt_as(const AdaptCall& call, int64_t begin, int64_t end) {
    for (int64_t user = begin; user < end;) {
        int64_t last = user + 1;
        while (last < end && last < user + 4 && call.slots[last] == call.slots[user]) ++last;
        if (last - user == 4) adapt_users<4, T>(call, user);
        if (last - user == 3) adapt_users<3, T>(call, user);
        if (last - user == 2) adapt_users<2, T>(call, user);
        if (last - user == 1) adapt_users<1, T>(call, user);
        user = last;
    }
}

static void adapt(const AdaptCall& call, int64_t begin, int64_t end) {
    call.bf16 ? adapt_as<bf16>(call, begin, end) : adapt_as<float>(call, begin, end);
}

}  // namespace VARIANT
