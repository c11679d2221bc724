// Attention and adapters over buffers of exactly their size, for a sanitiser to watch. Compiled by test_sanitised.py.
//
// All values are one, so what is attended to is one whatever the scores are; what was never written is no number, so
// what is read besides would show in it too.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "calls.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern "C" const Kernels JOIN(penstock_, VARIANT);
extern "C" void penstock_attention(const Kernels*, const AttentionCall*, int);
extern "C" void penstock_adapt(const Kernels*, const AdaptCall*, int);

static uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t(bits >> 16);
}
static float wide(float value) { return value; }
static float wide(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}
static void put(float& to, float value) { to = value; }
static void put(uint16_t& to, float value) { to = narrow(value); }

template <class T>
static std::unique_ptr<T[]> filled(int64_t count, float value) {
    std::unique_ptr<T[]> made(new T[count]);
    for (int64_t i = 0; i < count; ++i) put(made[i], value);
    return made;
}

template <class T>
static int wrong_in(const char* what, const T* from, int64_t count, float wanted) {
    for (int64_t i = 0; i < count; ++i)
        if (!(std::fabs(wide(from[i]) - wanted) <= 0.02f * wanted)) {
            std::printf("%s: %g instead of %g at %lld\n", what, wide(from[i]), wanted, (long long)i);
            return 1;
        }
    return 0;
}

struct Shape {
    int heads, kv_heads, dim, block, window;
    bool eight_bits, is_latent, wants_lse;
    int threads;
};

// A cache, and jobs of so many tokens in it; each has its own blocks, in descending order.
template <class T>
struct Jobs {
    const Shape& shape;
    const std::vector<int>& contexts;
    int most_blocks = 0, num_blocks = 0;
    std::unique_ptr<char[]> keys, values;
    std::unique_ptr<int32_t[]> table;

    Jobs(const Shape& given, const std::vector<int>& lengths) : shape(given), contexts(lengths) {
        for (int context : contexts) {
            const int blocks = (context + shape.block - 1) / shape.block;
            num_blocks += blocks;
            most_blocks = blocks > most_blocks ? blocks : most_blocks;
        }
        const int64_t vector = shape.dim * int64_t(shape.eight_bits ? 1 : sizeof(T)) + (shape.eight_bits ? 4 : 0);
        const int64_t bytes = int64_t(num_blocks) * shape.kv_heads * shape.block * vector;
        keys.reset(new char[bytes]), values.reset(new char[shape.is_latent ? 1 : bytes]);
        std::memset(keys.get(), 0xff, bytes), std::memset(values.get(), 0xff, shape.is_latent ? 1 : bytes);
        table.reset(new int32_t[contexts.size() * most_blocks]);
        int next = num_blocks;
        for (size_t job = 0; job < contexts.size(); ++job)
            for (int i = 0; i < most_blocks; ++i)
                table[job * most_blocks + i] = i * shape.block < contexts[job] ? --next : 0;
    }

    // The last tokens of those that each job has by now.
    int step(const std::vector<int>& upto, const std::vector<int>& counts) const {
        const int chunks = int(contexts.size()), value_dim = shape.is_latent ? shape.dim / 32 * 16 : shape.dim;
        auto starts = std::unique_ptr<int32_t[]>(new int32_t[chunks + 1]);
        starts[0] = 0;
        std::vector<int64_t> slots;
        for (int job = 0; job < chunks; ++job) {
            starts[job + 1] = starts[job] + counts[job];
            for (int at = upto[job] - counts[job]; at < upto[job]; ++at)
                slots.push_back(int64_t(table[job * most_blocks + at / shape.block]) * shape.block + at % shape.block);
        }
        const int64_t tokens = starts[chunks], width = int64_t(shape.kv_heads) * shape.dim;
        auto query = filled<T>(tokens * shape.heads * shape.dim, 0.25f);
        auto key = filled<T>(tokens * width, 1.0f), value = filled<T>(tokens * width, 1.0f);
        auto out = filled<T>(tokens * shape.heads * value_dim, -1.0f);
        auto lse = filled<float>(tokens * shape.heads, -1.0f);
        auto seen = std::unique_ptr<int32_t[]>(new int32_t[chunks]);
        std::memcpy(seen.get(), upto.data(), chunks * sizeof(int32_t));
        auto places = std::unique_ptr<int64_t[]>(new int64_t[tokens]);
        std::memcpy(places.get(), slots.data(), tokens * sizeof(int64_t));
        AttentionCall call{};
        call.query = query.get(), call.key = key.get(), call.value = value.get(), call.out = out.get();
        call.lse = shape.wants_lse ? lse.get() : nullptr;
        call.key_cache = keys.get(), call.value_cache = shape.is_latent ? keys.get() : values.get();
        call.query_start = starts.get(), call.context = seen.get(), call.block_table = table.get();
        call.slots = places.get();
        call.query_stride = int64_t(shape.heads) * shape.dim, call.key_stride = call.value_stride = width;
        call.table_stride = most_blocks;
        call.num_chunks = chunks, call.num_tokens = int32_t(tokens);
        call.num_heads = shape.heads, call.num_kv_heads = shape.kv_heads;
        call.head_dim = shape.dim, call.block_size = shape.block, call.causal = 1, call.window = shape.window;
        call.scale = 0.1f, call.cap = shape.wants_lse ? 30.0f : INFINITY;
        call.bf16 = sizeof(T) == 2, call.eight_bits = shape.eight_bits, call.is_latent = shape.is_latent;
        call.value_dim = value_dim;
        penstock_attention(&JOIN(penstock_, VARIANT), &call, shape.threads);
        return wrong_in("attention", out.get(), tokens * shape.heads * value_dim, 1.0f);
    }
};

