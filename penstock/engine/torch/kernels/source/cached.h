// What lies in the cache, and how it gets there: where a head's groups are, how they are read as floats, and how new
// keys and values are written. calls.h tells the layouts.
//
// S is the stored type: float, bfloat16, or int8_t or Byte (a whole number times the token's scale). Whatever a kernel
// reads as floats, it reads through `read`.
#pragma once
#include "calls.h"
#include "product.h"

namespace VARIANT {

typedef int8_t BytesAt __attribute__((vector_size(WIDTH), may_alias, aligned(1)));

static inline Lanes read(const float* from) { return load(from); }
static inline Lanes read(const bf16* from) { return load(from); }
// Compilers take vectors of bytes apart, hence the conversions by name.
static inline Lanes read(const int8_t* from) {
    Lanes result;
#if LANE_BYTES == 64 && defined(__AVX512F__)
    const __m512i whole = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)from));
    result.part[0] = __builtin_convertvector((MaskPart)whole, FloatPart);
#elif LANE_BYTES == 32 && defined(__AVX2__)
    EACH_PART {
        const __m128i bytes = _mm_loadl_epi64((const __m128i*)(from + p * WIDTH));
        result.part[p] = __builtin_convertvector((MaskPart)_mm256_cvtepi8_epi32(bytes), FloatPart);
    }
#else
    EACH_PART result.part[p] = __builtin_convertvector(
        __builtin_convertvector(*(const BytesAt*)(from + p * WIDTH), MaskPart), FloatPart);
#endif
    return result;
}
#ifdef DOT_BF16
static inline Lanes read(const Byte* from) { return read((const int8_t*)from); }

// Pairs of numbers that lie in two places.
static inline Bits paired(const Byte* first, const Byte* second) {
    const Lanes low = read(first), high = read(second);  // whole numbers: their lower halves are zero
    Bits result;
    EACH_PART result.part[p] = (BitsPart)low.part[p] >> 16 | (BitsPart)high.part[p];
    return result;
}
static inline Bits paired(const bf16* first, const bf16* second) {
    Bits result;
    EACH_PART {
        const HalfPart low = *(const HalvesAt*)(first + p * WIDTH), high = *(const HalvesAt*)(second + p * WIDTH);
        result.part[p] = bits_of(low) | bits_of(high) << 16;
    }
    return result;
}
#endif

// The two bfloat16 of each pair.
static inline Lanes lower(const Bits& pairs) {
    Lanes result;
    EACH_PART result.part[p] = (FloatPart)(pairs.part[p] << 16);
    return result;
}
static inline Lanes upper(const Bits& pairs) {
    Lanes result;
    EACH_PART result.part[p] = (FloatPart)(pairs.part[p] & 0xffff0000u);
    return result;
}

template <class S>
static constexpr bool has_scales() {
    return sizeof(S) == 1;
}

// One head's part of one block.
template <class S>
static inline int64_t head_bytes(const AttentionCall& call) {
    return int64_t(call.block_size) * (call.head_dim * sizeof(S) + (has_scales<S>() ? sizeof(float) : 0));
}

template <class S>
static inline const char* head_at(const AttentionCall& call, const void* cache, int64_t block, int64_t head) {
    return (const char*)cache + (block * call.num_kv_heads + head) * head_bytes<S>(call);
}

template <class S>
static inline const float* scales_at(const AttentionCall& call, const char* head) {
    return (const float*)(head + int64_t(call.block_size) * call.head_dim * sizeof(S));
}

struct Range {
    int from, upto;
    bool holds(int at) const { return at >= from && at < upto; }
};

// Zeros for the tokens of a value group that are outside `valid`.
template <class S>
static void clear_hidden(S* values, Range valid, int dim) {
    constexpr int PAIR = Format<S>::PAIR;
    for (int t = 0; t < GROUP; ++t) {
        if (valid.holds(t)) continue;
        S* line = values + t / PAIR * dim * PAIR + t % PAIR;
        for (int d = 0; d < dim; ++d) line[d * PAIR] = S{};
    }
}

// Groups as floats, with P = 1. `next` is asked for on the way.
template <class S>
static void widen_rows(float* to, const S* group, const S* next, int dim) {
    for (int at = 0; at < dim * GROUP; at += GROUP) {
        __builtin_prefetch(next + at);
        store(to + at, read(group + at));
    }
}

template <class S>
static void widen_keys(float* to, const S* group, const S* next, int dim) {
    widen_rows(to, group, next, dim);
}

template <class S>
static void widen_values(float* to, const S* group, const S* next, int dim) {
    widen_rows(to, group, next, dim);
}

#ifndef DOT_BF16
static void widen_keys(float* to, const bf16* group, const bf16* next, int dim) {
    for (int at = 0; at < dim * GROUP; at += 2 * GROUP) {
        const Bits pairs = load_bits(group + at);
        __builtin_prefetch(next + at);
        store(to + at, lower(pairs)), store(to + at + GROUP, upper(pairs));
    }
}

