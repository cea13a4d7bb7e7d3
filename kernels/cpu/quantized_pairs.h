// int4 weights times activations in bfloat16, two products a lane and instruction, where there are no tiles for it.
//
// A weight's half byte is a whole number that bfloat16 holds, so products are exact, and the sum of a group is taken
// times the group's scale; its minimum is taken times the sum of the group's activations.
#pragma once

#include "quantized.h"

#ifdef __AVX512BF16__

namespace {

constexpr int PAIRS_OF_GROUP = GROUP / 2;
constexpr int PAIR_ROWS = 8;        // of a tile, at most
constexpr int PAIR_REGISTERS = 12;  // sums of a tile that find room there beside those of a group

// Rows in tiles of one size, or some one larger than others; of a tile, group by group the words [rows][16 pairs], and the
// sums of a group [rows].
struct PairedRows {
    uint32_t* words;
    float* sums;
    int64_t rows, groups, tiles;

    explicit PairedRows(const Call& c) : rows(c.rows), groups(c.groups()), tiles((c.rows + PAIR_ROWS - 1) / PAIR_ROWS) {
        size_t count = (c.rows * groups * PAIRS_OF_GROUP + 15) & ~size_t(15);
        words = scratch(0).take<uint32_t>(count + c.rows * groups);
        sums = (float*)(words + count);
    }
    int64_t first(int64_t tile) const { return tile * rows / tiles; }
    const uint32_t* words_from(int64_t row) const { return words + row * groups * PAIRS_OF_GROUP; }
    const float* sums_from(int64_t row) const { return sums + row * groups; }
};

// The order of a group's activations, as pair_tile meets those of the weights: the features 4 i and 4 i + 2, the same of
// the group's other half, 4 i + 1 and 4 i + 3, and these of the other half, for i of 0 .. 3.
INLINE __m512i pair_order() {
    alignas(64) int16_t order[GROUP];
    for (int i = 0; i < 4; ++i)
        for (int n = 0; n < 4; ++n)
            for (int second = 0; second < 2; ++second)
                order[8 * i + 2 * n + second] = int16_t(4 * i + n / 2 + 2 * second + n % 2 * (GROUP / 2));
    return _mm512_load_si512(order);
}

template <class T>
void pair_rows(const Call& c, const PairedRows& to, int64_t tile, __m512i order) {
    int64_t first = to.first(tile), rows = to.first(tile + 1) - first;
    for (int64_t r = 0; r < rows; ++r) {
        uint32_t* words = to.words + first * to.groups * PAIRS_OF_GROUP + r * PAIRS_OF_GROUP;
        float* sums = to.sums + first * to.groups + r;
        const T* x = (const T*)c.x + (first + r) * c.x_stride;
        for (int64_t g = 0; g < to.groups; ++g, x += GROUP, sums += rows, words += rows * PAIRS_OF_GROUP) {
            alignas(64) bf16 narrow[GROUP];
            store(narrow, load(x));
            store(narrow + LANES, load(x + LANES));
            *sums = sum(load(narrow) + load(narrow + LANES));
            _mm512_storeu_si512(words, _mm512_permutexvar_epi16(order, _mm512_load_si512(narrow)));
        }
    }
}

INLINE V16 add_pairs(V16 sums, __m512i a, __m512i b) {
    return {_mm512_dpbf16_ps(sums.v, (__m512bh)a, (__m512bh)b)};
}

// The bfloat16 numbers of the low halves of a word's first and third byte; of an index, five bits count.
INLINE __m512i whole_numbers(__m512i words) {
    alignas(64) uint16_t numbers[32];
    for (int i = 0; i < 32; ++i) {
        float number = float(i % 16);
        uint32_t bits;
        std::memcpy(&bits, &number, 4);
        numbers[i] = uint16_t(bits >> 16);
    }
    return _mm512_permutexvar_epi16(words, _mm512_load_si512(numbers));
}

// ROWS rows times VECTORS sixteens of outputs, the first of which is `sixteen` of a panel.
template <int ROWS, int VECTORS>
void pair_tile(const Call& c, const PairedRows& x, int64_t panel, int sixteen, int64_t first) {
    constexpr bool REGISTERS = ROWS * VECTORS <= PAIR_REGISTERS;
    const uint32_t* words = x.words_from(first);
    const float* sums = x.sums_from(first);
    alignas(64) float memory[REGISTERS ? 1 : ROWS * VECTORS][LANES] = {};
    V16 totals[REGISTERS ? ROWS : 1][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < (REGISTERS ? ROWS : 1); ++r)
#pragma GCC unroll 4
        for (int s = 0; s < VECTORS; ++s) totals[r][s] = zeros();
    Block<4> block(c, panel, 0);
    for (int64_t g = 0; g < x.groups; ++g, block.at += block.BYTES, words += ROWS * PAIRS_OF_GROUP, sums += ROWS) {
        block.fetch_ahead<VECTORS>(sixteen);
        V16 products[ROWS][VECTORS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int s = 0; s < VECTORS; ++s) products[r][s] = zeros();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            __m512i both[VECTORS];
#pragma GCC unroll 4
            for (int s = 0; s < VECTORS; ++s) both[s] = load_words(block.quants(sixteen + s) + i * 64).v;
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) {
                __m512i weights[VECTORS];
#pragma GCC unroll 4
                for (int s = 0; s < VECTORS; ++s) weights[s] = whole_numbers(_mm512_srli_epi16(both[s], 4 * n));
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    __m512i pair = _mm512_set1_epi32(int(words[r * PAIRS_OF_GROUP + 4 * i + n]));
#pragma GCC unroll 4
                    for (int s = 0; s < VECTORS; ++s) products[r][s] = add_pairs(products[r][s], weights[s], pair);
                }
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < VECTORS; ++s) {
            V16 scale = block.scale(sixteen + s), minimum = block.minimum(sixteen + s, scale);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                auto add = [&](V16 total) { return fma(minimum, broadcast(sums[r]), fma(products[r][s], scale, total)); };
                if constexpr (REGISTERS) totals[r][s] = add(totals[r][s]);
                else store(memory[r * VECTORS + s], add(load(memory[r * VECTORS + s])));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < VECTORS; ++s) {
            V16 total;
            if constexpr (REGISTERS) total = totals[r][s];
            else total = load(memory[r * VECTORS + s]);
            finish(c, first + r, panel * PANEL + (sixteen + s) * LANES, total);
        }
}

