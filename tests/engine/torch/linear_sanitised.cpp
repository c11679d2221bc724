// Linear layers over buffers of exactly their size, for a sanitiser to watch. Compiled by test_sanitised.py.
//
// Weights are one everywhere, so an output is the sum of its row: what is read besides would show in it too.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#include "calls.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern "C" const Kernels JOIN(penstock_, VARIANT);
extern "C" void penstock_quantised(const Kernels*, const QuantisedCall*, int);
extern "C" void penstock_shorten(const Kernels*, const ShortsCall*, int);
extern "C" void penstock_shorts(const Kernels*, const ShortsCall*, int);
extern "C" void penstock_linear(const Kernels*, const LinearCall*, int);

static const uint16_t HALF_ONE = 0x3c00, BF16_ONE = 0x3f80;

static int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

template <class T>
static std::unique_ptr<T[]> filled(int64_t count, T value) {
    std::unique_ptr<T[]> made(new T[count]);
    for (int64_t i = 0; i < count; ++i) made[i] = value;
    return made;
}

static bool is_wrong(const char* what, float got, float wanted) {
    if (std::fabs(got - wanted) <= 0.02f * wanted) return false;
    std::printf("%s: %g instead of %g\n", what, got, wanted);
    return true;
}

static int few_bits(int bits, int group, int64_t rows, int64_t num_in, int64_t num_out, bool has_zeros) {
    const int64_t groups = up(num_in, group) / group, panels = up(num_out, 16) / 16, width = groups * group;
    // 8 bits are kept less 128; with zero points the code is 3 and zero 2.
    const uint8_t code = has_zeros ? 3 : (bits == 8 ? 129 : 9);
    auto codes = filled<uint8_t>(panels * 16 * width * bits / 8, bits == 8 ? code ^ 128 : code * 17);
    auto scales = filled<uint16_t>(panels * groups * 16, HALF_ONE);
    auto zeros = filled<uint8_t>(panels * groups * 16, 2);
    auto x = filled<float>(rows * num_in, 0.5f), out = filled<float>(rows * num_out, -1.0f);
    auto bias = filled<float>(num_out, 1.0f);
    auto order = filled<int32_t>(num_in, 0);
    for (int64_t i = 0; i < num_in; ++i) order[i] = int32_t(num_in - 1 - i);
    QuantisedCall call{x.get(), bias.get(), codes.get(), scales.get(), has_zeros ? zeros.get() : nullptr,
                       has_zeros ? order.get() : nullptr, out.get(), nullptr, nullptr, rows, num_in, num_out,
                       num_in, groups, 1.0f, bits, group, 0};
    penstock_quantised(&JOIN(penstock_, VARIANT), &call, rows > 4 ? 2 : 1);
    int wrong = 0;
    for (int64_t i = 0; i < rows * num_out; ++i) wrong += is_wrong("few bits", out[i], 0.5f * num_in + 1);
    return wrong;
}

static float widened(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

static int numbers(int64_t rows, int64_t num_in, int64_t num_out) {
    auto weight = filled<uint16_t>(up(num_out, 16) * num_in, BF16_ONE);
    auto x = filled<uint16_t>(rows * num_in, BF16_ONE), out = filled<uint16_t>(rows * num_out, 0);
    LinearCall call{x.get(), weight.get(), nullptr, out.get(), rows, num_in, num_out, num_in, 1};
    penstock_linear(&JOIN(penstock_, VARIANT), &call, 1);
    int wrong = 0;
    for (int64_t i = 0; i < rows * num_out; ++i) {
        wrong += is_wrong("bfloat16", widened(out[i]), float(num_in));
    }
    return wrong;
}

static int shorts(int64_t rows, int64_t num_in, int64_t num_out, int32_t group) {
    const int64_t panels = up(num_out, 16) / 16, groups = num_in / group;
    auto x = filled<uint16_t>(rows * num_in, BF16_ONE), out = filled<uint16_t>(rows * num_out, 0);
    auto codes = filled<int16_t>(panels * 16 * num_in, 3);
    auto scales = filled<uint16_t>(panels * groups * 16, BF16_ONE);
    auto bias = filled<uint16_t>(num_out, BF16_ONE);
    ShortsCall call{};
    call.x = x.get(), call.bias = bias.get(), call.codes = codes.get(), call.scales = scales.get(), call.out = out.get();
    call.num_rows = rows, call.num_in = num_in, call.num_out = num_out, call.x_stride = num_in;
    call.group = group, call.bf16 = 1;
    penstock_shorts(&JOIN(penstock_, VARIANT), &call, rows > 4 ? 2 : 1);
    int wrong = 0;
    for (int64_t i = 0; i < rows * num_out; ++i) wrong += is_wrong("shorts", widened(out[i]), 3.0f * num_in + 1);
    auto plain = filled<int16_t>(rows * num_in, 0);
    auto steps = filled<float>(rows * groups, 0);
    call.rows = plain.get(), call.steps = steps.get(), call.is_plain = 1;
    penstock_shorten(&JOIN(penstock_, VARIANT), &call, 1);
    for (int64_t i = 0; i < rows * num_in; ++i) wrong += is_wrong("shorter", plain[i] * steps[i / group], 1);
    return wrong;
}

int main() {
    int wrong = 0;
    for (int64_t rows : {1, 2, 3, 4, 5, 7, 66, 127})
        for (int64_t num_out : {1, 16, 37, 300}) {
            for (int bits : {8, 4})
                for (int group : {32, 64, 128})
                    for (bool has_zeros : {false, true})
                        for (int64_t num_in : {group, 3 * group, 2 * group - 7})
                            wrong += few_bits(bits, group, rows, num_in, num_out, has_zeros);
            for (int64_t num_in : {16, 48, 1040}) wrong += numbers(rows, num_in, num_out);
            for (int32_t group : {16, 64, 128})
                for (int64_t num_in : {group, 3 * group, 1152}) wrong += shorts(rows, num_in, num_out, group);
        }
    return wrong != 0;
}
