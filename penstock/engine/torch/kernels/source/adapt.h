// What adapters of low rank add to the rows that use them. Neighbouring users of one slot pass its arrays together, so that
// these are read once for up to four of them; a row's sums run in one order whoever passes beside it.
#pragma once
#include "calls.h"
#include "lanes.h"

namespace VARIANT {

constexpr int MOST_RANK = 256;

constexpr int ADAPT_SUMS = 4;  // beside each other, so that none waits for itself

// inner[u] = down . x[u], K numbers of it from the k'th on
template <int U, int K, class T>
static inline void narrow(const AdaptCall& call, const T* const (&x)[U], const float* down, float* const (&inner)[U],
                          int64_t k) {
    Lanes sum[U][K];
    UNROLL for (int u = 0; u < U; ++u) UNROLL for (int n = 0; n < K; ++n) sum[u][n] = fill(0);
    for (int64_t i = 0; i < call.num_in; i += GROUP) {
        Lanes value[U];
        UNROLL for (int u = 0; u < U; ++u) value[u] = load(x[u] + i);
        UNROLL for (int n = 0; n < K; ++n) {
            const Lanes weight = load(down + (k + n) * call.num_in + i);
            UNROLL for (int u = 0; u < U; ++u) sum[u][n] = sum[u][n] + value[u] * weight;
        }
    }
    UNROLL for (int u = 0; u < U; ++u) UNROLL for (int n = 0; n < K; ++n) inner[u][k + n] = sum_of(sum[u][n]);
}

// out[u] += inner[u] . up, N lanes of it from the j'th output on
template <int U, int N, class T>
static inline void spread_out(const AdaptCall& call, const float* up, float* const (&inner)[U], T* const (&out)[U],
                              int64_t j) {
    Lanes sum[U][N];
    UNROLL for (int u = 0; u < U; ++u) UNROLL for (int n = 0; n < N; ++n) sum[u][n] = fill(0);
    for (int64_t k = 0; k < call.rank; ++k)
        UNROLL for (int n = 0; n < N; ++n) {
            const Lanes weight = load(up + k * call.num_out + j + n * GROUP);
            UNROLL for (int u = 0; u < U; ++u) sum[u][n] = sum[u][n] + fill(inner[u][k]) * weight;
        }
    UNROLL for (int u = 0; u < U; ++u) UNROLL for (int n = 0; n < N; ++n) {
        T* to = out[u] + j + n * GROUP;
        store(to, load(to) + sum[u][n]);
    }
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
    constexpr int BESIDE = ADAPT_SUMS / U;
    int64_t k = 0, j = 0;
    for (; k + BESIDE <= call.rank; k += BESIDE) narrow<U, BESIDE, T>(call, x, down, inner, k);
    for (; k < call.rank; ++k) narrow<U, 1, T>(call, x, down, inner, k);
    for (; j + BESIDE * GROUP <= call.num_out; j += BESIDE * GROUP) spread_out<U, BESIDE, T>(call, up, inner, out, j);
    for (; j < call.num_out; j += GROUP) spread_out<U, 1, T>(call, up, inner, out, j);
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
