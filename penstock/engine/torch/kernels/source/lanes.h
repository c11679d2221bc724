// Sixteen floats that act as one value, whatever the machine's vector is called.
//
// LANE_BYTES (64: AVX-512, 32: AVX2, 16: SSE, NEON and others) says how wide a hardware vector is; `Lanes` is then
// 1, 2 or 4 of them. Everything is written with the compiler's vector extensions, so one text serves every
// instruction set; called by name are the instructions for bfloat16 (DOT_BF16) and what compilers make poor code of.
// EMULATE_DOT computes the dot product from ordinary ones, so the code around it is tested on machines without it.
//
// Only static functions and types of the variant's own namespace may appear here: whatever the linker could share
// between variants would carry one variant's instructions into another.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
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

// By name where compilers take a vector of shorts apart.
static inline BitsPart bits_of(HalfPart half) {
#if defined(__AVX512F__) && LANE_BYTES == 64
    return (BitsPart)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);
#elif defined(__AVX2__) && LANE_BYTES == 32
    return (BitsPart)_mm256_cvtepu16_epi32((__m128i)half);
#else
    return __builtin_convertvector(half, BitsPart);
#endif
}

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
    EACH_PART result.part[p] = value - FloatPart{};  // which costs nothing, while adding zero makes -0 another
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
        result.part[p] = (FloatPart)(bits_of(half) << 16);
    }
    return result;
}

static inline void store_bits(void* to, const Bits& value) {
    EACH_PART ((BitsAt*)to)[p] = value.part[p];
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

#if defined(DOT_BF16) && !defined(EMULATE_DOT)
// By the instruction, to which what is below the smallest normal number is zero.
static inline HalfPart halves_of(FloatPart value) { return (HalfPart)_mm512_cvtneps_pbh((__m512)value); }
static inline FloatPart rounded(FloatPart value) {
    return (FloatPart)(bits_of(halves_of(value)) << 16);
}
#else
static inline HalfPart halves_of(FloatPart value) {
    return __builtin_convertvector(rounded_bits(value) >> 16, HalfPart);
}
static inline FloatPart rounded(FloatPart value) { return (FloatPart)(rounded_bits(value) & 0xffff0000u); }
#endif

static inline void store(bf16* to, const Lanes& value) {
    EACH_PART *(HalvesAt*)(to + p * WIDTH) = halves_of(value.part[p]);
}

// What a store and a load would leave of a value.
static inline Lanes rounded(const Lanes& value, const bf16*) {
    Lanes result;
    EACH_PART result.part[p] = rounded(value.part[p]);
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

// All lanes joined by halves: a chain of four operations instead of sixteen.
#if LANE_BYTES > 16 && defined(__AVX2__)
typedef float Eight __attribute__((vector_size(32), may_alias));
typedef float Four __attribute__((vector_size(16), may_alias));

template <class Join>
static inline float joined(const Lanes& value, Join join) {
#if LANE_BYTES == 64
    const __m512 all = (__m512)value.part[0];
    const Eight low = (Eight)_mm512_maskz_extractf32x8_ps(0xff, all, 0);
    const Eight high = (Eight)_mm512_maskz_extractf32x8_ps(0xff, all, 1);
#else
    const Eight low = value.part[0], high = value.part[1];
#endif
    const __m256 eight = (__m256)join(low, high);
    const Four four = join((Four)_mm256_castps256_ps128(eight), (Four)_mm256_extractf128_ps(eight, 1));
    const Four two = join(four, (Four)_mm_movehl_ps((__m128)four, (__m128)four));
    return join(two[0], two[1]);
}
#else
template <class Join>
static inline float joined(const Lanes& value, Join join) {
    float part[16];
    UNROLL for (int i = 0; i < 16; ++i) part[i] = value.part[i / WIDTH][i % WIDTH];
    UNROLL for (int half = 8; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; ++i) part[i] = join(part[i], part[i + half]);
    return part[0];
}
#endif

static inline float sum_of(const Lanes& value) {
    return joined(value, [](auto a, auto b) { return a + b; });
}

static inline float greatest_of(const Lanes& value) {
    return joined(value, [](auto a, auto b) { return b > a ? b : a; });
}

// A NaN stays one. By name: compilers compare and choose.
static inline FloatPart clamped(FloatPart x, FloatPart low, FloatPart high) {
#if defined(__AVX512F__) && LANE_BYTES == 64
    return (FloatPart)_mm512_maskz_min_ps(0xffff, (__m512)high, _mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)x));
#elif defined(__AVX2__) && LANE_BYTES == 32
    return _mm256_min_ps(high, _mm256_max_ps(low, x));
#else
    x = x < low ? low : x;
    return x > high ? high : x;
#endif
}

// Two to the power of x. The whole part goes into the exponent bits; the rest, at most a half in size, into the
// Taylor series, whose next term is below 6e-9. Below 2^-126 the result stays at that smallest normal number.
static inline Lanes exp2(const Lanes& x) {
    const float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
    Lanes result;
    EACH_PART {
        const FloatPart y = clamped(x.part[p], FloatPart{} - 126.0f, FloatPart{} + 127.0f);
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
static inline Lanes dot_pairs(const Lanes& sum, const Bits& left, const Bits& right) {
    Lanes result;
#ifdef EMULATE_DOT
    EACH_PART {
        const FloatPart high = (FloatPart)(left.part[p] & 0xffff0000u), low = (FloatPart)(left.part[p] << 16);
        result.part[p] = sum.part[p] + high * (FloatPart)(right.part[p] & 0xffff0000u);
        result.part[p] = result.part[p] + low * (FloatPart)(right.part[p] << 16);
    }
#else
    result.part[0] = (FloatPart)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)right.part[0], (__m512bh)left.part[0]);
#endif
    return result;
}

static inline Lanes dot_pairs(const Lanes& sum, uint32_t left, const Bits& right) {
    Bits pairs;
    EACH_PART pairs.part[p] = BitsPart{} + left;
    return dot_pairs(sum, pairs, right);
}
#endif

}  // namespace VARIANT
