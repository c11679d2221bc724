// Norms, rotations, gates, draws and bans over buffers of exactly their size, for a sanitiser to watch. Compiled by
// test_sanitised.py.
//
// Rows are ones, so what comes out is known; a draw must be an entry of its row, and of those that were not banned.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#include "calls.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern "C" const Kernels JOIN(penstock_, VARIANT);
extern "C" void penstock_norm(const Kernels*, const NormCall*, int);
extern "C" void penstock_rope(const Kernels*, const RopeCall*, int);
extern "C" void penstock_gate(const Kernels*, const GateCall*, int);
extern "C" void penstock_draw(const Kernels*, const DrawCall*, int);
extern "C" void penstock_ban(const Kernels*, const BanCall*, int);
static const Kernels* const KERNELS = &JOIN(penstock_, VARIANT);

static float wide(float value) { return value; }
static float wide(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float found;
    __builtin_memcpy(&found, &bits, 4);
    return found;
}
template <class T>
static T narrow(float value) {
    if (sizeof(T) == 4) return T(value);
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return T(bits >> 16);
}

template <class T>
static std::unique_ptr<T[]> filled(int64_t count, float value) {
    std::unique_ptr<T[]> made(new T[count]);
    for (int64_t i = 0; i < count; ++i) made[i] = narrow<T>(value);
    return made;
}

template <class T>
static int wrong_in(const char* what, const T* from, int64_t count, float wanted) {
    for (int64_t i = 0; i < count; ++i)
        if (!(std::fabs(wide(from[i]) - wanted) <= 0.02f * std::fabs(wanted))) {
            std::printf("%s: %g instead of %g at %lld\n", what, wide(from[i]), wanted, (long long)i);
            return 1;
        }
    return 0;
}

template <class T>
static int rows(int64_t count, int64_t width, int threads) {
    auto x = filled<T>(count * width, 1), residual = filled<T>(count * width, 2), weight = filled<T>(width, 0.5f);
    auto out = filled<T>(count * width, 0), sum = filled<T>(count * width, 0);
    NormCall norm{x.get(), residual.get(), weight.get(), out.get(), sum.get(), count, width, width, width, 0,
                  sizeof(T) == 2, sizeof(T) == 4};
    penstock_norm(KERNELS, &norm, threads);
    int wrong = wrong_in("norm", out.get(), count * width, 0.5f) + wrong_in("sum", sum.get(), count * width, 3);
    auto gate_up = filled<T>(count * 2 * width, 1);
    GateCall gate{gate_up.get(), out.get(), count, width, 2 * width, sizeof(T) == 2, 0};
    penstock_gate(KERNELS, &gate, threads);
    return wrong + wrong_in("gate", out.get(), count * width, 0.7310586f);
}

template <class T>
static int turns(int64_t tokens, int heads, int kv_heads, int dim, int rotary, int threads) {
    auto query = filled<T>(tokens * heads * dim, 1), key = filled<T>(tokens * kv_heads * dim, 1);
    auto weight = filled<T>(dim, 2);
    auto angles = filled<float>(3 * rotary, 0);  // half a turn
    for (int at = 0; at < 3; ++at)
        for (int d = 0; d < rotary / 2; ++d) angles[at * rotary + d] = -1;
    std::unique_ptr<int64_t[]> positions(new int64_t[tokens]);
    for (int64_t t = 0; t < tokens; ++t) positions[t] = t % 3;
    RopeCall call{query.get(), key.get(), weight.get(), weight.get(), angles.get(), positions.get(),
                  int64_t(heads) * dim, int64_t(kv_heads) * dim, tokens, heads, kv_heads, dim, rotary, 0,
                  sizeof(T) == 2, sizeof(T) == 4};
    penstock_rope(KERNELS, &call, threads);
    int wrong = 0;
    for (int64_t head = 0; head < tokens * heads; ++head)
        wrong += wrong_in("turned", query.get() + head * dim, rotary, -2) +
                 wrong_in("still", query.get() + head * dim + rotary, dim - rotary, 2);
    for (int64_t head = 0; head < tokens * kv_heads; ++head)
        wrong += wrong_in("turned key", key.get() + head * dim, rotary, -2);
    return wrong;
}

struct Wish {
    float heat;
    int64_t top_k;
    float top_p, min_p;
};

static int draws(int64_t count, int64_t width, const Wish& wish, int threads) {
    auto logits = filled<float>(count * width, 0);
    for (int64_t i = 0; i < count * width; ++i) logits[i] = float(i * 7919 % 101) / 10;
    std::unique_ptr<uint32_t[]> allowed(new uint32_t[(width + 31) / 32]);
    for (int64_t i = 0; i < (width + 31) / 32; ++i) allowed[i] = 0x55555555u;  // even ones
    for (int64_t r = 0; r < count; ++r) {
        BanCall ban{logits.get() + r * width, allowed.get(), width};
        penstock_ban(KERNELS, &ban, threads);
    }
    auto heat = filled<float>(count, wish.heat), best = filled<float>(count, -1);
    auto top_p = filled<float>(count, wish.top_p), min_p = filled<float>(count, wish.min_p);
    std::vector<double> chance;
    std::unique_ptr<int64_t[]> top_k(new int64_t[count]), ids(new int64_t[count]);
    for (int64_t r = 0; r < count; ++r) chance.push_back(0.999999 * r / count), top_k[r] = wish.top_k;
    const bool is_limited = wish.top_k < width || wish.top_p < 1 || wish.min_p > 0;
    DrawCall call{logits.get(), heat.get(), chance.data(), is_limited ? top_k.get() : nullptr, top_p.get(), min_p.get(),
                  ids.get(), best.get(), count, width, width};
    penstock_draw(KERNELS, &call, threads);
    int wrong = 0;
    for (int64_t r = 0; r < count; ++r)
        if (ids[r] < 0 || ids[r] >= width || ids[r] % 2) {
            std::printf("drew %lld of %lld\n", (long long)ids[r], (long long)width);
            wrong = 1;
        }
    return wrong;
}

int main() {
    int wrong = 0;
    for (int threads : {1, 2}) {
        for (int64_t width : {16, 48, 208, 1040})
            for (int64_t count : {1, 3, 70}) {
                wrong += rows<float>(count, width, threads) + rows<uint16_t>(count, width, threads);
            }
        for (int dim : {32, 48, 128})
            for (int rotary : {32, dim / 32 * 32})
                wrong += turns<float>(5, 4, 2, dim, rotary, threads) + turns<uint16_t>(5, 3, 1, dim, rotary, threads);
        for (int64_t width : {1, 15, 16, 33, 127, 128, 129, 1000, 5003})
            for (const Wish& wish : {Wish{0, 1 << 20, 1, 0}, {1, 1 << 20, 1, 0}, {1, 1, 1, 0}, {0.7f, 50, 0.9f, 0},
                                     {1, 1 << 20, 0.95f, 0}, {2, 1 << 20, 1, 0.05f}, {5, 1 << 20, 1e-6f, 0}})
                wrong += draws(1, width, wish, threads) + draws(9, width, wish, threads);
    }
    return wrong != 0;
}
