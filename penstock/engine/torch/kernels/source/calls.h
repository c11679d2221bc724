// What Python hands over: plain structs of pointers and sizes. library.py mirrors them field by field, in this order.
//
// Strides count elements. Tokens are rows; the last dimension (and heads by head_dim) is contiguous.
// Element types are float or bfloat16 (its 16 bits in a uint16_t), the same for all tensors of one call.
#pragma once
#include <cstdint>

// The cache of one layer holds blocks; a block holds, for each key/value head, groups of 16 tokens.
// With P = 1 (float) or 2 (bfloat16), D = head_dim:
//   a key group   [D / P][16][P]    vectors run over tokens, so that a score needs no sum across lanes
//   a value group [16 / P][D][P]    vectors run over dimensions, so that an output needs none either
// The pairs (P = 2) are what a bfloat16 dot-product instruction wants; without one, a shift and a mask split them.
// Eight bits: P = 1, and behind a head's groups a scale for each token: float[block_size].
// Latents: one vector a token and no value; a head's part of a block is [block_size][D], then the scales if any.
constexpr int GROUP = 16;
constexpr int LARGEST_DIM = 1024;  // of a head

// The most a tile of a linear layer has: rows and panels.
constexpr int LINEAR_ROWS = 128, LINEAR_PANELS = 16;

struct AttentionCall {
    const void *query, *key, *value;
    void* out;
    float* lse;  // null when not wanted
    void *key_cache, *value_cache;
    const int32_t *query_start, *context, *block_table;
    const int64_t* slots;
    int64_t query_stride, key_stride, value_stride, table_stride;
    int32_t num_chunks, num_tokens, num_heads, num_kv_heads, head_dim, block_size;
    int32_t causal;
    int32_t window;  // keys a query sees at most, itself included; INT32_MAX sees all
    float scale;
    float cap;  // scores are squeezed into (-cap, cap); infinity leaves them alone
    int32_t bf16;        // what the tensors are, and the cache unless
    int32_t eight_bits;  // it holds whole numbers and scales
    int32_t is_latent;
    int32_t value_dim;   // head_dim; of latents, how many numbers of a vector are its value: a multiple of 16
};

// One unit of attention work: some queries of one chunk, all query heads of some neighbouring key/value heads, a range
// of keys. Of more than one key/value head there is one query, and no partial result.
constexpr int MOST_ABREAST = 16;
struct Item {
    int32_t chunk, kv_head, num_kv_heads;
    int32_t first_query, num_queries;  // within the chunk
    int32_t key_begin, key_end;        // positions
    float* partial;                    // where an unmerged result goes; null: straight to `out`
};

struct NormCall {
    const void *x, *residual, *weight;  // residual null: plain norm
    void *out, *sum;
    int64_t num_rows, width, x_stride, residual_stride;
    float epsilon;
    int32_t bf16;
    int32_t wide;  // the weight is float whatever x is, and multiplies before anything is rounded
};

struct RopeCall {
    void *query, *key;
    const void *query_weight, *key_weight;  // null: no norm of heads
    const float* cos_sin;                   // [positions, rotary_dim]: cosines, then sines
    const int64_t* positions;
    int64_t query_stride, key_stride, num_tokens;
    int32_t num_heads, num_kv_heads, head_dim, rotary_dim;
    float epsilon;
    int32_t bf16;
    int32_t wide;  // of the weights, as in NormCall
};

struct GateCall {
    const void* gate_up;
    void* out;
    int64_t num_rows, width, stride;
    int32_t bf16;
    int32_t gelu;  // its tanh form; else SiLU
};

// out[rows[u]] += up[slots[u]]^T (down[slots[u]] x[rows[u]]) for each user u: what an adapter of low rank adds.
struct AdaptCall {
    const void* x;
    void* out;
    const float *down, *up;  // of the first slot: [rank][num_in], [rank][num_out]
    const int32_t *rows, *slots;
    int64_t num_users, num_in, num_out, rank, x_stride, out_stride, down_stride, up_stride;  // of slots, the last two
    int32_t bf16;
};

// out = x weight^T + bias, the weight packed in panels of 16 outputs: [num_out / 16][num_in / P][16][P].
struct LinearCall {
    const void *x, *weight, *bias;  // bias null: none
    void* out;
    int64_t num_rows, num_in, num_out, x_stride;
    int32_t bf16;
};

// A row's inputs of one group: x = step * byte, nearly; the sum of its bytes times shift_of (quantised.h).
struct RowGroup {
    float step;
    int32_t sum;
};