void int4_by_pairs(const Call& c) {
    PairedRows x(c);
    __m512i order = pair_order();
    parallel(x.tiles, c.rows * c.inputs < SERIAL_ELEMENTS ? 1 : int(c.threads), [&](int64_t tile, int) {
        c.narrow ? pair_rows<bf16>(c, x, tile, order) : pair_rows<float>(c, x, tile, order);
    });
    for_strips(c, [&](int64_t strip, int64_t end, int) {
        while (strip < end) {
            bool whole = strip % 2 == 0 && strip + 1 < end;
            int sixteen = int(strip % 2) * SIXTEENS, sixteens = whole ? 2 * SIXTEENS : SIXTEENS;
            for (int64_t tile = 0; tile < x.tiles; ++tile) {
                int64_t first = x.first(tile);
                for_rows_of_tile<PAIR_ROWS>(x.first(tile + 1) - first, [&]<int ROWS>() {
                    constexpr int VECTORS = ROWS <= 4 ? 4 : 2;
                    if (VECTORS > sixteens)
                        pair_tile<ROWS, SIXTEENS>(c, x, strip / 2, sixteen, first);
                    else
                        for (int s = 0; s < sixteens; s += VECTORS)
                            pair_tile<ROWS, VECTORS>(c, x, strip / 2, sixteen + s, first);
                });
            }
            strip += whole ? 2 : 1;
        }
    });
}

}  // namespace

#endif
