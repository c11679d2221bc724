// Products of bytes: rows of int8 times panels of weights of 8 or 4 bits, summed exactly in int32.
//
// A panel holds 16 outputs. Its lines are 64 bytes: 4 inputs (8 bits, signed) or 8 inputs (4 bits, unsigned: the first
// four in the low halves of the bytes, the next four in the high ones) of each output, output by output. A chunk is 32
// inputs. A row's bytes lie in [-127, 127] and are taken four at a time and spread over the lanes.
//
// What an instruction set multiplies is known by the macros that its flags define. AVX2 and plain AVX-512 multiply an
// unsigned byte by a signed one and add neighbours in 16 bits, saturating: the size of a weight of 8 bits times the
// row's byte with the weight's sign stays within 2 * 128 * 127 = 32,512, and eight sums of weights of 4 bits within
// 8 * 2 * 15 * 127 = 30,480, so nothing saturates. VNNI sums four products in 32 bits, of unsigned weights: those of 8
// bits are moved up by 128. Everybody else computes what VNNI does out of ordinary operations, which is how the code
// around VNNI is tested without it.
#pragma once
#include "calls.h"
#include "lanes.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace VARIANT {

struct Ints {
    MaskPart part[PARTS];
};

static inline Ints fill_ints(int32_t value) {
    Ints result;
    EACH_PART result.part[p] = MaskPart{} + value;
    return result;
}

static inline Lanes to_lanes(const Ints& value) {
    Lanes result;
    EACH_PART result.part[p] = __builtin_convertvector(value.part[p], FloatPart);
    return result;
}

// Sixteen whole numbers in [-128, 127] as bytes, and sixteen unsigned bytes as whole numbers. Compilers take these lane
// by lane when they are left to it.
static inline void store_bytes(int8_t* to, const Ints& value) {
#if defined(__AVX512F__) && LANE_BYTES == 64
    _mm_storeu_si128((__m128i*)to, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)value.part[0]));
#elif defined(__AVX2__) && LANE_BYTES == 32
    const __m256i shorts = _mm256_packs_epi32((__m256i)value.part[0], (__m256i)value.part[1]);
    const __m256i ordered = _mm256_permute4x64_epi64(shorts, 0xd8);
    _mm_storeu_si128((__m128i*)to, _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
#else
    EACH_PART UNROLL for (int i = 0; i < WIDTH; ++i) to[p * WIDTH + i] = int8_t(value.part[p][i]);
#endif
}

static inline Ints load_bytes(const uint8_t* from) {
    Ints result;
#if defined(__AVX512F__) && LANE_BYTES == 64
    result.part[0] = (MaskPart)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__) && LANE_BYTES == 32
    EACH_PART result.part[p] = (MaskPart)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + p * WIDTH)));
#else
    EACH_PART UNROLL for (int i = 0; i < WIDTH; ++i) result.part[p][i] = from[p * WIDTH + i];
#endif
    return result;
}

static inline int32_t four_at(const int8_t* from) {
    int32_t result;
    memcpy(&result, from, 4);
    return result;
}

constexpr int CHUNK = 32;

// Rows of a tile, and the panels beside each other.
struct Operands {
    const int8_t* row;
    int64_t row_stride;
    const uint8_t* codes;
    int64_t panel_stride;
};

#if (defined(__AVX2__) && LANE_BYTES == 32) || (defined(__AVX512BW__) && !defined(__AVX512VNNI__) && LANE_BYTES == 64)
constexpr int CODE_OF_ZERO_8 = 0;

