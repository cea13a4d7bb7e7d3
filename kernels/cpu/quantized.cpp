// Linear layers with int4 and int8 weights, laid out as packing.py says.
//
// Few rows: activations are rounded to signed bytes on the way, in groups of 32 with a scale each (int4), or by one scale
// a row and to two bytes each, the second for what the first leaves (int8), and multiplied as integers. Those sums are exact, and the float32 sums over the groups go in
// order, so a row's result depends on that row alone, and is the same in every instruction set.
// Many rows: int8 takes matrix instructions, which give the same integers. int4 may take the way of bfloat16, where a
// strip of the weight is put together again once for all rows; results are then others, though still of that row alone.

#include <algorithm>
#include <cmath>

#include "amx.h"
#include "bytes.h"
#include "linear.h"
#include "threads.h"

namespace {

constexpr int GROUP = 32;
constexpr int STRIP = 32;  // output features of a piece of work: half a panel
constexpr int SIXTEENS = STRIP / LANES;
constexpr int BLOCK_QUANTS = PANEL * GROUP / 2, BLOCK = BLOCK_QUANTS + 2 * 2 * PANEL;
constexpr int BYTE_MULTIPLE = 64;  // input features of int8 panels
constexpr int WHOLE_ROWS = 2;  // up to which a whole panel is one piece of work
constexpr int AHEAD = 4 * BLOCK;  // how far ahead of its use a weight is fetched
constexpr int PIECES = 8;         // of the work of a thread, so that none waits long for another
constexpr float REST = 254;  // steps of the second byte of an activation in one of the first
constexpr int64_t SERIAL_ELEMENTS = 1 << 12;  // activations, for fewer of which no thread is woken
#ifdef __AVX512F__
constexpr int MOST_ROWS = 6;
#else
constexpr int MOST_ROWS = 2;
#endif

struct Call : QuantizedCall {
    int64_t groups() const { return inputs / GROUP; }
    int64_t strips() const { return (outputs + STRIP - 1) / STRIP; }
    int64_t padded_inputs() const { return (inputs + BYTE_MULTIPLE - 1) / BYTE_MULTIPLE * BYTE_MULTIPLE; }
};

Scratch& scratch(int which) {
    thread_local Scratch memory[2];
    return memory[which];
}

// Rows of x as signed bytes: x = scale * quant, a scale for each group of a row's features. `sums` has the sum of a
// group's quants (int8), or of what they stand for (int4). For int8, second bytes are rows of their own, from `rest` on.
struct Activations {
    int8_t* quants;
    float *scales, *sums;
    int64_t stride;  // bytes from row to row
    int64_t groups;
    int64_t row_step, group_step;  // of scales and sums
    int64_t rest;

