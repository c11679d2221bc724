// What Python calls: splits the work of a call into parts and runs them on threads.
//
// Threads come from the OpenMP runtime that torch has already loaded (penstock_use_threads is given its
// GOMP_parallel), so torch's team and ours are the same threads and none spins against another. Where there is no
// such runtime, threads are started for the call.
//
// The parts of an attention call are taken from a shared counter, the longest first. Keys are split only when there
// are too few items for the threads; whoever finishes the last part of an item merges it.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "calls.h"

namespace {

constexpr int64_t TILE_ROWS = 64;        // query rows an item aims at: enough to reuse each key from the nearest cache
constexpr int64_t LEAST_SPLIT = 256;     // keys in a part, when keys are split
constexpr int64_t PARTS_A_THREAD = 4;    // so that a thread that was held up is waited for briefly
constexpr int64_t ITEMS_A_THREAD = 2;    // at least, of several heads each: these read memory in longer runs
constexpr int64_t SERIAL_ELEMENTS = 32768;  // below this, waking threads costs more than it saves

using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);
ParallelRegion openmp_region = nullptr;

struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
    char* at_least(size_t bytes) {
        if (bytes > size) {
            std::free(data);
            size = (bytes + 4095) / 4096 * 4096;
            data = std::aligned_alloc(64, size);
            if (!data) throw std::bad_alloc();
        }
        return static_cast<char*>(data);
    }
};

template <class Body>
void on_threads(int threads, Body& body) {
    if (threads <= 1) return body();
    auto run = [](void* data) { (*static_cast<Body*>(data))(); };
    if (openmp_region) return openmp_region(run, &body, unsigned(threads), 0);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(run, static_cast<void*>(&body));
    body();
    for (auto& other : others) other.join();
}

// body(begin, end) over [0, count) in chunks.
template <class Body>
void over_range(int64_t count, int64_t chunk, int threads, const Body& body) {
    int64_t chunks = (count + chunk - 1) / chunk;
    if (threads <= 1 || chunks <= 1) {
        if (count > 0) body(0, count);
        return;
    }
    std::atomic<int64_t> next{0};
    auto take = [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
            body(i * chunk, std::min(count, (i + 1) * chunk));
    };
    on_threads(int(std::min<int64_t>(threads, chunks)), take);
}

template <class Body>
void over_rows(int64_t rows, int64_t width, int threads, const Body& body) {
    over_range(rows, std::max<int64_t>(1, SERIAL_ELEMENTS / std::max<int64_t>(1, width)), threads, body);
}

// The parts of one item: its key ranges, and how many are still to come.
struct Whole {
    Item item;
    int first_part, num_parts;
};

struct Part {
    Item item;
    int whole;
};

struct AttentionPlan {
    std::vector<Whole> wholes;
    std::vector<Part> parts;
    std::vector<float> partials;
};

int64_t rows_of(const AttentionCall& call, const Item& item) {
    return int64_t(item.num_queries) * item.num_kv_heads * (call.num_heads / call.num_kv_heads);
}

// Key/value heads of a single query in one item: all, as long as there are items enough to keep every thread busy.
int heads_abreast(const AttentionCall& call, int threads) {
    if (call.is_latent) return 1;
    const int64_t all = int64_t(call.num_chunks) * call.num_kv_heads;
    const int64_t most = threads <= 1 ? MOST_ABREAST : std::min<int64_t>(MOST_ABREAST, all / (ITEMS_A_THREAD * threads));
    return int(std::max<int64_t>(1, std::min<int64_t>(most, call.num_kv_heads)));
}