static void widen_values(float* to, const bf16* group, const bf16* next, int dim) {
    for (int t = 0; t < GROUP; t += 2)
        for (int d = 0; d < dim; d += GROUP) {
            const Bits pairs = load_bits(group + t * dim + 2 * d);
            __builtin_prefetch(next + t * dim + 2 * d);
            store(to + t * dim + d, lower(pairs)), store(to + (t + 1) * dim + d, upper(pairs));
        }
}
#else
// Groups as pairs of bfloat16.
static void widen_keys(bf16* to, const Byte* group, const Byte* next, int dim) {
    for (int at = 0; at < dim * GROUP; at += 2 * GROUP) {
        __builtin_prefetch(next + at);
        store_bits(to + at, paired(group + at, group + at + GROUP));
    }
}

// Of `dim` numbers a token the first `count`; all of the next group are asked for.
template <class S>
static void widen_values(bf16* to, const S* group, const S* next, int dim, int count) {
    for (int t = 0; t < GROUP; t += 2)
        for (int d = 0; d < dim; d += GROUP) {
            const S* first = group + t * dim + d;
            __builtin_prefetch(next + t * dim + 2 * d);
            if (d < count) store_bits(to + t * dim + 2 * d, paired(first, first + dim));
        }
}

// Latents as their scores take them: where they lie, if they are bfloat16.
static const bf16* rows_of(bf16*, const bf16* group, int) { return group; }
static const bf16* rows_of(bf16* to, const Byte* group, int dim) {
    for (int at = 0; at < dim * GROUP; at += GROUP) store(to + at, read(group + at));
    return to;
}
#endif

// Whole numbers in [-127, 127] and the scale that brings them back. A vector with a number that is not finite gets a
// scale that is NaN, so that whoever sees it is told.
template <class T>
static float quantise(int8_t* to, const T* from, int dim) {
    float greatest = 0, strange = 0;
    for (int d = 0; d < dim; ++d) {
        const float value = to_float(from[d]), size = __builtin_fabsf(value);
        greatest = size > greatest ? size : greatest;
        strange += value - value;
    }
    const float factor = greatest > 0 && strange == 0 ? 127 / greatest : 0;
    float scaled[LARGEST_DIM];  // a loop of its own: joined with the sum it would be rounded once on some machines only
    for (int d = 0; d < dim; ++d) scaled[d] = to_float(from[d]) * factor;
    for (int d = 0; d < dim; ++d) {
        const float shifted = scaled[d] + 12582912.0f;  // the nearest whole number in the low bits
        uint32_t bits;
        memcpy(&bits, &shifted, 4);
        to[d] = int8_t(bits);
    }
    return strange == 0 ? greatest / 127 : __builtin_nanf("");
}

template <class S>
static void put_key(S* group, int64_t in_group, const S* key, int dim) {
    constexpr int PAIR = Format<S>::PAIR;
    for (int d = 0; d < dim; d += PAIR)
        for (int i = 0; i < PAIR; ++i) group[d * GROUP + in_group * PAIR + i] = key[d + i];
}

template <class S>
static void put_value(S* group, int64_t in_group, const S* value, int dim) {
    constexpr int PAIR = Format<S>::PAIR;
    S* to = group + (in_group / PAIR) * dim * PAIR + in_group % PAIR;
    for (int d = 0; d < dim; ++d) to[d * PAIR] = value[d];
}

template <class S>
static void put_latent(S* group, int64_t in_group, const S* latent, int dim) {
    memcpy(group + in_group * dim, latent, dim * sizeof(S));
}

// One vector into its place, by `put`; eight bits take their scale along.
template <class T, class S, class Put>
static void write_vector(const AttentionCall& call, void* cache, int64_t slot, int64_t head, const T* from, Put put) {
    const int64_t block = slot / call.block_size, offset = slot % call.block_size, in_group = offset % GROUP;
    char* at = (char*)head_at<S>(call, cache, block, head);
    S* group = (S*)at + (offset - in_group) * call.head_dim;
    if constexpr (has_scales<S>()) {
        int8_t numbers[LARGEST_DIM];
        ((float*)scales_at<S>(call, at))[offset] = quantise(numbers, from, call.head_dim);
        put(group, in_group, numbers, call.head_dim);
    } else {
        put(group, in_group, from, call.head_dim);
    }
}

template <class T, class S>
static void write_as(const AttentionCall& call, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
        for (int64_t head = 0; head < call.num_kv_heads; ++head) {
            const int64_t slot = call.slots[token];
            const T* key = (const T*)call.key + token * call.key_stride + head * call.head_dim;
            const T* value = (const T*)call.value + token * call.value_stride + head * call.head_dim;
            if (call.is_latent) {
                write_vector<T, S>(call, call.key_cache, slot, head, key, put_latent<S>);
                continue;
            }
            write_vector<T, S>(call, call.key_cache, slot, head, key, put_key<S>);
            write_vector<T, S>(call, call.value_cache, slot, head, value, put_value<S>);
        }
}

static void write(const AttentionCall& call, int64_t begin, int64_t end) {
    if (call.eight_bits)
        call.bf16 ? write_as<bf16, int8_t>(call, begin, end) : write_as<float, int8_t>(call, begin, end);
    else
        call.bf16 ? write_as<bf16, bf16>(call, begin, end) : write_as<float, float>(call, begin, end);
}

}  // namespace VARIANT