template <class T>
static int attended(const Shape& shape, const std::vector<int>& contexts, int last) {
    const Jobs<T> jobs(shape, contexts);
    std::vector<int> before, counts;
    for (int context : contexts) before.push_back(context - last), counts.push_back(last);
    return jobs.step(before, before) + jobs.step(contexts, counts);
}

template <class T>
static int all_attention() {
    int wrong = 0;
    for (int dim : {16, 48, 128})
        for (int block : {16, 32})
            for (bool eight_bits : {false, true})
                for (int last : {1, 5}) {
                    const bool odd = last == 5;
                    const std::vector<int> few{17, 33, 6 + 2 * block, 70}, one{1500};
                    for (int window : {INT32_MAX, 20}) {
                        wrong += attended<T>({6, 2, dim, block, window, eight_bits, false, odd, 1}, few, last);
                        wrong += attended<T>({4, 4, dim, block, window, eight_bits, false, !odd, 2}, few, last);
                    }
                    wrong += attended<T>({14, 1, dim, block, INT32_MAX, eight_bits, false, odd, 1}, few, last);
                    wrong += attended<T>({2, 1, dim, block, INT32_MAX, eight_bits, false, odd, 2}, one, last);
                    if (dim > 16) wrong += attended<T>({5, 1, dim, block, INT32_MAX, eight_bits, true, odd, 2}, few, last);
                }
    return wrong;
}

template <class T>
static int adapted(int64_t rank, int64_t num_in, int64_t num_out, const std::vector<int32_t>& slots, int threads) {
    const int64_t users = int64_t(slots.size()), rows = 2 * users;
    auto x = filled<T>(rows * num_in, 0.5f), out = filled<T>(rows * num_out, 1.0f);
    auto down = filled<float>(3 * rank * num_in, 1.0f), up = filled<float>(3 * rank * num_out, 0.25f);
    std::unique_ptr<int32_t[]> of(new int32_t[users]), which(new int32_t[users]);
    for (int64_t u = 0; u < users; ++u) of[u] = int32_t(2 * u + 1), which[u] = slots[u];
    AdaptCall call{};
    call.x = x.get(), call.out = out.get(), call.down = down.get(), call.up = up.get();
    call.rows = of.get(), call.slots = which.get(), call.num_users = users;
    call.num_in = num_in, call.num_out = num_out, call.rank = rank, call.x_stride = num_in, call.out_stride = num_out;
    call.down_stride = rank * num_in, call.up_stride = rank * num_out, call.bf16 = sizeof(T) == 2;
    penstock_adapt(&JOIN(penstock_, VARIANT), &call, threads);
    int wrong = 0;
    for (int64_t row = 0; row < rows; ++row)
        wrong += wrong_in("adapters", out.get() + row * num_out, num_out, row % 2 ? 1 + 0.125f * num_in * rank : 1);
    return wrong;
}

int main() {
    int wrong = all_attention<float>() + all_attention<uint16_t>();
    for (int64_t rank : {1, 8, 16, 256})
        for (const std::vector<int32_t>& slots :
             {std::vector<int32_t>{0}, {2, 2}, {1, 1, 1}, {0, 1, 1, 1, 1, 1, 2}, {2, 2, 2, 2, 0, 0, 0, 0, 0}})
            for (int threads : {1, 2}) {
                wrong += adapted<float>(rank, 48, 32, slots, threads);
                wrong += adapted<uint16_t>(rank, 16, 80, slots, threads);
            }
    return wrong != 0;
}
