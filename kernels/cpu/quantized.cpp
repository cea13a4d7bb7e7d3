// Linear layers with int4 and int8 weights, laid out as packing.py says.
//
// Bytes: activations are rounded to two signed bytes each on the way, the second for what the first leaves, in groups of
// 32 with a scale each, and multiplied as integers. Those sums are exact, and the float32 sums over the groups go in
// order, so a row's result depends on that row alone, and is the same in every instruction set, in vectors and in tiles.
// bfloat16: activations keep their bits, or are rounded to bfloat16, and weights are multiplied as the whole numbers that
// they are (int4 in pairs) or put together again (in tiles). One byte an activation is the fastest for many rows where
// there are no tiles. Results of these are others, though still of that row alone.

#include "quantized.h"
#include "quantized_pairs.h"
#include "quantized_tiles.h"

namespace {

#ifdef __AVX512F__
constexpr int BYTE_REGISTERS = 12;  // rows times vectors of outputs in a tile
#else
constexpr int BYTE_REGISTERS = 2;
#endif

// Activations in one byte or two, in tiles of BYTE_REGISTERS rows and one of what is left; of a tile, group by group the
// words [rows][first bytes, second bytes][8], scales [rows] and sums [rows].
template <int BYTES>
struct ByteRows {
    static constexpr int WORDS = BYTES * GROUP_WORDS;

    int32_t* words;
    float* steps;
    int64_t groups;

    explicit ByteRows(const Call& c) : groups(c.groups()) {
        size_t count = c.rows * groups * WORDS;
        words = scratch(0).take<int32_t>(count + c.rows * groups * 2);
        steps = (float*)(words + count);
    }
    void put(const Call& c, int64_t row) const {
        int64_t first = row / BYTE_REGISTERS * BYTE_REGISTERS, rows = std::min<int64_t>(BYTE_REGISTERS, c.rows - first);
        int32_t* to = words_from(first) + (row - first) * WORDS;
        float* steps_to = steps_from(first) + row - first;
        for (int64_t g = 0; g < groups; ++g, to += rows * WORDS, steps_to += 2 * rows) {
            Rounded<BYTES> group = round_group<BYTES>(c, row, g);
            std::memcpy(to, group.bytes, BYTES * GROUP);
            steps_to[0] = group.scale;
            steps_to[rows] = group.sum;
        }
    }
    int32_t* words_from(int64_t first) const { return words + first * groups * WORDS; }
    float* steps_from(int64_t first) const { return steps + first * groups * 2; }
};

template <int BITS>
INLINE W16 add(W16 sums, W16 weights, int32_t x) {
    return BITS == 4 ? add_products_7bit(sums, weights, broadcast_word(x)) : add_products(sums, weights, broadcast_word(x));
}

// ROWS rows times VECTORS sixteens of outputs, the first of which is `sixteen` of a panel.
template <int BITS, int BYTES, int ROWS, int VECTORS>
void byte_tile(const Call& c, const ByteRows<BYTES>& x, int64_t panel, int sixteen, int64_t first) {
    const int32_t* words = x.words_from(first);
    const float* steps = x.steps_from(first);
    V16 total[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int s = 0; s < VECTORS; ++s) total[r][s] = zeros();
    Block<BITS> block(c, panel, 0);
    for (int64_t g = 0; g < x.groups; ++g, block.at += block.BYTES, words += x.WORDS * ROWS, steps += 2 * ROWS) {
        block.template fetch_ahead<VECTORS>(sixteen);
#pragma GCC unroll 4
        for (int s = 0; s < VECTORS; ++s) {
            W16 weights[GROUP_WORDS], sums[ROWS];
            block.words(sixteen + s, weights);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) sums[r] = no_words();
            // First bytes, times the steps of the second in one of theirs if there are second ones, and these.
#pragma GCC unroll 2
            for (int part = 0; part < BYTES; ++part) {
#pragma GCC unroll 16
                for (int i = 0; i < GROUP_WORDS; ++i)
#pragma GCC unroll 16
                    for (int r = 0; r < ROWS; ++r)
                        sums[r] = add<BITS>(sums[r], weights[i], words[r * x.WORDS + part * GROUP_WORDS + i]);
                if (part + 1 < BYTES)
#pragma GCC unroll 16
                    for (int r = 0; r < ROWS; ++r) sums[r] = shift_left<REST_BITS>(sums[r]);
            }
            V16 scale = block.scale(sixteen + s), minimum = block.minimum(sixteen + s, scale);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                total[r][s] = fma(to_floats(sums[r]) * scale, broadcast(steps[r]), total[r][s]);
                total[r][s] = fma(minimum, broadcast(steps[ROWS + r]), total[r][s]);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < VECTORS; ++s) finish(c, first + r, panel * PANEL + (sixteen + s) * LANES, total[r][s]);
}

template <int BITS, int BYTES>
void by_vectors(const Call& c) {
    ByteRows<BYTES> x(c);
    for_rows(c, c.rows, [&](int64_t row) { x.put(c, row); });
    for_strips(c, [&](int64_t strip, int64_t end, int) {
        while (strip < end) {
            bool whole = strip % 2 == 0 && strip + 1 < end;
            int first = int(strip % 2) * SIXTEENS, count = whole ? 2 * SIXTEENS : SIXTEENS;
            for_row_tiles<BYTE_REGISTERS>(c.rows, [&]<int ROWS>(int64_t row) {
                constexpr int VECTORS = ROWS * 4 <= BYTE_REGISTERS ? 4 : ROWS * 2 <= BYTE_REGISTERS ? 2 : 1;
                if (VECTORS > count)
                    byte_tile<BITS, BYTES, ROWS, std::min(VECTORS, SIXTEENS)>(c, x, strip / 2, first, row);
                else
                    for (int s = 0; s < count; s += VECTORS)
                        byte_tile<BITS, BYTES, ROWS, VECTORS>(c, x, strip / 2, first + s, row);
            });
            strip += whole ? 2 : 1;
        }
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
    if (c.way == COPY) {
        linear_by_copy(c);
        return 0;
    }
#ifdef __AMX_TILE__
    if ((c.way == BYTE_TILES || c.way == BFLOAT16_TILES) && amx_granted()) {
        c.bits == 8 ? by_tiles<8>(c) : by_tiles<4>(c);
        return 0;
    }
#endif
#ifdef __AVX512BF16__
    if ((c.way == BFLOAT16_TILES || c.way == PAIRS) && c.bits == 4) {
        int4_by_pairs(c);
        return 0;
    }
#endif
    if (c.way == ONE_BYTE) c.bits == 8 ? by_vectors<8, 1>(c) : by_vectors<4, 1>(c);
    else c.bits == 8 ? by_vectors<8, 2>(c) : by_vectors<4, 2>(c);
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