    // by_group: the scales of a group lie side by side, not those of a row.
    Activations(int64_t rows, int64_t row_bytes, int64_t groups_, bool by_group)
        : stride(row_bytes), groups(groups_), row_step(by_group ? 1 : groups), group_step(by_group ? rows : 1),
          rest(rows / 2) {
        size_t bytes = (rows * stride + 63) & ~size_t(63);
        quants = scratch(0).take<int8_t>(bytes + 2 * sizeof(float) * rows * groups);
        scales = (float*)(quants + bytes);
        sums = scales + rows * groups;
    }
};

// Calls f(first strip, end, thread) for parts of the strips: few, for each costs a turn, and tiles a configuration.
template <class F>
void for_strips(const Call& c, F f) {
    int64_t count = c.strips(), each = count / (PIECES * c.threads);
    each = each > 1 ? each / 2 * 2 : 1;  // whole panels
    parallel((count + each - 1) / each, int(c.threads), [&](int64_t piece, int thread) {
        f(piece * each, std::min(count, (piece + 1) * each), thread);
    });
}

template <class T>
INLINE float greatest(const T* x, int64_t count) {
    V16 most = zeros();
    for (int64_t i = 0; i < count; i += LANES)
        most = max(absolute(load_part(x + i, int(std::min<int64_t>(LANES, count - i)))), most);
    return largest(most);
}

// Rounds x times `inverse`, by `rounded`, to quants, with zeros up to `end`; returns their sum, which float32 holds
// exactly.
template <class T, class F>
INLINE float round_to_bytes(const T* x, int64_t count, int64_t end, float inverse, int8_t* quants, F rounded) {
    V16 sums = zeros();
    for (int64_t i = 0; i < end; i += LANES) {
        int part = int(std::min<int64_t>(LANES, std::max<int64_t>(0, count - i)));
        V16 q = rounded(load_part(x + i, part) * broadcast(inverse));
        store_bytes(quants + i, q);
        sums = sums + q;
    }
    return sum(sums);
}

constexpr auto WHOLE = [](V16 scaled) { return nearest(scaled); };
// What that leaves, in steps of 1 / REST.
constexpr auto REMAINDER = [](V16 scaled) { return nearest((scaled - nearest(scaled)) * broadcast(REST)); };

template <class T>
void quantize_row(const Call& c, const Activations& a, int64_t row) {
    const T* x = (const T*)c.x + row * c.x_stride;
    int64_t count = c.bits == 4 ? GROUP : c.inputs, end = c.bits == 4 ? GROUP : c.padded_inputs();
    if (row >= c.rows) count = 0;  // fills a tile
    for (int64_t g = 0; g < a.groups; ++g) {
        float most = greatest(x + g * count, count);
        float inverse = most > 0 ? 127 / most : 0, scale = most / 127;
        float sum = round_to_bytes(x + g * count, count, end, inverse, a.quants + row * a.stride + g * end, WHOLE);
        if (sum != sum) {  // there are values that are no numbers: nor shall the results be
            scale = sum;
            sum = 0;
        }
        if (c.bits == 8) {
            float rest = round_to_bytes(x, count, end, inverse, a.quants + (a.rest + row) * a.stride, REMAINDER);
            a.sums[a.rest + row] = rest == rest ? rest : 0;
        }
        int64_t at = row * a.row_step + g * a.group_step;
        a.scales[at] = scale;
        a.sums[at] = c.bits == 4 ? scale * sum : sum;
    }
}

void quantize(const Call& c, const Activations& a, int64_t rows) {
    parallel(rows, c.rows * c.inputs < SERIAL_ELEMENTS ? 1 : int(c.threads), [&](int64_t row, int) {
        c.narrow ? quantize_row<bf16>(c, a, row) : quantize_row<float>(c, a, row);
    });
}

template <class T>
INLINE void finish(const Call& c, int64_t row, int64_t output, V16 sum) {
    int part = int(std::min<int64_t>(LANES, c.outputs - output));
    if (part <= 0) return;
    if (c.bias) sum = sum + load_part((const T*)c.bias + output, part);
    store_part((T*)c.out + row * c.out_stride + output, sum, part);
}
INLINE void finish(const Call& c, int64_t row, int64_t output, V16 sum) {
    c.narrow ? finish<bf16>(c, row, output, sum) : finish<float>(c, row, output, sum);
}

// Calls f.template operator()<ROWS>(first) for tiles of MOST_ROWS rows and one of what is left.
template <class F>
INLINE void for_row_tiles(int64_t rows, F f) {
    int64_t first = 0;
    for (; first + MOST_ROWS <= rows; first += MOST_ROWS) f.template operator()<MOST_ROWS>(first);
    switch (rows - first) {
        case 1: f.template operator()<1>(first); break;
        case 2: f.template operator()<std::min(2, MOST_ROWS)>(first); break;
        case 3: f.template operator()<std::min(3, MOST_ROWS)>(first); break;
        case 4: f.template operator()<std::min(4, MOST_ROWS)>(first); break;
        case 5: f.template operator()<std::min(5, MOST_ROWS)>(first); break;
    }
}

template <int ROWS, int SIXTEENS, bool FETCH>
void int4_tile(const Call& c, const Activations& a, int64_t strip, int64_t first) {
    int64_t groups = c.groups();
    int sixteen = int(strip % 2) * 2;
    const uint8_t* block = c.weight + strip / 2 * groups * BLOCK;
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
        W16 products[ROWS][SIXTEENS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int s = 0; s < SIXTEENS; ++s) products[r][s] = no_words();
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
                }
            }
