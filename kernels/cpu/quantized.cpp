// Linear layers with int4 and int8 weights, laid out as packing.py says.
//
// Bytes: activations are rounded to two signed bytes each on the way, the second for what the first leaves, in groups of
// 32 with a scale each (int4) or by one scale a row (int8), and multiplied as integers. Those sums are exact, and the
// float32 sums over the groups go in order, so a row's result depends on that row alone, and is the same in every
// instruction set, in vectors and in tiles.
// bfloat16 (int4): activations keep their bits, or are rounded to bfloat16, and weights are multiplied as the whole
// numbers that they are (pairs) or put together again (tiles). Results are others, though still of that row alone.

#include "quantized.h"
#include "quantized_pairs.h"
#include "quantized_tiles.h"

namespace {

constexpr int WHOLE_ROWS = 2;  // up to which a whole panel is one piece of work
#ifdef __AVX512F__
constexpr int MOST_ROWS = 4;
#else
constexpr int MOST_ROWS = 2;
#endif

template <int ROWS, int SIXTEENS, bool FETCH>
void int4_tile(const Call& c, const Activations& a, int64_t strip, int64_t first) {
    int64_t groups = c.groups();
    int sixteen = int(strip % 2) * 2;
    const uint8_t* block = c.weight + strip / 2 * groups * BLOCK;
    int64_t rest = a.rest * a.stride;
    const int8_t* x[ROWS];
    const float *scales[ROWS], *sums[ROWS];
    V16 total[ROWS][SIXTEENS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        x[r] = a.quants + (first + r) * a.stride;
        scales[r] = a.scales + (first + r) * groups;
        sums[r] = a.sums + (first + r) * groups;
#pragma GCC unroll 4
        for (int s = 0; s < SIXTEENS; ++s) total[r][s] = zeros();
    }
    for (int64_t g = 0; g < groups; ++g, block += BLOCK) {
        const uint8_t* quants = block + sixteen * (BLOCK_QUANTS / 4);
        const uint8_t* steps = block + BLOCK_QUANTS + sixteen * 2 * LANES;
        if constexpr (FETCH) {
#pragma GCC unroll 8
            for (int i = 0; i < SIXTEENS * BLOCK_QUANTS / 4; i += 64)
                _mm_prefetch((const char*)quants + AHEAD + i, _MM_HINT_T0);
            _mm_prefetch((const char*)steps + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char*)steps + AHEAD + 2 * PANEL, _MM_HINT_T0);
        }
        W16 products[ROWS][SIXTEENS], seconds[ROWS][SIXTEENS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int s = 0; s < SIXTEENS; ++s) products[r][s] = seconds[r][s] = no_words();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
            for (int s = 0; s < SIXTEENS; ++s) {
                W16 both = load_words(quants + s * (BLOCK_QUANTS / 4) + i * 64);
                W16 low = low_halves(both), high = high_halves(both);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    const int8_t* at = x[r] + g * GROUP + 4 * i;
                    products[r][s] = add_products_7bit(products[r][s], low, broadcast_word(at));
                    products[r][s] = add_products_7bit(products[r][s], high, broadcast_word(at + GROUP / 2));
                    seconds[r][s] = add_products_7bit(seconds[r][s], low, broadcast_word(at + rest));
                    seconds[r][s] = add_products_7bit(seconds[r][s], high, broadcast_word(at + rest + GROUP / 2));
                }
            }
#pragma GCC unroll 4
        for (int s = 0; s < SIXTEENS; ++s) {
            V16 scale = load_halves(steps + s * 2 * LANES), minimum = load_halves(steps + 2 * PANEL + s * 2 * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                V16 values = to_floats(in_steps(products[r][s], seconds[r][s])) * scale;
                total[r][s] = fma(values, broadcast(scales[r][g]), total[r][s]);
                total[r][s] = fma(minimum, broadcast(sums[r][g]), total[r][s]);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < SIXTEENS; ++s) finish(c, first + r, strip * STRIP + s * LANES, total[r][s]);
}

void int4_by_vectors(const Call& c) {
    Activations a(c.rows, c.inputs, c.groups(), false);
    quantize(c, a, c.rows);
    for_strips(c, [&](int64_t strip, int64_t end, int) {
        while (strip < end) {
            if (c.rows <= WHOLE_ROWS && strip % 2 == 0 && strip + 1 < end) {
                c.rows == 1 ? int4_tile<1, 2 * SIXTEENS, true>(c, a, strip, 0)
                            : int4_tile<2, 2 * SIXTEENS, true>(c, a, strip, 0);
                strip += 2;
                continue;
            }
            for_row_tiles<MOST_ROWS>(c.rows, [&]<int ROWS>(int64_t first) {
                first ? int4_tile<ROWS, SIXTEENS, false>(c, a, strip, first)
                      : int4_tile<ROWS, SIXTEENS, true>(c, a, strip, first);
            });
            ++strip;
        }
    });
}

template <int ROWS>
void int8_tile(const Call& c, const Activations& a, int64_t strip, int64_t first) {
    const uint8_t* weight = int8_strip(c, strip);
    const int8_t* x[2 * ROWS];  // first bytes, then second ones
    W16 products[2 * ROWS][SIXTEENS];
#pragma GCC unroll 16
    for (int r = 0; r < 2 * ROWS; ++r) {
        x[r] = a.quants + (r < ROWS ? first + r : a.rest + first + r - ROWS) * a.stride;
#pragma GCC unroll 4
        for (int s = 0; s < SIXTEENS; ++s) products[r][s] = no_words();
    }
    int64_t inputs = c.padded_inputs();
    for (int64_t k = 0; k < inputs; k += 4, weight += 4 * PANEL) {
        W16 words[SIXTEENS];
#pragma GCC unroll 4
        for (int s = 0; s < SIXTEENS; ++s) {
            words[s] = load_words(weight + s * 4 * LANES);
            _mm_prefetch((const char*)weight + 16 * 4 * PANEL + s * 4 * LANES, _MM_HINT_T0);
        }
#pragma GCC unroll 16
        for (int r = 0; r < 2 * ROWS; ++r) {
            W16 values = broadcast_word(x[r] + k);
#pragma GCC unroll 4
            for (int s = 0; s < SIXTEENS; ++s) products[r][s] = add_products(products[r][s], words[s], values);
        }
    }
    const float* scales = int8_scales(c, strip);
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < SIXTEENS; ++s) {
            V16 result = int8_result(a, first + r, products[r][s], products[ROWS + r][s], scales + s * LANES);
            finish(c, first + r, strip * STRIP + s * LANES, result);
        }
}