// out = x weight^T + bias, the weight in `bits` (quantised.h). Padded to whole groups of inputs and panels of outputs.
constexpr int QUANTISED_ROWS = 60, QUANTISED_PANELS = 16, QUANTISED_GAP = 64;
struct QuantisedCall {
    const void *x, *bias;    // bias null: none
    const uint8_t* codes;    // bytes.h
    const uint16_t* scales;  // float16 multiples of `unit`, [panels][groups][16]
    const uint8_t* zeros;    // the same shape; null: the middle code
    const int32_t* order;    // which of x an input is, [num_in]; null: as they are
    void* out;
    int8_t* bytes;  // the rows, quantised: [num_rows][num_groups * group + QUANTISED_GAP], and [num_rows][num_groups]
    RowGroup* groups;
    int64_t num_rows, num_in, num_out, x_stride, num_groups;
    float unit;
    int32_t bits, group;  // 32, 64 or 128 inputs
    int32_t bf16;
};

// out = x weight^T + bias, the weight in shorts (shorts.h), padded to whole panels: [panels][num_in / 2][16][2], and
// what they are to be multiplied with: bfloat16 [panels][groups][16].
constexpr int SHORTS_ROWS = 120, SHORTS_PANELS = 4;
struct ShortsCall {
    const void *x, *bias;  // bias null: none
    const int16_t* codes;
    const uint16_t* scales;
    void* out;
    int16_t* rows;  // x in shorts, num_rows * num_in, and [num_rows][num_in / group]
    float* steps;
    int64_t num_rows, num_in, num_out, x_stride;
    int32_t group;  // at most 128 inputs, a divisor of num_in, a multiple of 16
    int32_t bf16;
    int32_t is_plain;  // rows lie one behind the other
};

// ids = the likeliest entry of each row, or where `heat` is positive one drawn with `chance` in [0, 1), among all or
// within limits: top_k >= width, top_p >= 1 and min_p 0 are none.
constexpr int64_t DRAW_RUN = 128, DRAW_CANDIDATE_BYTES = 12;
struct DrawCall {
    const float *logits, *heat;  // heat null: no row is drawn
    const double* chance;
    const int64_t* top_k;  // null: no row has limits
    const float *top_p, *min_p;
    int64_t* ids;
    float* best;  // the greatest logit of each row; NaN when it holds one
    int64_t num_rows, width, stride;
};

// One call of a program: who takes it, and its struct. All entries that Python calls have this form.
struct Kernels;
struct ProgramStep {
    void (*entry)(const Kernels*, const void* call, int threads);
    const void* call;
};

// Minus infinity where a bit is 0; bit i of word i / 32 belongs to entry i.
struct BanCall {
    float* logits;
    const uint32_t* allowed;
    int64_t width;
};

// One table per instruction set, exported as penstock_<name>. Row and token ranges are [begin, end).
struct Kernels {
    void (*write)(const AttentionCall&, int64_t begin, int64_t end);
    int64_t (*scratch_bytes)(const AttentionCall&, int64_t rows);
    void (*attend)(const AttentionCall&, const Item&, char* scratch);
    void (*merge)(const AttentionCall&, const Item&, const float* const* partials, int count);
    void (*norm)(const NormCall&, int64_t begin, int64_t end);
    void (*rope)(const RopeCall&, int64_t begin, int64_t end);
    void (*gate)(const GateCall&, int64_t begin, int64_t end);
    void (*adapt)(const AdaptCall&, int64_t begin, int64_t end);  // users
    int64_t (*linear_scratch)();
    void (*linear)(const LinearCall&, int64_t row, int64_t panel, int panels, char* scratch);  // one tile
    void (*draw)(const DrawCall&, int64_t begin, int64_t end, char* scratch);  // a sum a run, or a candidate an entry
    void (*ban)(const BanCall&, int64_t begin, int64_t end);  // entries; begin a multiple of 32
    void (*quantise_rows)(const QuantisedCall&, int64_t begin, int64_t end);
    int64_t (*quantised_scratch)();
    void (*quantised)(const QuantisedCall&, int64_t row, int64_t panel, char* scratch);  // one tile
    void (*shorten_rows)(const ShortsCall&, int64_t begin, int64_t end);
    int64_t (*shorts_scratch)();
    void (*shorts)(const ShortsCall&, int64_t row, int64_t panel, char* scratch);  // one tile
};
