// int4 and int8 weights in matrix instructions: of bytes, with the bits of the vectors of bytes, and int4 of bfloat16.
#pragma once

#include "amx.h"
#include "quantized.h"

#ifdef __AMX_TILE__

namespace {

constexpr int TILE_BYTES = 64;          // of a row of a tile
constexpr int SQUARE = 2 * AMX_ROWS;    // rows of x that are multiplied at a time

// sums[32][32] = 32 (or 16) rows of x times a strip of a weight whose lines, of 4 bytes an output, are `line` apart.
template <bool BYTES, bool BOTH>
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
        if constexpr (BYTES) _tile_dpbsud(0, 4, 6);
        else _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weight + TILE_BYTES, line);
        if constexpr (BYTES) _tile_dpbsud(1, 4, 7);
        else _tile_dpbf16ps(1, 4, 7);
        if constexpr (BOTH) {
            _tile_loadd(5, x + AMX_ROWS * stride, stride);
            if constexpr (BYTES) _tile_dpbsud(2, 5, 6);
            else _tile_dpbf16ps(2, 5, 6);
            if constexpr (BYTES) _tile_dpbsud(3, 5, 7);
            else _tile_dpbf16ps(3, 5, 7);
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
template <bool BYTES, class F>
INLINE void for_products(const Call& c, const char* x, int64_t stride, const char* weight, int64_t line, int64_t tiles,
                         F f) {
    alignas(64) int32_t sums[SQUARE * STRIP];
    for (int64_t row = 0; row < c.rows; row += SQUARE) {
        int64_t rows = std::min<int64_t>(SQUARE, c.rows - row);
        rows > AMX_ROWS ? multiply<BYTES, true>(x + row * stride, stride, weight, line, tiles, sums)
                        : multiply<BYTES, false>(x + row * stride, stride, weight, line, tiles, sums);
        for (int64_t i = 0; i < rows; ++i) f(row + i, sums + i * STRIP);
    }
}

// Rows in whole tiles; 64 bytes more between them keep them off the same cache sets.
inline int64_t tile_rows(const Call& c) { return (c.rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS; }

inline void int8_by_tiles(const Call& c) {
    int64_t inputs = c.padded_inputs(), tiles = inputs / TILE_BYTES;
    Activations a(tile_rows(c), inputs + TILE_BYTES, 1, false);
    quantize(c, a, tile_rows(c));
    for_strips(c, [&](int64_t strip, int64_t end, int) {
        alignas(64) int32_t products[2][SQUARE * STRIP];
        Tiles configured;
        for (; strip < end; ++strip) {
            const float* scales = int8_scales(c, strip);
            const char* weight = (const char*)int8_strip(c, strip);
            for (int64_t row = 0; row < c.rows; row += SQUARE) {
                int64_t rows = std::min<int64_t>(SQUARE, c.rows - row);
                for (int part = 0; part < 2; ++part) {
                    const char* x = (const char*)a.quants + (part * a.rest + row) * a.stride;
                    rows > AMX_ROWS ? multiply<true, true>(x, a.stride, weight, 4 * PANEL, tiles, products[part])
                                    : multiply<true, false>(x, a.stride, weight, 4 * PANEL, tiles, products[part]);
                }
                for (int64_t i = 0; i < rows; ++i)
                    for (int s = 0; s < SIXTEENS; ++s) {
                        int64_t at = i * STRIP + s * LANES;
                        V16 result = int8_result(a, row + i, load_words(products[0] + at),
                                                 load_words(products[1] + at), scales + s * LANES);
                        finish(c, row + i, strip * STRIP + s * LANES, result);
                    }
            }
        }
    });
}

constexpr int GROUP_LINES = GROUP / 4;             // lines of four features in a group
constexpr int GROUP_BYTES = GROUP_LINES * TILE_BYTES;  // of sixteen outputs, a byte each
constexpr int GROUPS_TOGETHER = 4;

// Groups of a strip of an int4 weight, a byte each weight: [groups][2][8 lines][16 outputs][4 inputs].
inline void spread_int4(const Call& c, int64_t strip, int64_t group, int count, uint8_t* to) {
    const uint8_t* quants = c.weight + (strip / 2 * c.groups() + group) * BLOCK + strip % 2 * (BLOCK_QUANTS / 2);
    for (int g = 0; g < count; ++g, quants += BLOCK) {
        for (int i = 0; i < BLOCK_QUANTS / 2; i += 64) _mm_prefetch((const char*)quants + AHEAD + i, _MM_HINT_T0);
        for (int s = 0; s < SIXTEENS; ++s, to += GROUP_BYTES)
            for (int i = 0; i < GROUP_LINES / 2; ++i) {
                W16 both = load_words(quants + (s * GROUP_LINES / 2 + i) * TILE_BYTES);
                _mm512_store_si512(to + i * TILE_BYTES, low_halves(both).v);
                _mm512_store_si512(to + (GROUP_LINES / 2 + i) * TILE_BYTES, high_halves(both).v);
            }
    }
}

// totals[s][row] (+)= what the products of `count` groups from `group` on mean, in order, for sixteen rows.
inline void add_groups(const Call& c, const Activations& a, int64_t strip, int64_t row, int64_t group, int count,
                       const int32_t* products, const int32_t* rest, float* totals) {
    for (int s = 0; s < SIXTEENS; ++s) {
        V16 total[AMX_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < AMX_ROWS; ++r) total[r] = group ? load(totals + (s * AMX_ROWS + r) * LANES) : zeros();
        const uint8_t* steps = c.weight + (strip / 2 * c.groups() + group) * BLOCK + BLOCK_QUANTS +
                               (strip % 2 * SIXTEENS + s) * 2 * LANES;
        for (int g = 0; g < count; ++g, steps += BLOCK) {
            V16 scale = load_halves(steps), minimum = load_halves(steps + 2 * PANEL);
            const float* scales = a.scales + (group + g) * a.group_step + row;
            const float* sums = a.sums + (group + g) * a.group_step + row;
            int64_t at = (g * SIXTEENS + s) * AMX_ROWS * LANES;
#pragma GCC unroll 16
            for (int r = 0; r < AMX_ROWS; ++r) {
                W16 first = load_words(products + at + r * LANES), second = load_words(rest + at + r * LANES);
                V16 values = to_floats(in_steps(first, second)) * scale;
                total[r] = fma(minimum, broadcast(sums[r]), fma(values, broadcast(scales[r]), total[r]));
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < AMX_ROWS; ++r) store(totals + (s * AMX_ROWS + r) * LANES, total[r]);
    }
}

constexpr int PRODUCT = AMX_ROWS * LANES;  // integers of a tile

// to[g][s] = sixteen rows of x times `count` groups of a strip that was spread; two groups at a time in tiles of their
// own, so that some are stored while others are multiplied.
INLINE void multiply_groups(const int8_t* x, int64_t stride, const uint8_t* weight, int count, int32_t* to) {
    written();
    for (int g = 0; g < count; g += 2, x += 2 * GROUP, weight += 4 * GROUP_BYTES, to += 4 * PRODUCT) {
        bool two = g + 1 < count;
        _tile_loadd(4, x, stride);
        _tile_loadd(6, weight, TILE_BYTES);
        _tile_loadd(7, weight + GROUP_BYTES, TILE_BYTES);
        _tile_zero(0);
        _tile_dpbsud(0, 4, 6);
        _tile_zero(1);
        _tile_dpbsud(1, 4, 7);
        if (two) {
            _tile_loadd(5, x + GROUP, stride);
            _tile_loadd(6, weight + 2 * GROUP_BYTES, TILE_BYTES);
            _tile_loadd(7, weight + 3 * GROUP_BYTES, TILE_BYTES);
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

// The sums of int4_by_vectors, in the same order.
inline void int4_by_tiles(const Call& c) {
    Activations a(tile_rows(c), c.inputs + GROUP, c.groups(), true);
    quantize(c, a, tile_rows(c));
    size_t own = tile_rows(c) * STRIP;
    float* memory = scratch(1).take<float>(own * c.threads);
    for_strips(c, [&](int64_t strip, int64_t end, int thread) {
        float* totals = memory + own * thread;
        alignas(64) uint8_t weight[GROUPS_TOGETHER * SIXTEENS * GROUP_BYTES];
        alignas(64) int32_t products[2][GROUPS_TOGETHER * SIXTEENS * PRODUCT];
        Tiles configured(GROUP, GROUP_LINES);
        for (; strip < end; ++strip) {
            for (int64_t group = 0; group < c.groups(); group += GROUPS_TOGETHER) {
                int count = int(std::min<int64_t>(GROUPS_TOGETHER, c.groups() - group));
                spread_int4(c, strip, group, count, weight);
                for (int64_t row = 0; row < c.rows; row += AMX_ROWS) {
                    const int8_t* x = a.quants + row * a.stride + group * GROUP;
                    multiply_groups(x, a.stride, weight, count, products[0]);
                    multiply_groups(x + a.rest * a.stride, a.stride, weight, count, products[1]);
                    add_groups(c, a, strip, row, group, count, products[0], products[1], totals + row * STRIP);
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

// A strip of an int4 weight in bfloat16: [inputs / 2][32 outputs][2 inputs].
inline void widen_int4(const Call& c, int64_t strip, char* to) {
    int sixteen = int(strip % 2) * SIXTEENS;
    const uint8_t* block = c.weight + strip / 2 * c.groups() * BLOCK;
    constexpr int LINE = STRIP * 4;
    V16 values = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
    for (int64_t g = 0; g < c.groups(); ++g, block += BLOCK, to += GROUP / 2 * LINE) {
        for (int s = 0; s < SIXTEENS; ++s) {
            const uint8_t* quants = block + (sixteen + s) * (BLOCK_QUANTS / 4);
            const uint8_t* steps = block + BLOCK_QUANTS + (sixteen + s) * 2 * LANES;
            V16 scale = load_halves(steps), minimum = load_halves(steps + 2 * PANEL);
            // A half byte is an index of the register that holds its value: of an index, only four bits count.
            auto value = [&](W16 words, int shift) {
                V16 q = {_mm512_permutexvar_ps(_mm512_srli_epi32(words.v, shift), values.v)};
                return fma(q, scale, minimum);
            };
            char* line = to + s * TILE_BYTES;
            for (int i = 0; i < 4; ++i, line += 2 * LINE) {
                W16 both = load_words(quants + i * 64);
                _mm512_store_si512(line, pairs(value(both, 0), value(both, 8)));
                _mm512_store_si512(line + LINE, pairs(value(both, 16), value(both, 24)));
                _mm512_store_si512(line + 8 * LINE, pairs(value(both, 4), value(both, 12)));
                _mm512_store_si512(line + 9 * LINE, pairs(value(both, 20), value(both, 28)));
            }
        }
    }
}

inline void int4_by_bfloat16(const Call& c) {
    int64_t stride = c.inputs + TILE_BYTES / 2;
    bf16* x = scratch(0).take<bf16>(tile_rows(c) * stride);
    parallel(tile_rows(c), int(c.threads), [&](int64_t row, int) {
        for (int64_t k = 0; k < c.inputs; k += LANES) {
            V16 values = zeros();
            if (row < c.rows) {
                int64_t at = row * c.x_stride + k;
                values = c.narrow ? load((const bf16*)c.x + at) : load((const float*)c.x + at);
            }
            store(x + row * stride + k, values);
        }
    });
    size_t own = c.inputs * STRIP * sizeof(bf16);
    char* memory = scratch(1).take<char>(own * c.threads);
    for_strips(c, [&](int64_t strip, int64_t end, int thread) {
        char* weight = memory + own * thread;
        Tiles configured;
        for (; strip < end; ++strip) {
            widen_int4(c, strip, weight);
            for_products<false>(c, (const char*)x, stride * sizeof(bf16), weight, 4 * STRIP, c.groups(),
                                [&](int64_t row, const int32_t* sums) {
                for (int s = 0; s < SIXTEENS; ++s)
                    finish(c, row, strip * STRIP + s * LANES, load((const float*)sums + s * LANES));
            });
        }
    });
}
}  // namespace

#endif
