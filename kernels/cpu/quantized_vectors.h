// int4 and int8 weights times activations in vectors, two products a lane and instruction.
//
// `Words`: activations are rounded to 16 bits, in groups of 32 with a scale each, and multiplied as integers. Sums of a
// group are exact, and those over groups go in order in float32, so a row's result depends on that row alone, and is the
// same in every instruction set.
// `Pairs`: activations are bfloat16. A half byte is a whole number that bfloat16 holds, so products are exact; they are
// summed in float32 in order. Also of that row alone.
// The sum of a group is taken times the weights' scale; their minimum is taken times the sum of the activations.
#pragma once

#include <array>

#include "quantized.h"

namespace {

constexpr int GROUP_PAIRS = GROUP / 2;  // of features
#ifdef __AVX512F__
constexpr int VECTOR_ROWS = 8;   // of a tile, at most
constexpr int TILE_SUMS = 16;    // rows times sixteens of outputs of a tile, at most
#else
constexpr int VECTOR_ROWS = 4;
constexpr int TILE_SUMS = 4;
#endif

// How pairs of features come out of the words of a block: a word holds four bytes of an output, and the bits of every
// second byte make a pair.
template <int BITS>
struct Pairing {
    static constexpr int LOADS = LANES * GROUP * BITS / 8 / 64, PAIRS = GROUP_PAIRS / LOADS;  // words, and pairs of each

    // The features of a group, pair by pair.
    static constexpr std::array<int16_t, GROUP> order() {
        std::array<int16_t, GROUP> features{};
        for (int i = 0; i < GROUP; ++i) {
            int load = i / 2 / PAIRS, pair = i / 2 % PAIRS, second = i % 2;
            features[i] = int16_t(BITS == 4 ? 4 * load + pair / 2 + 2 * second + pair % 2 * (GROUP / 2)
                                            : 4 * load + pair + 2 * second);
        }
        return features;
    }
    // Takes 32 half words, one a feature, in that order.
    INLINE static void reorder(const int16_t* from, int32_t* to) {
        alignas(64) static constexpr auto features = order();
#ifdef __AVX512F__
        __m512i halves = _mm512_permutexvar_epi16(_mm512_load_si512(features.data()), _mm512_loadu_si512(from));
        _mm512_storeu_si512(to, halves);
#else
        int16_t halves[GROUP];
        for (int i = 0; i < GROUP; ++i) halves[i] = from[features[i]];
        std::memcpy(to, halves, sizeof(halves));
#endif
    }
};

template <int BITS_>
struct Words : Pairing<BITS_> {
    static constexpr int BITS = BITS_, STEPS = 2;  // steps of a group: scale and sum
    using Sums = W16;

    INLINE static void put(const Call& c, int64_t row, int64_t group, int32_t* pairs, float (&steps)[STEPS]) {
        int16_t words[GROUP];
        Steps rounded = round_group(c, row, group, words);
        Pairing<BITS>::reorder(words, pairs);
        steps[0] = rounded.scale;
        steps[1] = rounded.sum;
    }
    INLINE static W16 weights(W16 words, int pair) { return low_bits<BITS>(words, BITS * pair); }
    INLINE static W16 none() { return no_words(); }
    INLINE static W16 add(W16 sums, W16 weights, int32_t pair) { return add_products(sums, weights, broadcast_word(pair)); }
    INLINE static V16 add_group(V16 total, W16 sums, V16 scale, V16 minimum, const float* steps, int rows) {
        total = fma(to_floats(sums) * scale, broadcast(steps[0]), total);
        return fma(minimum, broadcast(steps[rows]), total);
    }
};

#ifdef __AVX512BF16__

struct Pairs : Pairing<4> {
    static constexpr int BITS = 4, STEPS = 1;  // the sum of a group
    using Sums = V16;

    INLINE static void put(const Call& c, int64_t row, int64_t group, int32_t* pairs, float (&steps)[STEPS]) {
        int64_t at = row * c.x_stride + group * GROUP;
        c.narrow ? put((const bf16*)c.x + at, pairs, steps) : put((const float*)c.x + at, pairs, steps);
    }
    template <class T>
    INLINE static void put(const T* x, int32_t* pairs, float (&steps)[STEPS]) {
        alignas(64) bf16 narrow[GROUP];
        store(narrow, load(x));
        store(narrow + LANES, load(x + LANES));
        reorder((const int16_t*)narrow, pairs);
        steps[0] = sum(load(narrow) + load(narrow + LANES));
    }
    // The bfloat16 numbers of half bytes; of an index, five bits count, and the table holds each number twice.
    INLINE static W16 weights(W16 words, int pair) {
        alignas(64) uint16_t numbers[32];
        for (int i = 0; i < 32; ++i) {
            float number = float(i % 16);
            uint32_t bits;
            std::memcpy(&bits, &number, 4);
            numbers[i] = uint16_t(bits >> 16);
        }
        return {_mm512_permutexvar_epi16(_mm512_srli_epi16(words.v, 4 * pair), _mm512_load_si512(numbers))};
    }
    INLINE static V16 none() { return zeros(); }
    INLINE static V16 add(V16 sums, W16 weights, int32_t pair) {
        return {_mm512_dpbf16_ps(sums.v, (__m512bh)weights.v, (__m512bh)_mm512_set1_epi32(pair))};
    }
    INLINE static V16 add_group(V16 total, V16 sums, V16 scale, V16 minimum, const float* steps, int) {
        return fma(minimum, broadcast(steps[0]), fma(sums, scale, total));
    }
};

#endif

// Rows of x; of a tile, group by group the pairs [rows][16] and the steps [STEPS][rows].
template <class Kind>
struct VectorRows : RowTiles<VECTOR_ROWS> {
    int32_t* pairs;
    float* steps;
    int64_t groups;