void list_items(const AttentionCall& call, int abreast, std::vector<Whole>& wholes) {
    const int share = call.num_heads / call.num_kv_heads;
    const int tile = int(std::max<int64_t>(1, TILE_ROWS / share));
    wholes.clear();
    for (int chunk = 0; chunk < call.num_chunks; ++chunk) {
        const int queries = call.query_start[chunk + 1] - call.query_start[chunk], context = call.context[chunk];
        for (int last = queries; last > 0; last -= tile) {
            const int first = std::max(0, last - tile);
            int begin = 0, end = context;
            if (call.causal) {
                end = context - queries + last;
                begin = std::max(0, context - queries + first + 1 - call.window);
            }
            const int step = last - first == 1 ? abreast : 1;
            for (int head = 0; head < call.num_kv_heads; head += step) {
                const int heads = std::min(step, call.num_kv_heads - head);
                wholes.push_back({{chunk, head, heads, first, last - first, begin, end, nullptr}, 0, 1});
            }
        }
    }
}

void split_keys(const AttentionCall& call, int threads, AttentionPlan& plan) {
    int64_t items = 0;  // of one head each
    for (const Whole& whole : plan.wholes) items += whole.item.num_kv_heads;
    const int64_t wanted = threads <= 1 ? 1 : PARTS_A_THREAD * threads / std::max<int64_t>(1, items);
    int64_t floats = 0;
    plan.parts.clear();
    for (size_t w = 0; w < plan.wholes.size(); ++w) {
        Whole& whole = plan.wholes[w];
        const int64_t keys = whole.item.key_end - whole.item.key_begin;
        const int64_t count = whole.item.num_kv_heads > 1 ? 1 : std::max<int64_t>(1, std::min(wanted, keys / LEAST_SPLIT));
        const int64_t length = ((keys + count - 1) / count + GROUP - 1) / GROUP * GROUP;
        whole.first_part = int(plan.parts.size());
        for (int64_t begin = 0; begin == 0 || begin < keys; begin += length) {
            Part part{whole.item, int(w)};
            part.item.key_begin = int32_t(whole.item.key_begin + begin);
            part.item.key_end = int32_t(whole.item.key_begin + std::min(keys, begin + length));
            plan.parts.push_back(part);
        }
        whole.num_parts = int(plan.parts.size()) - whole.first_part;
        if (whole.num_parts > 1) floats += whole.num_parts * rows_of(call, whole.item) * (call.value_dim + 2);
    }
    plan.partials.resize(size_t(floats));
    float* free_space = plan.partials.data();
    for (Part& part : plan.parts) {
        if (plan.wholes[part.whole].num_parts == 1) continue;
        part.item.partial = free_space;
        free_space += rows_of(call, part.item) * (call.value_dim + 2);
    }
}

void merge_whole(const Kernels& kernels, const AttentionCall& call, const AttentionPlan& plan, const Whole& whole) {
    std::vector<const float*> partials;
    for (int i = 0; i < whole.num_parts; ++i) partials.push_back(plan.parts[whole.first_part + i].item.partial);
    kernels.merge(call, whole.item, partials.data(), whole.num_parts);
}

void run_parts(const Kernels& kernels, const AttentionCall& call, int threads, const AttentionPlan& plan) {
    int64_t rows = 0;
    for (const Whole& whole : plan.wholes) rows = std::max(rows, rows_of(call, whole.item));
    const int64_t bytes = kernels.scratch_bytes(call, rows);
    std::unique_ptr<std::atomic<int>[]> left(new std::atomic<int>[plan.wholes.size()]);
    for (size_t w = 0; w < plan.wholes.size(); ++w) left[w].store(plan.wholes[w].num_parts);
    over_range(int64_t(plan.parts.size()), 1, threads, [&](int64_t begin, int64_t end) {
        thread_local Buffer scratch;
        for (int64_t i = begin; i < end; ++i) {
            const Part& part = plan.parts[size_t(i)];
            kernels.attend(call, part.item, scratch.at_least(size_t(bytes)));
            const bool was_last = left[part.whole].fetch_sub(1, std::memory_order_acq_rel) == 1;
            if (was_last && part.item.partial) merge_whole(kernels, call, plan, plan.wholes[part.whole]);
        }
    });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void penstock_use_threads(ParallelRegion region) { openmp_region = region; }

// Asks for large pages: blocks lie anywhere, and with small pages nearly each one costs a walk of the page tables.
EXPORT void penstock_large_pages(void* from, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 4096, begin = (uintptr_t(from) + page - 1) / page * page;
    const uintptr_t end = (uintptr_t(from) + uintptr_t(bytes)) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)from, (void)bytes;
#endif
}

