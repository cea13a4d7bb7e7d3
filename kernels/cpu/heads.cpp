// Products with a small matrix for each head, as latent attention has before and behind it.
//
// An output is summed in sixteen lanes over the input features, and the lanes in one fixed tree, so that rows of a plain
// weight are read as they lie, and the number of tokens changes no bit.

#include <algorithm>

#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t PIECES_A_THREAD = 4;     // so that threads end together
constexpr int64_t TOKENS_TOGETHER = 64;    // that use some rows of the weight while the first level of cache has them
constexpr int64_t ALONE_PRODUCTS = 1 << 16;  // for fewer, waking a thread costs more than it saves
#ifdef __AVX512F__
constexpr int TILE_TOKENS = 4, TILE_OUTPUTS = 4;
#else
constexpr int TILE_TOKENS = 2, TILE_OUTPUTS = 2;
#endif

struct HeadsCall {
    const void *x, *weight;           // weight: [heads, outputs, inputs]
    void* out;                        // [tokens, heads, outputs]
    int64_t x_stride, x_head_stride;  // elements from token to token, head to head
    int64_t tokens, heads, inputs, outputs, threads;
    int64_t narrow;  // all are bfloat16, else float32
};

INLINE void put(float* to, float value) { *to = value; }
INLINE void put(bf16* to, float value) { store_part(to, broadcast(value), 1); }

// TOKENS rows of x times OUTPUTS rows of a weight.
template <int TOKENS, int OUTPUTS, class T>
INLINE void tile(const HeadsCall& c, const T* x, const T* weight, T* out) {
    V16 sums[TOKENS][OUTPUTS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int n = 0; n < OUTPUTS; ++n) sums[t][n] = zeros();
    auto add = [&](auto take, int64_t k) {
        V16 rows[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) rows[t] = take(x + t * c.x_stride + k);
#pragma GCC unroll 8
        for (int n = 0; n < OUTPUTS; ++n) {
            V16 line = take(weight + n * c.inputs + k);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) sums[t][n] = fma(rows[t], line, sums[t][n]);
        }
    };
    int64_t k = 0;
    for (; k + LANES <= c.inputs; k += LANES) add([](const T* p) { return load(p); }, k);
    int left = int(c.inputs - k);
    if (left) add([left](const T* p) { return load_part(p, left); }, k);
    for (int t = 0; t < TOKENS; ++t)
        for (int n = 0; n < OUTPUTS; ++n) put(out + t * c.heads * c.outputs + n, sum(sums[t][n]));
}

template <int TOKENS, class T>
void tokens(const HeadsCall& c, const T* x, const T* weight, int64_t outputs, T* out) {
    constexpr int MOST = TOKENS == 1 ? 2 * TILE_OUTPUTS : TILE_OUTPUTS;
    int64_t n = 0;
    for (; n + MOST <= outputs; n += MOST) tile<TOKENS, MOST>(c, x, weight + n * c.inputs, out + n);
    for (; n < outputs; ++n) tile<TOKENS, 1>(c, x, weight + n * c.inputs, out + n);
}

template <class T>
void multiply(const HeadsCall& c) {
    int64_t piece = c.outputs;  // outputs of a head
    while (piece > 16 && c.heads * ((c.outputs + piece - 1) / piece) < PIECES_A_THREAD * c.threads) piece = (piece + 1) / 2;
    int64_t parts = (c.outputs + piece - 1) / piece;
    int64_t chunks = (c.tokens + TOKENS_TOGETHER - 1) / TOKENS_TOGETHER;
    bool alone = c.tokens * c.heads * c.outputs * c.inputs < ALONE_PRODUCTS;
    parallel(c.heads * parts * chunks, alone ? 1 : int(c.threads), [&](int64_t i, int) {
        int64_t head = i / chunks / parts, first = i / chunks % parts * piece, end = std::min(first + piece, c.outputs);
        int64_t token = i % chunks * TOKENS_TOGETHER, last = std::min(token + TOKENS_TOGETHER, c.tokens);
        const T* weight = (const T*)c.weight + (head * c.outputs + first) * c.inputs;
        const T* x = (const T*)c.x + token * c.x_stride + head * c.x_head_stride;
        T* out = (T*)c.out + (token * c.heads + head) * c.outputs + first;
        auto step = [&](int count) {
            token += count;
            x += count * c.x_stride;
            out += count * c.heads * c.outputs;
        };
        for (; token + TILE_TOKENS <= last; step(TILE_TOKENS)) tokens<TILE_TOKENS>(c, x, weight, end - first, out);
        for (; token < last; step(1)) tokens<1>(c, x, weight, end - first, out);
    });
}

}  // namespace

EXPORT int linear_heads(const HeadsCall* call) {
    call->narrow ? multiply<bf16>(*call) : multiply<float>(*call);
    return 0;
}
