// Sixteen floats that act as one value, whatever the machine's vector is called.
//
// LANE_BYTES (64: AVX-512, 32: AVX2, 16: SSE, NEON and others) says how wide a hardware vector is; `Lanes` is then
// 1, 2 or 4 of them. Everything is written with the compiler's vector extensions, so one text serves every
// instruction set; the bfloat16 dot product is the only instruction called by name (DOT_BF16).
// EMULATE_DOT computes that instruction from ordinary ones, so the code around it is tested on machines without it.
//
// Only static functions and types of the variant's own namespace may appear here: whatever the linker could share
// between variants would carry one variant's instructions into another.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(DOT_BF16) && !defined(EMULATE_DOT)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace VARIANT {

typedef float FloatPart __attribute__((vector_size(LANE_BYTES), may_alias));
typedef uint32_t BitsPart __attribute__((vector_size(LANE_BYTES), may_alias));
typedef int32_t MaskPart __attribute__((vector_size(LANE_BYTES), may_alias));
typedef uint16_t HalfPart __attribute__((vector_size(LANE_BYTES / 2), may_alias));

// The same in memory, at any address.
typedef float FloatsAt __attribute__((vector_size(LANE_BYTES), may_alias, aligned(4)));
typedef uint32_t BitsAt __attribute__((vector_size(LANE_BYTES), may_alias, aligned(2)));
typedef uint16_t HalvesAt __attribute__((vector_size(LANE_BYTES / 2), may_alias, aligned(2)));

constexpr int PARTS = 64 / LANE_BYTES;
constexpr int WIDTH = LANE_BYTES / 4;  // floats a part

struct Lanes {
    FloatPart part[PARTS];
};
struct Bits {
    BitsPart part[PARTS];
};
struct Mask {
    MaskPart part[PARTS];
};

typedef uint16_t bf16;

#define EACH_PART UNROLL for (int p = 0; p < PARTS; ++p)

