// The small operations between the large ones, each in one pass over its rows.
//
// Values are computed in float and rounded to the tensors' type exactly where a model written in plain torch
// operations rounds them, so that bfloat16 results agree with it.
#pragma once
#include "calls.h"
#include "lanes.h"

namespace VARIANT {

constexpr int STEP = 16;

static inline float inverse_size(float sum_of_squares, int64_t width, float epsilon) {
    return 1 / __builtin_sqrtf(sum_of_squares / float(width) + epsilon);
}

template <class T>
static inline Lanes weighted(const Lanes& value, const T* weight, int64_t at, bool wide) {
    return wide ? value * load((const float*)weight + at) : rounded(value, weight) * load(weight + at);
}

template <class T>
static void norm_as(const NormCall& call, int64_t begin, int64_t end) {
    const T *x = (const T*)call.x, *weight = (const T*)call.weight;
    const T* residual = (const T*)call.residual;
    T *out = (T*)call.out, *sum = (T*)call.sum;
    for (int64_t row = begin; row < end; ++row) {
        const T* from = x + row * call.x_stride;
        Lanes squares = fill(0);
        for (int64_t d = 0; d < call.width; d += STEP) {
            Lanes value = load(from + d);
            if (residual) {
                value = rounded(value + load(residual + row * call.residual_stride + d), from);
                store(sum + row * call.width + d, value);
            }
            squares = squares + value * value;
        }
        if (residual) from = sum + row * call.width;
        Lanes factor = fill(inverse_size(sum_of(squares), call.width, call.epsilon));
        for (int64_t d = 0; d < call.width; d += STEP)
            store(out + row * call.width + d, weighted(load(from + d) * factor, weight, d, call.wide));
    }
}

template <class T>
static inline void norm_head(T* head, const T* weight, int dim, float epsilon, bool wide) {
    Lanes squares = fill(0);
    for (int d = 0; d < dim; d += STEP) squares = squares + load(head + d) * load(head + d);
    Lanes factor = fill(inverse_size(sum_of(squares), dim, epsilon));
    for (int d = 0; d < dim; d += STEP) store(head + d, weighted(load(head + d) * factor, weight, d, wide));
}

// Dimension i turns with dimension i + half; the products are rounded before they are added.
template <class T>
static inline void rotate_head(T* head, const float* cosine, const float* sine, int half) {
    for (int d = 0; d < half; d += STEP) {
        Lanes c = rounded(load(cosine + d), head), s = rounded(load(sine + d), head);
        Lanes first = load(head + d), second = load(head + half + d);
        store(head + d, rounded(first * c, head) - rounded(second * s, head));
        store(head + half + d, rounded(second * c, head) + rounded(first * s, head));
    }
}

template <class T>
static void rope_as(const RopeCall& call, int64_t begin, int64_t end) {
    int half = call.rotary_dim / 2;
    for (int64_t token = begin; token < end; ++token) {
        const float* cosine = call.cos_sin + call.positions[token] * call.rotary_dim;
        for (int head = 0; head < call.num_heads + call.num_kv_heads; ++head) {
            bool is_query = head < call.num_heads;
            T* at = is_query ? (T*)call.query + token * call.query_stride + int64_t(head) * call.head_dim
                             : (T*)call.key + token * call.key_stride + int64_t(head - call.num_heads) * call.head_dim;
            const T* weight = (const T*)(is_query ? call.query_weight : call.key_weight);
            if (weight) norm_head(at, weight, call.head_dim, call.epsilon, call.wide);
            rotate_head(at, cosine, cosine + half, half);
        }
    }
}

template <class T>
static void gate_as(const GateCall& call, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* gate = (const T*)call.gate_up + row * call.stride;
        const T* up = gate + call.width;
        T* out = (T*)call.out + row * call.width;
        for (int64_t d = 0; d < call.width; d += STEP) {
            Lanes x = load(gate + d);
            // Both are x / (1 + e^-s): SiLU with s = x, GELU with s = sqrt(8 / pi) (x + 0.044715 x^3).
            Lanes s = call.gelu ? x * fill(1.59576912f) * (fill(1) + x * x * fill(0.044715f)) : x;
            Lanes active = x / (fill(1) + exp2(s * fill(-1.44269504f)));
            store(out + d, rounded(active, gate) * load(up + d));
        }
    }
}

static void norm(const NormCall& call, int64_t begin, int64_t end) {
    call.bf16 ? norm_as<bf16>(call, begin, end) : norm_as<float>(call, begin, end);
}

static void rope(const RopeCall& call, int64_t begin, int64_t end) {
    call.bf16 ? rope_as<bf16>(call, begin, end) : rope_as<float>(call, begin, end);
}

static void gate(const GateCall& call, int64_t begin, int64_t end) {
    call.bf16 ? gate_as<bf16>(call, begin, end) : gate_as<float>(call, begin, end);
}

}  // namespace VARIANT