void int8_by_vectors(const Call& c) {
    Activations a(c.rows, c.padded_inputs(), 1, false);
    quantize(c, a, c.rows);
    for_strips(c, [&](int64_t strip, int64_t end, int) {
        for (; strip < end; ++strip)
            for_row_tiles<MOST_ROWS>(c.rows, [&]<int ROWS>(int64_t first) { int8_tile<ROWS>(c, a, strip, first); });
    });
}

struct EmbeddingCall {
    const int64_t* ids;
    const uint8_t* weight;
    void* out;
    int64_t count, vocabulary, inputs, bits, narrow;
};

INLINE float half_to_float(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return _cvtsh_ss(bits);
}

// A row of the weight in float32.
void widen_row(const EmbeddingCall& c, int64_t id, float* to) {
    int64_t panel = id / PANEL, output = id % PANEL;
    if (c.bits == 8) {
        int64_t inputs = (c.inputs + BYTE_MULTIPLE - 1) / BYTE_MULTIPLE * BYTE_MULTIPLE;
        const uint8_t* weight = c.weight + panel * (inputs + 4) * PANEL;
        float scale = ((const float*)(weight + inputs * PANEL))[output];
        for (int64_t k = 0; k < c.inputs; ++k)
            to[k] = float(weight[k / 4 * 4 * PANEL + output * 4 + k % 4] - 128) * scale;
        return;
    }
    for (int64_t g = 0; g < c.inputs / GROUP; ++g, to += GROUP) {
        const uint8_t* block = c.weight + (panel * (c.inputs / GROUP) + g) * BLOCK;
        const uint8_t* quants = block + output / LANES * (BLOCK_QUANTS / 4) + output % LANES * 4;
        float scale = half_to_float(block + BLOCK_QUANTS + 2 * output);
        float minimum = half_to_float(block + BLOCK_QUANTS + 2 * (PANEL + output));
        for (int i = 0; i < GROUP / 2; ++i) {
            uint8_t both = quants[i / 4 * 64 + i % 4];
            to[i] = float(both & 15) * scale + minimum;
            to[i + GROUP / 2] = float(both >> 4) * scale + minimum;
        }
    }
}

}  // namespace

EXPORT int linear_quantized(const QuantizedCall* call) try {
    const Call c{*call};
    if (c.rows == 0) return 0;
#ifdef __AMX_TILE__
    if ((c.way == BYTE_TILES || c.way == BFLOAT16_TILES) && amx_granted()) {
        c.bits == 8 ? int8_by_tiles(c) : c.way == BYTE_TILES ? int4_by_tiles(c) : int4_by_bfloat16(c);
        return 0;
    }
#endif
#ifdef __AVX512BF16__
    if ((c.way == BFLOAT16_TILES || c.way == PAIRS) && c.bits == 4) {
        int4_by_pairs(c);
        return 0;
    }
#endif
    c.bits == 4 ? int4_by_vectors(c) : int8_by_vectors(c);
    return 0;
} catch (const std::bad_alloc&) {
    return -1;
}

// Returns 0, -1 without memory, or -2 if an id is not in the vocabulary.
EXPORT int embedding_quantized(const EmbeddingCall* call) try {
    const EmbeddingCall& c = *call;
    for (int64_t i = 0; i < c.count; ++i)
        if (c.ids[i] < 0 || c.ids[i] >= c.vocabulary) return -2;
    float* row = scratch(0).take<float>(padded(c.inputs));
    for (int64_t i = 0; i < c.count; ++i) {
        widen_row(c, c.ids[i], row);
        for (int64_t k = 0; k < c.inputs; k += LANES) {
            int part = int(std::min<int64_t>(LANES, c.inputs - k));
            if (c.narrow) store_part((bf16*)c.out + i * c.inputs + k, load(row + k), part);
            else store_part((float*)c.out + i * c.inputs + k, load(row + k), part);
        }
    }
    return 0;
} catch (const std::bad_alloc&) {
    return -1;
}