#pragma GCC unroll 4
        for (int s = 0; s < SIXTEENS; ++s) {
            V16 scale = load_halves(steps + s * 2 * LANES), minimum = load_halves(steps + 2 * PANEL + s * 2 * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                total[r][s] = fma(to_floats(products[r][s]) * scale, broadcast(scales[r][g]), total[r][s]);
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
            for_row_tiles(c.rows, [&]<int ROWS>(int64_t first) {
                first ? int4_tile<ROWS, SIXTEENS, false>(c, a, strip, first)
                      : int4_tile<ROWS, SIXTEENS, true>(c, a, strip, first);
            });
            ++strip;
        }
    });
}

INLINE W16 less_offset(W16 products, float sum) { return products + broadcast_word(-128 * int32_t(sum)); }

// What a row's integer products mean, those of the first bytes and of the second.
INLINE V16 int8_result(const Activations& a, int64_t row, W16 products, W16 rest, const float* weight_scales) {
    V16 first = to_floats(less_offset(products, a.sums[row]));
    V16 second = to_floats(less_offset(rest, a.sums[a.rest + row]));
    return fma(second, broadcast(1 / REST), first) * (load(weight_scales) * broadcast(a.scales[row]));
}

INLINE const uint8_t* int8_strip(const Call& c, int64_t strip) {
    return c.weight + strip / 2 * (c.padded_inputs() + 4) * PANEL + strip % 2 * 4 * STRIP;
}
INLINE const float* int8_scales(const Call& c, int64_t strip) {
    int64_t inputs = c.padded_inputs();
    return (const float*)(c.weight + (strip / 2 * (inputs + 4) + inputs) * PANEL) + strip % 2 * STRIP;
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
    Activations a(2 * c.rows, c.padded_inputs(), 1, false);
    quantize(c, a, c.rows);
    for_strips(c, [&](int64_t strip, int64_t end, int) {
        for (; strip < end; ++strip)
            for_row_tiles(c.rows, [&]<int ROWS>(int64_t first) { int8_tile<ROWS>(c, a, strip, first); });
    });
}

#ifdef __AMX_TILE__

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
int64_t tile_rows(const Call& c) { return (c.rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS; }

void int8_by_tiles(const Call& c) {
    int64_t inputs = c.padded_inputs(), tiles = inputs / TILE_BYTES;
    Activations a(2 * tile_rows(c), inputs + TILE_BYTES, 1, false);
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
void spread_int4(const Call& c, int64_t strip, int64_t group, int count, uint8_t* to) {
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
void add_groups(const Call& c, const Activations& a, int64_t strip, int64_t row, int64_t group, int count,
                const int32_t* products, float* totals) {
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
            const int32_t* product = products + (g * SIXTEENS + s) * AMX_ROWS * LANES;
#pragma GCC unroll 16
            for (int r = 0; r < AMX_ROWS; ++r) {
                V16 values = to_floats(load_words(product + r * LANES)) * scale;
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
void int4_by_tiles(const Call& c) {
    Activations a(tile_rows(c), c.inputs + GROUP, c.groups(), true);
    quantize(c, a, tile_rows(c));
    size_t own = tile_rows(c) * STRIP;
    float* memory = scratch(1).take<float>(own * c.threads);
    for_strips(c, [&](int64_t strip, int64_t end, int thread) {
        float* totals = memory + own * thread;
        alignas(64) uint8_t weight[GROUPS_TOGETHER * SIXTEENS * GROUP_BYTES];
        alignas(64) int32_t products[GROUPS_TOGETHER * SIXTEENS * PRODUCT];
        Tiles configured(GROUP, GROUP_LINES);
        for (; strip < end; ++strip) {
            for (int64_t group = 0; group < c.groups(); group += GROUPS_TOGETHER) {
                int count = int(std::min<int64_t>(GROUPS_TOGETHER, c.groups() - group));
                spread_int4(c, strip, group, count, weight);
                for (int64_t row = 0; row < c.rows; row += AMX_ROWS) {
                    const int8_t* x = a.quants + row * a.stride + group * GROUP;
                    multiply_groups(x, a.stride, weight, count, products);
                    add_groups(c, a, strip, row, group, count, products, totals + row * STRIP);
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
void widen_int4(const Call& c, int64_t strip, char* to) {
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

void int4_by_bfloat16(const Call& c) {
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

#endif

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
    if (c.way && amx_granted()) {
        c.bits == 8 ? int8_by_tiles(c) : c.way == 1 ? int4_by_tiles(c) : int4_by_bfloat16(c);
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