EXPORT void penstock_attention(const Kernels* kernels, const AttentionCall* call, int threads) {
    thread_local AttentionPlan plan;
    over_rows(call->num_tokens, 2 * int64_t(call->num_kv_heads) * call->head_dim, threads,
              [&](int64_t begin, int64_t end) { kernels->write(*call, begin, end); });
    list_items(*call, heads_abreast(*call, threads), plan.wholes);
    split_keys(*call, threads, plan);
    run_parts(*kernels, *call, threads, plan);
}

EXPORT void penstock_norm(const Kernels* kernels, const NormCall* call, int threads) {
    over_rows(call->num_rows, call->width, threads,
              [&](int64_t begin, int64_t end) { kernels->norm(*call, begin, end); });
}

EXPORT void penstock_rope(const Kernels* kernels, const RopeCall* call, int threads) {
    over_rows(call->num_tokens, int64_t(call->num_heads + call->num_kv_heads) * call->head_dim, threads,
              [&](int64_t begin, int64_t end) { kernels->rope(*call, begin, end); });
}

EXPORT void penstock_gate(const Kernels* kernels, const GateCall* call, int threads) {
    over_rows(call->num_rows, 2 * call->width, threads,
              [&](int64_t begin, int64_t end) { kernels->gate(*call, begin, end); });
}

EXPORT void penstock_adapt(const Kernels* kernels, const AdaptCall* call, int threads) {
    const int64_t chunk = std::max<int64_t>(1, (call->num_users + threads - 1) / std::max(1, threads));
    over_range(call->num_users, chunk, threads,
               [&](int64_t begin, int64_t end) { kernels->adapt(*call, begin, end); });
}

EXPORT void penstock_linear(const Kernels* kernels, const LinearCall* call, int threads) {
    const int64_t all = (call->num_out + GROUP - 1) / GROUP, down = (call->num_rows + LINEAR_ROWS - 1) / LINEAR_ROWS;
    // Wide tiles read their rows seldom; narrow ones leave something for every thread.
    const bool is_wide = threads <= 1 || all * down >= PARTS_A_THREAD * threads * LINEAR_PANELS;
    const int panels = is_wide ? LINEAR_PANELS : LINEAR_PANELS / 2;
    const int64_t across = (all + panels - 1) / panels;
    // Rows by rows: those of a tile stay near while the weights, which are asked for well ahead, pass once more.
    over_range(across * down, 1, threads, [&](int64_t begin, int64_t end) {
        thread_local Buffer scratch;
        char* memory = scratch.at_least(size_t(kernels->linear_scratch()));
        for (int64_t i = begin; i < end; ++i)
            kernels->linear(*call, i / across * LINEAR_ROWS, i % across * panels, panels, memory);
    });
}

EXPORT void penstock_quantised(const Kernels* kernels, const QuantisedCall* given, int threads) {
    thread_local Buffer space;
    QuantisedCall call = *given;
    const size_t groups = size_t(call.num_rows * call.num_groups);
    char* rows = space.at_least(groups * (sizeof(RowGroup) + size_t(call.group)) + size_t(call.num_rows) * QUANTISED_GAP);
    call.groups = reinterpret_cast<RowGroup*>(rows);
    call.bytes = reinterpret_cast<int8_t*>(rows + groups * sizeof(RowGroup));
    over_rows(call.num_rows, call.num_in, threads,
              [&](int64_t begin, int64_t end) { kernels->quantise_rows(call, begin, end); });
    const int64_t across = (call.num_out + QUANTISED_PANELS * GROUP - 1) / (QUANTISED_PANELS * GROUP);
    const int64_t down = (call.num_rows + QUANTISED_ROWS - 1) / QUANTISED_ROWS;
    over_range(across * down, 1, threads, [&](int64_t begin, int64_t end) {
        thread_local Buffer scratch;
        char* memory = scratch.at_least(size_t(kernels->quantised_scratch()));
        for (int64_t i = begin; i < end; ++i)
            kernels->quantised(call, i % down * QUANTISED_ROWS, i / down * QUANTISED_PANELS, memory);
    });
}