    explicit VectorRows(const Call& c) : RowTiles(c.rows), groups(c.groups()) {
        pairs = scratch(0).take<int32_t>(rows * groups * (GROUP_PAIRS + Kind::STEPS));
        steps = (float*)(pairs + rows * groups * GROUP_PAIRS);
    }
    int32_t* pairs_from(int64_t row) const { return pairs + row * groups * GROUP_PAIRS; }
    float* steps_from(int64_t row) const { return steps + row * groups * Kind::STEPS; }
    void put(const Call& c, int64_t tile) const {
        int64_t from = first(tile), count = size(tile);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t g = 0; g < groups; ++g) {
                float of_group[Kind::STEPS];
                Kind::put(c, from + r, g, pairs_from(from) + (g * count + r) * GROUP_PAIRS, of_group);
                for (int i = 0; i < Kind::STEPS; ++i) steps_from(from)[(g * Kind::STEPS + i) * count + r] = of_group[i];
            }
    }
};

// ROWS rows times SIXTEENS_ sixteens of outputs, the first of which is `sixteen` of a panel.
template <class Kind, int ROWS, int SIXTEENS_>
void vector_tile(const Call& c, const VectorRows<Kind>& x, int64_t panel, int sixteen, int64_t first) {
    const int32_t* pairs = x.pairs_from(first);
    const float* steps = x.steps_from(first);
    alignas(64) float totals[ROWS][SIXTEENS_][LANES] = {};  // in memory: the sums of a group need the registers
    Block<Kind::BITS> block(c, panel, 0);
    for (int64_t g = 0; g < x.groups; ++g, block.at += block.BYTES, pairs += ROWS * GROUP_PAIRS, steps += ROWS * Kind::STEPS) {
        block.template fetch_ahead<SIXTEENS_>(sixteen);
        typename Kind::Sums sums[ROWS][SIXTEENS_];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int s = 0; s < SIXTEENS_; ++s) sums[r][s] = Kind::none();
#pragma GCC unroll 8
        for (int i = 0; i < Kind::LOADS; ++i) {
            W16 words[SIXTEENS_];
#pragma GCC unroll 4
            for (int s = 0; s < SIXTEENS_; ++s) words[s] = load_words(block.quants(sixteen + s) + i * 64);
#pragma GCC unroll 4
            for (int n = 0; n < Kind::PAIRS; ++n) {
                W16 weights[SIXTEENS_];
#pragma GCC unroll 4
                for (int s = 0; s < SIXTEENS_; ++s) weights[s] = Kind::weights(words[s], n);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                    for (int s = 0; s < SIXTEENS_; ++s)
                        sums[r][s] = Kind::add(sums[r][s], weights[s], pairs[r * GROUP_PAIRS + i * Kind::PAIRS + n]);
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < SIXTEENS_; ++s) {
            V16 scale = block.scale(sixteen + s), minimum = block.minimum(sixteen + s, scale);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                float* total = totals[r][s];
                store(total, Kind::add_group(load(total), sums[r][s], scale, minimum, steps + r, ROWS));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < SIXTEENS_; ++s)
            finish(c, first + r, panel * PANEL + (sixteen + s) * LANES, load(totals[r][s]));
}

template <class Kind>
void by_vectors(const Call& c) {
    VectorRows<Kind> x(c);
    for_rows(c, x.tiles, [&](int64_t tile) { x.put(c, tile); });
    for_strips(c, [&](int64_t strip, int64_t end, int) {
        while (strip < end) {
            bool whole = strip % 2 == 0 && strip + 1 < end;
            int sixteen = int(strip % 2) * SIXTEENS, count = whole ? 2 * SIXTEENS : SIXTEENS;
            for (int64_t tile = 0; tile < x.tiles; ++tile) {
                int64_t first = x.first(tile);
                x.of_size(tile, [&]<int ROWS>() {
                    constexpr int MOST = ROWS * 4 <= TILE_SUMS ? 4 : ROWS * 2 <= TILE_SUMS ? 2 : 1;
                    if (MOST > count)
                        vector_tile<Kind, ROWS, std::min(MOST, SIXTEENS)>(c, x, strip / 2, sixteen, first);
                    else
                        for (int s = 0; s < count; s += MOST)
                            vector_tile<Kind, ROWS, MOST>(c, x, strip / 2, sixteen + s, first);
                });
            }
            strip += whole ? 2 : 1;
        }
    });
}

}  // namespace
