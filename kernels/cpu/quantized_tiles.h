// int4 and int8 weights in matrix instructions: of bytes, with the bits of the vectors, and of bfloat16.
#pragma once

#include "amx.h"
#include "quantized.h"

#ifdef __AMX_TILE__

namespace {

constexpr int TILE_BYTES = 64;          // of a row of a tile
constexpr int GROUP_WORDS = GROUP / 4;  // of four features
constexpr int SQUARE = 2 * AMX_ROWS;    // rows of x that are multiplied at a time

// A byte for each of four features in a word for each of sixteen outputs, for the words of features of a block.
template <int BITS>
INLINE void take_words(const Block<BITS>& block, int sixteen, W16 (&to)[GROUP_WORDS]) {
    const uint8_t* from = block.quants(sixteen);
    constexpr int LOADS = GROUP_WORDS * BITS / 8;
#pragma GCC unroll 8
    for (int i = 0; i < LOADS; ++i) {
        W16 words = load_words(from + i * 64);
        if constexpr (BITS == 4) {
            __m512i half = _mm512_set1_epi8(15);
            to[i] = {_mm512_and_si512(words.v, half)};
            to[LOADS + i] = {_mm512_and_si512(_mm512_srli_epi16(words.v, 4), half)};
        } else {
            to[i] = words;
        }
    }
}

// sums[32][32] = 32 (or 16) rows of x times a strip of a weight whose lines, of 4 bytes an output, are `line` apart.
template <bool BOTH>
INLINE void multiply(const char* x, int64_t stride, const char* weight, int64_t line, int64_t tiles, void* sums) {
    written();
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (BOTH) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < tiles; ++k, x += TILE_BYTES, weight += 16 * line) {
        _tile_loadd(4, x, stride);
        _tile_loadd(6, weight, line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weight + TILE_BYTES, line);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (BOTH) {
            _tile_loadd(5, x + AMX_ROWS * stride, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    constexpr int64_t STRIDE = STRIP * 4;
    _tile_stored(0, sums, STRIDE);
    _tile_stored(1, (char*)sums + TILE_BYTES, STRIDE);
    if constexpr (BOTH) {
        _tile_stored(2, (char*)sums + AMX_ROWS * STRIDE, STRIDE);
        _tile_stored(3, (char*)sums + AMX_ROWS * STRIDE + TILE_BYTES, STRIDE);
    }
}

// Calls f(row, sums of a row) for all rows of x times a strip. Needs configured tiles.
template <class F>
INLINE void for_products(const Call& c, const char* x, int64_t stride, const char* weight, int64_t line, int64_t tiles,
                         F f) {
    alignas(64) int32_t sums[SQUARE * STRIP];
    for (int64_t row = 0; row < c.rows; row += SQUARE) {
        int64_t rows = std::min<int64_t>(SQUARE, c.rows - row);
        rows > AMX_ROWS ? multiply<true>(x + row * stride, stride, weight, line, tiles, sums)
                        : multiply<false>(x + row * stride, stride, weight, line, tiles, sums);
        for (int64_t i = 0; i < rows; ++i) f(row + i, sums + i * STRIP);
    }
}

// Rows in whole tiles; 64 bytes more between them keep them off the same cache sets.
inline int64_t tile_rows(const Call& c) { return (c.rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS; }

constexpr int SIXTEEN_BYTES = GROUP * LANES;  // of sixteen outputs of a group, a byte each
constexpr int GROUPS_TOGETHER = 4;

// Rows of x in bytes, first ones and then second ones; scales and sums of a group lie side by side.
struct TileRows {
    int8_t* quants;
    float *scales, *sums;
    int64_t rows, stride;  // stride: bytes from row to row

    explicit TileRows(const Call& c) : rows(tile_rows(c)), stride(c.groups() * GROUP + GROUP) {
        size_t bytes = (2 * rows * stride + 63) & ~size_t(63);
        quants = scratch(0).take<int8_t>(bytes + 2 * sizeof(float) * rows * c.groups());
        scales = (float*)(quants + bytes);
        sums = scales + rows * c.groups();
    }
    int8_t* from(int64_t row, int64_t group, int part) const { return quants + (part * rows + row) * stride + group * GROUP; }
    void put(const Call& c, int64_t row) const {
        for (int64_t g = 0; g < c.groups(); ++g) {
            int16_t words[GROUP];
            Steps steps = round_group(c, row, g, words);  // rows behind the last fill a tile
            int8_t *first = from(row, g, 0), *second = from(row, g, 1);
            for (int i = 0; i < GROUP; ++i) {
                second[i] = int8_t(words[i]);
                first[i] = int8_t((words[i] - second[i]) >> REST_BITS);
            }
            scales[g * rows + row] = steps.scale;
            sums[g * rows + row] = steps.sum;
        }
    }
};

// `count` groups of a strip of an int4 weight, a byte each weight: [count][2 sixteens][8 words][16 outputs][4 inputs].
inline void spread_int4(Block<4> block, int sixteen, int count, uint8_t* to) {
    for (int g = 0; g < count; ++g, block.at += block.BYTES) {
        block.fetch_ahead<SIXTEENS>(sixteen);
        for (int s = 0; s < SIXTEENS; ++s, to += SIXTEEN_BYTES) {
            W16 words[GROUP_WORDS];
            take_words(block, sixteen + s, words);
            for (int i = 0; i < GROUP_WORDS; ++i) _mm512_store_si512(to + i * TILE_BYTES, words[i].v);
        }
    }
}

// totals[s][row] (+)= what the products of `count` groups from `group` on mean, in order, for sixteen rows. products:
// with first bytes and with second ones.
template <int BITS>
INLINE void add_groups(const TileRows& x, int64_t row, Block<BITS> block, int sixteen, int64_t group, int count,
                       const int32_t* const (&products)[2], float* totals) {
    for (int s = 0; s < SIXTEENS; ++s) {
        V16 total[AMX_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < AMX_ROWS; ++r) total[r] = group ? load(totals + (s * AMX_ROWS + r) * LANES) : zeros();
        for (int g = 0; g < count; ++g) {
            Block<BITS> of_group = block;
            of_group.at += g * block.BYTES;
            V16 scale = of_group.scale(sixteen + s), minimum = of_group.minimum(sixteen + s, scale);
            const float *scales = x.scales + (group + g) * x.rows + row, *sums = x.sums + (group + g) * x.rows + row;
            int64_t at = (g * SIXTEENS + s) * AMX_ROWS * LANES;
#pragma GCC unroll 16
            for (int r = 0; r < AMX_ROWS; ++r) {
                W16 first = load_words(products[0] + at + r * LANES), second = load_words(products[1] + at + r * LANES);
                V16 values = to_floats(shift_left<REST_BITS>(first) + second) * scale;
                total[r] = fma(minimum, broadcast(sums[r]), fma(values, broadcast(scales[r]), total[r]));
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < AMX_ROWS; ++r) store(totals + (s * AMX_ROWS + r) * LANES, total[r]);
    }
}

constexpr int PRODUCT = AMX_ROWS * LANES;  // integers of a tile

// to[g][s] = sixteen rows of x times `count` groups of a strip, `step` bytes apart; two groups at a time in tiles of their
// own, so that some are stored while others are multiplied.
INLINE void multiply_groups(const int8_t* x, int64_t stride, const uint8_t* weight, int64_t step, int count, int32_t* to) {
    written();
    for (int g = 0; g < count; g += 2, x += 2 * GROUP, weight += 2 * step, to += 4 * PRODUCT) {
        bool two = g + 1 < count;
        _tile_loadd(4, x, stride);
        _tile_loadd(6, weight, TILE_BYTES);
        _tile_loadd(7, weight + SIXTEEN_BYTES, TILE_BYTES);
        _tile_zero(0);
        _tile_dpbsud(0, 4, 6);
        _tile_zero(1);
        _tile_dpbsud(1, 4, 7);
        if (two) {
            _tile_loadd(5, x + GROUP, stride);
            _tile_loadd(6, weight + step, TILE_BYTES);
            _tile_loadd(7, weight + step + SIXTEEN_BYTES, TILE_BYTES);
            _tile_zero(2);
            _tile_dpbsud(2, 5, 6);
            _tile_zero(3);
            _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, to, TILE_BYTES);
        _tile_stored(1, to + PRODUCT, TILE_BYTES);
        if (two) {
            _tile_stored(2, to + 2 * PRODUCT, TILE_BYTES);
            _tile_stored(3, to + 3 * PRODUCT, TILE_BYTES);
        }
    }
}

// The sums of by_vectors, in the same order.
template <int BITS>
void by_byte_tiles(const Call& c) {
    TileRows x(c);
    for_rows(c, x.rows, [&](int64_t row) { x.put(c, row); });
    size_t own = x.rows * STRIP;
    float* memory = scratch(1).take<float>(own * c.threads);
    for_strips(c, [&](int64_t strip, int64_t end, int thread) {
        float* totals = memory + own * thread;
        alignas(64) uint8_t spread[GROUPS_TOGETHER * SIXTEENS * SIXTEEN_BYTES];
        alignas(64) int32_t first[GROUPS_TOGETHER * SIXTEENS * PRODUCT], second[GROUPS_TOGETHER * SIXTEENS * PRODUCT];
        Tiles configured(GROUP, GROUP_WORDS);
        for (; strip < end; ++strip) {
            int sixteen = int(strip % 2) * SIXTEENS;
            for (int64_t group = 0; group < c.groups(); group += GROUPS_TOGETHER) {
                int count = int(std::min<int64_t>(GROUPS_TOGETHER, c.groups() - group));
                Block<BITS> block(c, strip / 2, group);
                const uint8_t* weight = spread;
                int64_t step = SIXTEENS * SIXTEEN_BYTES;
                if constexpr (BITS == 4) {
                    spread_int4(block, sixteen, count, spread);
                } else {
                    weight = block.quants(sixteen);
                    step = block.BYTES;
                }
                for (int64_t row = 0; row < c.rows; row += AMX_ROWS) {
                    multiply_groups(x.from(row, group, 0), x.stride, weight, step, count, first);
                    multiply_groups(x.from(row, group, 1), x.stride, weight, step, count, second);
                    add_groups(x, row, block, sixteen, group, count, {first, second}, totals + row * STRIP);
                }
            }
            for (int64_t row = 0; row < c.rows; ++row)
                for (int s = 0; s < SIXTEENS; ++s) {
                    int64_t at = row / AMX_ROWS * SIXTEENS + s;  // of the tile's totals
                    V16 total = load(totals + (at * AMX_ROWS + row % AMX_ROWS) * LANES);
                    finish(c, row, strip * STRIP + s * LANES, total);
                }
        }
    });
}

// Two features of sixteen outputs, the first in the low half of each word.
INLINE __m512i pairs(V16 first, V16 second) {
    __m512i half = _mm512_set1_epi32(0x8000);  // rounds to the nearest, up where there are two
    __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first.v), half), 16);
    __m512i high = _mm512_add_epi32(_mm512_castps_si512(second.v), half);
    return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(int(0xffff0000)), 0xf8);  // low | (high & mask)
}

// A strip of a weight in bfloat16: [groups * 16][32 outputs][2 inputs].
template <int BITS>
void widen_strip(const Call& c, int64_t strip, char* to) {
    Block<BITS> block(c, strip / 2, 0);
    int sixteen = int(strip % 2) * SIXTEENS;
    constexpr int LINE = STRIP * 4;
    V16 numbers = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
    for (int64_t g = 0; g < c.groups(); ++g, block.at += block.BYTES, to += GROUP / 2 * LINE) {
        for (int s = 0; s < SIXTEENS; ++s) {
            V16 scale = block.scale(sixteen + s), minimum = block.minimum(sixteen + s, scale);
            auto value = [&](W16 word, int shift) {
                __m512i bits = _mm512_srli_epi32(word.v, shift);
                // A half byte is an index of the register that holds its value: of an index, only four bits count.
                V16 u = BITS == 4 ? V16{_mm512_permutexvar_ps(bits, numbers.v)}
                                  : V16{_mm512_cvtepi32_ps(_mm512_and_si512(bits, _mm512_set1_epi32(255)))};
                return fma(u, scale, minimum);
            };
            W16 words[GROUP_WORDS];
            take_words(block, sixteen + s, words);
            char* line = to + s * TILE_BYTES;
            for (int i = 0; i < GROUP_WORDS; ++i, line += 2 * LINE) {
                _mm512_store_si512(line, pairs(value(words[i], 0), value(words[i], 8)));
                _mm512_store_si512(line + LINE, pairs(value(words[i], 16), value(words[i], 24)));
            }
        }
    }
}

template <int BITS>
void by_bfloat16_tiles(const Call& c) {
    int64_t inputs = c.groups() * GROUP, stride = inputs + TILE_BYTES / 2;
    bf16* x = scratch(0).take<bf16>(tile_rows(c) * stride);
    for_rows(c, tile_rows(c), [&](int64_t row) {
        for (int64_t k = 0; k < inputs; k += LANES) {
            int part = row < c.rows ? int(std::clamp<int64_t>(c.inputs - k, 0, LANES)) : 0;
            int64_t at = row * c.x_stride + k;
            store(x + row * stride + k,
                  c.narrow ? load_part((const bf16*)c.x + at, part) : load_part((const float*)c.x + at, part));
        }
    });
    size_t own = inputs * STRIP * sizeof(bf16);
    char* memory = scratch(1).take<char>(own * c.threads);
    for_strips(c, [&](int64_t strip, int64_t end, int thread) {
        char* weight = memory + own * thread;
        Tiles configured;
        for (; strip < end; ++strip) {
            widen_strip<BITS>(c, strip, weight);
            for_products(c, (const char*)x, stride * sizeof(bf16), weight, 4 * STRIP, c.groups(),
                         [&](int64_t row, const int32_t* sums) {
                for (int s = 0; s < SIXTEENS; ++s)
                    finish(c, row, strip * STRIP + s * LANES, load((const float*)sums + s * LANES));
            });
        }
    });
}

template <int BITS>
void by_tiles(const Call& c) {
    c.way == BYTE_TILES ? by_byte_tiles<BITS>(c) : by_bfloat16_tiles<BITS>(c);
}

}  // namespace

#endif
