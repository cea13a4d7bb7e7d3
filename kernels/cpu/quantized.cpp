// Linear layers with int4 and int8 weights, laid out as packing.py says.
//
// Activations keep at least what bfloat16 has of them, in every way; which way a layer takes says paths.py.

#include "quantized_tiles.h"
#include "quantized_vectors.h"

namespace {

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
    int64_t panel = id / PANEL, groups = (c.inputs + GROUP - 1) / GROUP;
    int output = int(id % PANEL), sixteen = output / LANES, lane = output % LANES;
    auto widen = [&]<int BITS>(Block<BITS> block) {
        for (int64_t g = 0; g < groups; ++g, to += GROUP, block.at += block.BYTES) {
            const uint8_t* quants = block.quants(sixteen) + 4 * lane;
            float scale = half_to_float(block.steps(sixteen) + 2 * lane);
            float minimum = BITS == 4 ? half_to_float(block.steps(sixteen) + 2 * (PANEL + lane)) : 0;
            for (int i = 0; i < GROUP * BITS / 8; ++i) {
                uint8_t byte = quants[i / 4 * 64 + i % 4];
                if (BITS == 8) {
                    to[i] = float(byte - 128) * scale;
                } else {
                    to[i] = float(byte & 15) * scale + minimum;
                    to[i + GROUP / 2] = float(byte >> 4) * scale + minimum;
                }
            }
        }
    };
    Call of_panel{};
    of_panel.weight = c.weight;
    of_panel.inputs = c.inputs;
    c.bits == 8 ? widen(Block<8>(of_panel, panel, 0)) : widen(Block<4>(of_panel, panel, 0));
}

}  // namespace

EXPORT int linear_quantized(const QuantizedCall* call) try {
    const Call c{*call};
    if (c.rows == 0) return 0;
#ifdef __AMX_TILE__
    if ((c.way == BYTE_TILES || c.way == BFLOAT16_TILES) && amx_granted()) {
        c.bits == 8 ? by_tiles<8>(c) : by_tiles<4>(c);
        return 0;
    }
#endif
#ifdef __AVX512BF16__
    if ((c.way == BFLOAT16_TILES || c.way == PAIRS) && c.bits == 4) {
        by_vectors<Pairs>(c);
        return 0;
    }
#endif
    c.bits == 8 ? by_vectors<Words<8>>(c) : by_vectors<Words<4>>(c);
    return 0;
} catch (const std::bad_alloc&) {
    return -1;
}

// Returns 0, -1 without memory, or -2 if an id is not in the vocabulary.
EXPORT int embedding_quantized(const EmbeddingCall* call) try {
    const EmbeddingCall& c = *call;
    for (int64_t i = 0; i < c.count; ++i)
        if (c.ids[i] < 0 || c.ids[i] >= c.vocabulary) return -2;
    float* row = scratch(0).take<float>((c.inputs + GROUP - 1) / GROUP * GROUP);
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