static inline float to_float(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline float to_float(float value) { return value; }

// Round to nearest even, as torch does; a NaN stays one.
static inline bf16 to_bf16(float value) {
    if (value != value) return 0x7fc0;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline Lanes fill(float value) {
    Lanes result;
    EACH_PART result.part[p] = FloatPart{} + value;
    return result;
}

static inline Lanes load(const float* from) {
    Lanes result;
    EACH_PART result.part[p] = *(const FloatsAt*)(from + p * WIDTH);
    return result;
}

static inline Bits load_bits(const void* from) {
    Bits result;
    EACH_PART result.part[p] = ((const BitsAt*)from)[p];
    return result;
}

static inline Lanes load(const bf16* from) {
    Lanes result;
    EACH_PART {
        HalfPart half = *(const HalvesAt*)(from + p * WIDTH);
        result.part[p] = (FloatPart)(__builtin_convertvector(half, BitsPart) << 16);
    }
    return result;
}

static inline void store(float* to, const Lanes& value) {
    EACH_PART *(FloatsAt*)(to + p * WIDTH) = value.part[p];
}

// The bits of the rounded bfloat16 in the upper half of each lane; the lower half is junk.
static inline BitsPart rounded_bits(FloatPart value) {
    BitsPart bits = (BitsPart)value;
    BitsPart rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return value == value ? rounded : (BitsPart{} + 0x7fc00000u);
}

static inline void store(bf16* to, const Lanes& value) {
    EACH_PART {
        *(HalvesAt*)(to + p * WIDTH) = __builtin_convertvector(rounded_bits(value.part[p]) >> 16, HalfPart);
    }
}

// What a store and a load would leave of a value.
static inline Lanes rounded(const Lanes& value, const bf16*) {
    Lanes result;
    EACH_PART result.part[p] = (FloatPart)(rounded_bits(value.part[p]) & 0xffff0000u);
    return result;
}
static inline Lanes rounded(const Lanes& value, const float*) { return value; }

static inline Lanes operator*(const Lanes& a, const Lanes& b) {
    Lanes result;
    EACH_PART result.part[p] = a.part[p] * b.part[p];
    return result;
}

static inline Lanes operator+(const Lanes& a, const Lanes& b) {
    Lanes result;
    EACH_PART result.part[p] = a.part[p] + b.part[p];
    return result;
}

static inline Lanes operator-(const Lanes& a, const Lanes& b) {
    Lanes result;
    EACH_PART result.part[p] = a.part[p] - b.part[p];
    return result;
}

static inline Lanes operator/(const Lanes& a, const Lanes& b) {
    Lanes result;
    EACH_PART result.part[p] = a.part[p] / b.part[p];
    return result;
}

static inline Lanes greater_of(const Lanes& a, const Lanes& b) {
    Lanes result;
    EACH_PART result.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
    return result;
}

// Lanes whose index, counted from `first`, lies in [from, upto).
static inline Mask within(int first, int from, int upto) {
    Mask result;
    EACH_PART {
        MaskPart index;
        UNROLL for (int i = 0; i < WIDTH; ++i) index[i] = p * WIDTH + i;
        index = index + first;
        result.part[p] = (index >= (MaskPart{} + from)) & (index < (MaskPart{} + upto));
    }
    return result;
}

static inline Lanes choose(const Mask& mask, const Lanes& yes, const Lanes& no) {
    Lanes result;
    EACH_PART result.part[p] = mask.part[p] ? yes.part[p] : no.part[p];
    return result;
}

static inline float sum_of(const Lanes& value) {
    FloatPart total = value.part[0];
    UNROLL for (int p = 1; p < PARTS; ++p) total = total + value.part[p];
    float result = 0;
    UNROLL for (int i = 0; i < WIDTH; ++i) result += total[i];
    return result;
}

static inline float greatest_of(const Lanes& value) {
    FloatPart best = value.part[0];
    UNROLL for (int p = 1; p < PARTS; ++p) best = value.part[p] > best ? value.part[p] : best;
    float result = best[0];
    UNROLL for (int i = 1; i < WIDTH; ++i) result = best[i] > result ? best[i] : result;
    return result;
}

// Two to the power of x. The whole part goes into the exponent bits; the rest, at most a half in size, into the
// Taylor series, whose next term is below 6e-9. Below 2^-126 the result stays at that smallest normal number.
static inline Lanes exp2(const Lanes& x) {
    const float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
    Lanes result;
    EACH_PART {
        FloatPart low = FloatPart{} - 126.0f, high = FloatPart{} + 127.0f;
        FloatPart y = x.part[p] < low ? low : x.part[p];
        y = y > high ? high : y;
        FloatPart shifted = y + ROUNDER;
        FloatPart rest = y - (shifted - ROUNDER);
        FloatPart series = FloatPart{} + 1.5252733804e-5f;
        series = series * rest + 1.5403530394e-4f;
        series = series * rest + 1.3333558146e-3f;
        series = series * rest + 9.6181291076e-3f;
        series = series * rest + 5.5504108665e-2f;
        series = series * rest + 2.4022650696e-1f;
        series = series * rest + 6.9314718056e-1f;
        series = series * rest + 1.0f;
        BitsPart exponent = ((BitsPart)shifted + 127) << 23;  // the rounder's own bits fall off the top
        result.part[p] = series * (FloatPart)exponent;
    }
    return result;
}

#ifdef DOT_BF16
// sum + left.low * right.low + left.high * right.high, lane by lane, on pairs of bfloat16.
static inline Lanes dot_pairs(const Lanes& sum, uint32_t left, const Bits& right) {
#ifdef EMULATE_DOT
    Lanes result;
    float low = to_float(bf16(left)), high = to_float(bf16(left >> 16));
    EACH_PART {
        result.part[p] = sum.part[p] + high * (FloatPart)(right.part[p] & 0xffff0000u);
        result.part[p] = result.part[p] + low * (FloatPart)(right.part[p] << 16);
    }
    return result;
#else
    const __m512i pair = _mm512_set1_epi32(int(left));
    Lanes result;
    result.part[0] = (FloatPart)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)right.part[0], (__m512bh)pair);
    return result;
#endif
}
#endif

}  // namespace VARIANT