#if LANE_BYTES == 32
typedef __m256i Raw;
static inline Raw spread(int32_t four) { return _mm256_set1_epi32(four); }
static inline Raw size_of(Raw a) { return _mm256_abs_epi8(a); }
static inline Raw with_sign(Raw a, Raw of) { return _mm256_sign_epi8(a, of); }
static inline Raw add_halves(Raw a, Raw b) { return _mm256_add_epi16(a, b); }
static inline Raw pairs(Raw a, Raw b) { return _mm256_maddubs_epi16(a, b); }
static inline Raw widened(Raw a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
#else
typedef __m512i Raw;
static inline Raw spread(int32_t four) { return _mm512_set1_epi32(four); }
static inline Raw size_of(Raw a) { return _mm512_abs_epi8(a); }
static inline Raw with_sign(Raw a, Raw of) {
    return _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(of), _mm512_setzero_si512(), a);
}
static inline Raw add_halves(Raw a, Raw b) { return _mm512_add_epi16(a, b); }
static inline Raw pairs(Raw a, Raw b) { return _mm512_maddubs_epi16(a, b); }
static inline Raw widened(Raw a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
#endif

// Compilers put off whole-number sums to the end, of which there are more than registers: this has them made now.
static inline void settle(Raw& a) { asm("" : "+v"(a)); }

template <int R, int N>
static inline void add_chunk_8(Ints (&sum)[R][N], const Operands& at) {
    UNROLL for (int line = 0; line < CHUNK / 4; ++line) {
        Bits code[N];
        UNROLL for (int n = 0; n < N; ++n) code[n] = load_bits(at.codes + n * at.panel_stride + line * 64);
        UNROLL for (int r = 0; r < R; ++r) {
            const Raw left = spread(four_at(at.row + r * at.row_stride + line * 4));
            UNROLL for (int n = 0; n < N; ++n) EACH_PART {
                const Raw weight = (Raw)code[n].part[p];
                Raw to = (Raw)(sum[r][n].part[p] + (MaskPart)widened(pairs(size_of(weight), with_sign(left, weight))));
                settle(to);
                sum[r][n].part[p] = (MaskPart)to;
            }
        }
    }
}

template <int R, int N>
static inline void add_chunk_4(Ints (&sum)[R][N], const Operands& at) {
    Raw halves[R][N][PARTS] = {};
    UNROLL for (int line = 0; line < CHUNK / 8; ++line) {
        Bits low[N], high[N];
        UNROLL for (int n = 0; n < N; ++n) {
            const Bits both = load_bits(at.codes + n * at.panel_stride + line * 64);
            EACH_PART low[n].part[p] = both.part[p] & 0x0f0f0f0fu, high[n].part[p] = both.part[p] >> 4 & 0x0f0f0f0fu;
        }
        UNROLL for (int r = 0; r < R; ++r) {
            const int8_t* left = at.row + r * at.row_stride + line * 8;
            const Raw first = spread(four_at(left)), second = spread(four_at(left + 4));
            UNROLL for (int n = 0; n < N; ++n) EACH_PART {
                Raw& to = halves[r][n][p];
                to = add_halves(to, pairs((Raw)low[n].part[p], first));
                to = add_halves(to, pairs((Raw)high[n].part[p], second));
                settle(to);
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int n = 0; n < N; ++n) EACH_PART sum[r][n].part[p] += (MaskPart)widened(halves[r][n][p]);
}

#else
constexpr int CODE_OF_ZERO_8 = 128;

#if defined(__AVX512VNNI__) && LANE_BYTES == 64
#define EACH_LINE UNROLL
#define DOT static inline
#elif defined(EMULATE_DOT)
#define EACH_LINE
#define DOT static __attribute__((noinline))
#else
#define EACH_LINE
#define DOT static inline
#endif

// sum + the products of four unsigned bytes in each lane of `code` and the four signed ones of `left`.
DOT Ints dot_bytes(const Ints& sum, const Bits& code, int32_t left) {
    Ints result = sum;
#if defined(__AVX512VNNI__) && LANE_BYTES == 64
    result.part[0] = (MaskPart)_mm512_dpbusd_epi32((__m512i)sum.part[0], (__m512i)code.part[0], _mm512_set1_epi32(left));
#else
    UNROLL for (int byte = 0; byte < 4; ++byte) {
        const int32_t factor = int8_t(left >> 8 * byte);
        EACH_PART result.part[p] += (MaskPart)(code.part[p] >> 8 * byte & 0xffu) * factor;
    }
#endif
    return result;
}

template <int R, int N>
static inline void add_chunk_8(Ints (&sum)[R][N], const Operands& at) {
    EACH_LINE for (int line = 0; line < CHUNK / 4; ++line) {
        Bits code[N];
        UNROLL for (int n = 0; n < N; ++n) {
            code[n] = load_bits(at.codes + n * at.panel_stride + line * 64);
            EACH_PART code[n].part[p] ^= 0x80808080u;
        }
        UNROLL for (int r = 0; r < R; ++r) {
            const int32_t left = four_at(at.row + r * at.row_stride + line * 4);
            UNROLL for (int n = 0; n < N; ++n) sum[r][n] = dot_bytes(sum[r][n], code[n], left);
        }
    }
}

template <int R, int N>
static inline void add_chunk_4(Ints (&sum)[R][N], const Operands& at) {
    EACH_LINE for (int line = 0; line < CHUNK / 8; ++line) {
        Bits low[N], high[N];
        UNROLL for (int n = 0; n < N; ++n) {
            const Bits both = load_bits(at.codes + n * at.panel_stride + line * 64);
            EACH_PART low[n].part[p] = both.part[p] & 0x0f0f0f0fu, high[n].part[p] = both.part[p] >> 4 & 0x0f0f0f0fu;
        }
        UNROLL for (int r = 0; r < R; ++r) {
            const int8_t* left = at.row + r * at.row_stride + line * 8;
            const int32_t first = four_at(left), second = four_at(left + 4);
            UNROLL for (int n = 0; n < N; ++n)
                sum[r][n] = dot_bytes(dot_bytes(sum[r][n], low[n], first), high[n], second);
        }
    }
}
#endif

}  // namespace VARIANT