// Rows that are only to become shorts: those of a weight. The table of steps is the caller's.
EXPORT void penstock_shorten(const Kernels* kernels, const ShortsCall* call, int threads) {
    over_rows(call->num_rows, call->num_in, threads,
              [&](int64_t begin, int64_t end) { kernels->shorten_rows(*call, begin, end); });
}

EXPORT void penstock_shorts(const Kernels* kernels, const ShortsCall* given, int threads) {
    thread_local Buffer space;
    ShortsCall call = *given;
    const int64_t groups = call.num_in / call.group;
    const size_t codes = size_t(call.num_rows * call.num_in) * sizeof(int16_t);
    char* rows = space.at_least(codes + size_t(call.num_rows * groups) * sizeof(float));
    call.rows = reinterpret_cast<int16_t*>(rows);
    call.steps = reinterpret_cast<float*>(rows + codes);
    penstock_shorten(kernels, &call, threads);
    const int64_t across = (call.num_out + SHORTS_PANELS * GROUP - 1) / (SHORTS_PANELS * GROUP);
    const int64_t down = (call.num_rows + SHORTS_ROWS - 1) / SHORTS_ROWS;
    over_range(across * down, 1, threads, [&](int64_t begin, int64_t end) {
        thread_local Buffer scratch;
        char* memory = scratch.at_least(size_t(kernels->shorts_scratch()));
        for (int64_t i = begin; i < end; ++i)
            kernels->shorts(call, i % down * SHORTS_ROWS, i / down * SHORTS_PANELS, memory);
    });
}

EXPORT void penstock_draw(const Kernels* kernels, const DrawCall* call, int threads) {
    const int64_t sums = (call->width + DRAW_RUN - 1) / DRAW_RUN * int64_t(sizeof(double));
    const int64_t bytes = call->top_k ? std::max(sums, DRAW_CANDIDATE_BYTES * call->width) : sums;
    over_rows(call->num_rows, call->width, threads, [&](int64_t begin, int64_t end) {
        thread_local Buffer scratch;
        kernels->draw(*call, begin, end, scratch.at_least(size_t(bytes)));
    });
}

EXPORT void penstock_ban(const Kernels* kernels, const BanCall* call, int threads) {
    over_range(call->width, SERIAL_ELEMENTS, threads,
               [&](int64_t begin, int64_t end) { kernels->ban(*call, begin, end); });
}

// Runs recorded calls one after the other; see program.py.
EXPORT void penstock_program(const Kernels* kernels, const ProgramStep* steps, int64_t count, int threads) {
    for (int64_t i = 0; i < count; ++i) steps[i].entry(kernels, steps[i].call, threads);
}

// The same piece by piece, each to its end, until there are no more or somebody has put `halt` to something else than
// zero; returns how many were run.
EXPORT int64_t penstock_pieces(const Kernels* kernels, const ProgramStep* steps, const int64_t* counts, int64_t pieces,
                               const int32_t* halt, int threads) {
    for (int64_t i = 0; i < pieces; steps += counts[i++]) {
        if (i && __atomic_load_n(halt, __ATOMIC_ACQUIRE)) return i;
        penstock_program(kernels, steps, counts[i], threads);
    }
    return pieces;
}
