// int4 weights times activations in bfloat16, two products a lane and instruction, where there are no tiles for it.
//
// A weight's half byte is a whole number that bfloat16 holds, so products are exact, and the sum of a group is taken
// times the group's scale; its minimum is taken times the sum of the group's activations.
#pragma once

#include "quantized.h"

#ifdef __AVX512BF16__

namespace {

constexpr int PAIRS_OF_GROUP = GROUP / 2;
constexpr int PAIR_REGISTERS = 12;  // rows times vectors of outputs in a tile

// Rows in tiles of PAIR_REGISTERS and one of what is left; of a tile, group by group the words [16 pairs][rows], and
// the sums of a group [rows].
struct PairedRows {
    uint32_t* words;
    float* sums;
    int64_t groups;

    explicit PairedRows(const Call& c) : groups(c.groups()) {
        size_t count = (c.rows * groups * PAIRS_OF_GROUP + 15) & ~size_t(15);
        words = scratch(0).take<uint32_t>(count + c.rows * groups);
        sums = (float*)(words + count);
    }
    const uint32_t* words_from(int64_t first) const { return words + first * groups * PAIRS_OF_GROUP; }
    const float* sums_from(int64_t first) const { return sums + first * groups; }
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
void pair_row(const Call& c, const PairedRows& to, int64_t row, __m512i order) {
    int64_t first = row / PAIR_REGISTERS * PAIR_REGISTERS, rows = std::min<int64_t>(PAIR_REGISTERS, c.rows - first);
    uint32_t* words = to.words + first * to.groups * PAIRS_OF_GROUP + (row - first);
    float* sums = to.sums + first * to.groups + (row - first);
    const T* x = (const T*)c.x + row * c.x_stride;
    for (int64_t g = 0; g < to.groups; ++g, x += GROUP, sums += rows) {
        alignas(64) bf16 narrow[GROUP];
        store(narrow, load(x));
        store(narrow + LANES, load(x + LANES));
        *sums = sum(load(narrow) + load(narrow + LANES));
        alignas(64) uint32_t pairs[PAIRS_OF_GROUP];
        _mm512_store_si512(pairs, _mm512_permutexvar_epi16(order, _mm512_load_si512(narrow)));
        for (int i = 0; i < PAIRS_OF_GROUP; ++i, words += rows) *words = pairs[i];
    }
}

INLINE V16 add_pairs(V16 sums, __m512i a, uint32_t b) {
    return {_mm512_dpbf16_ps(sums.v, (__m512bh)a, (__m512bh)_mm512_set1_epi32(int(b)))};
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
    const uint32_t* words = x.words_from(first);
    const float* sums = x.sums_from(first);
    V16 total[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int s = 0; s < VECTORS; ++s) total[r][s] = zeros();
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
            const uint32_t* pairs = words + 4 * i * ROWS;
#pragma GCC unroll 4
            for (int s = 0; s < VECTORS; ++s) {
                __m512i both = load_words(block.quants(sixteen + s) + i * 64).v;
                __m512i weights[4] = {whole_numbers(both), whole_numbers(_mm512_srli_epi16(both, 4)),
                                      whole_numbers(_mm512_srli_epi16(both, 8)), whole_numbers(_mm512_srli_epi16(both, 12))};
#pragma GCC unroll 4
                for (int n = 0; n < 4; ++n)
#pragma GCC unroll 16
                    for (int r = 0; r < ROWS; ++r)
                        products[r][s] = add_pairs(products[r][s], weights[n], pairs[n * ROWS + r]);
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < VECTORS; ++s) {
            V16 scale = block.scale(sixteen + s), minimum = block.minimum(sixteen + s, scale);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
                total[r][s] = fma(minimum, broadcast(sums[r]), fma(products[r][s], scale, total[r][s]));
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < VECTORS; ++s) finish(c, first + r, panel * PANEL + (sixteen + s) * LANES, total[r][s]);
}

void int4_by_pairs(const Call& c) {
    PairedRows x(c);
    __m512i order = pair_order();
    for_rows(c, c.rows, [&](int64_t row) {
        c.narrow ? pair_row<bf16>(c, x, row, order) : pair_row<float>(c, x, row, order);
    });
    for_strips(c, [&](int64_t strip, int64_t end, int) {
        while (strip < end) {
            bool whole = strip % 2 == 0 && strip + 1 < end;
            int first = int(strip % 2) * SIXTEENS, sixteens = whole ? 2 * SIXTEENS : SIXTEENS;
            for_row_tiles<PAIR_REGISTERS>(c.rows, [&]<int ROWS>(int64_t row) {
                constexpr int VECTORS = ROWS <= 3 ? 4 : ROWS <= 6 ? 2 : 1;
                if (VECTORS > sixteens)
                    pair_tile<ROWS, std::min(VECTORS, SIXTEENS)>(c, x, strip / 2, first, row);
                else
                    for (int s = 0; s < sixteens; s += VECTORS)
                        pair_tile<ROWS, VECTORS>(c, x, strip / 2, first + s, row);
            });
            strip += whole ? 2 : 1;
        }
    });
}

}  // namespace

#endif
