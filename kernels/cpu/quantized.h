// What the ways of a linear layer with int4 or int8 weights share.
#pragma once

#include <algorithm>
#include <utility>

#include "bytes.h"
#include "linear.h"
#include "threads.h"

namespace {

constexpr int GROUP = 32;
constexpr int STRIP = 32;  // output features of a piece of work: half a panel
constexpr int SIXTEENS = STRIP / LANES;
constexpr int BLOCK_QUANTS = PANEL * GROUP / 2, BLOCK = BLOCK_QUANTS + 2 * 2 * PANEL;
constexpr int BYTE_MULTIPLE = 64;  // input features of int8 panels
constexpr int AHEAD = 4 * BLOCK;  // how far ahead of its use a weight is fetched
constexpr int PIECES = 8;         // of the work of a thread, so that none waits long for another
constexpr int REST_BITS = 8;      // of the second byte of an activation: its steps in one of the first
constexpr float REST = 1 << REST_BITS, MOST_QUANT = 127 * REST;
constexpr float SMALLEST = 1e-33f;  // rows or groups with nothing above it are zeros: its inverse is a number still
constexpr int64_t SERIAL_ELEMENTS = 1 << 12;  // activations, for fewer of which no thread is woken

struct Call : QuantizedCall {
    int64_t groups() const { return inputs / GROUP; }
    int64_t strips() const { return (outputs + STRIP - 1) / STRIP; }
    int64_t padded_inputs() const { return (inputs + BYTE_MULTIPLE - 1) / BYTE_MULTIPLE * BYTE_MULTIPLE; }
};

inline Scratch& scratch(int which) {
    thread_local Scratch memory[2];
    return memory[which];
}

// Rows of x in two signed bytes each, x = scale * (first + second / REST), with a scale for each group of a row's
// features. Second bytes are rows of their own, from `rest` on. `sums` has the sum of a group's bytes (int8: of either
// kind, at their rows), or of what they stand for (int4).
struct Activations {
    int8_t* quants;
    float *scales, *sums;
    int64_t stride;  // bytes from row to row
    int64_t groups;
    int64_t row_step, group_step;  // of scales and sums
    int64_t rest;

    // by_group: the scales of a group lie side by side, not those of a row.
    Activations(int64_t x_rows, int64_t row_bytes, int64_t groups_, bool by_group)
        : stride(row_bytes), groups(groups_), row_step(by_group ? 1 : groups), group_step(by_group ? 2 * x_rows : 1),
          rest(x_rows) {
        int64_t rows = 2 * x_rows;
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

struct ByteSums {
    float first, second;  // exact, as float32 holds them
};

// Rounds x times `inverse` to steps of the second byte, with zeros up to `end`; the sums are no numbers if x is none.
template <class T>
INLINE ByteSums round_to_bytes(const T* x, int64_t count, int64_t end, float inverse, int8_t* first, int8_t* second) {
    V16 firsts = zeros(), seconds = zeros();
    for (int64_t i = 0; i < end; i += LANES) {
        int part = int(std::min<int64_t>(LANES, std::max<int64_t>(0, count - i)));
        V16 steps = nearest(load_part(x + i, part) * broadcast(inverse));
        V16 high = nearest(steps * broadcast(1 / REST)), low = steps - high * broadcast(REST);
        // Halfway the even one is taken, which may leave 128: a byte holds -128 .. 127.
        V16 over = where_at_least(low, broadcast(REST / 2), broadcast(1.0f));
        high = high + over;
        low = low - over * broadcast(REST);
        store_bytes(first + i, high);
        store_bytes(second + i, low);
        firsts = firsts + high;
        seconds = seconds + low;
    }
    return {sum(firsts), sum(seconds)};
}

template <class T>
void quantize_row(const Call& c, const Activations& a, int64_t row) {
    const T* x = (const T*)c.x + row * c.x_stride;
    int64_t count = c.bits == 4 ? GROUP : c.inputs, end = c.bits == 4 ? GROUP : c.padded_inputs();
    if (row >= c.rows) count = 0;  // fills a tile
    int8_t *first = a.quants + row * a.stride, *second = first + a.rest * a.stride;
    for (int64_t g = 0; g < a.groups; ++g) {
        float most = greatest(x + g * count, count);
        bool none = most <= SMALLEST;
        float inverse = none ? 0 : MOST_QUANT / most, scale = none ? 0 : most / 127;
        ByteSums sums = round_to_bytes(x + g * count, count, end, inverse, first + g * end, second + g * end);
        if (sums.first != sums.first) {  // there are values that are no numbers: nor shall the results be
            scale = sums.first;
            sums = {};
        }
        int64_t at = row * a.row_step + g * a.group_step;
        if (c.bits == 4) {
            scale *= 1 / REST;  // of a step of the second byte
            a.sums[at] = scale * (sums.first * REST + sums.second);
        } else {
            a.sums[at] = sums.first;
            a.sums[a.rest + row] = sums.second;
        }
        a.scales[at] = scale;
    }
}

inline void quantize(const Call& c, const Activations& a, int64_t rows) {
    parallel(rows, c.rows * c.inputs < SERIAL_ELEMENTS ? 1 : int(c.threads), [&](int64_t row, int) {
        c.narrow ? quantize_row<bf16>(c, a, row) : quantize_row<float>(c, a, row);
    });
}

template <class T>
INLINE void finish(const Call& c, int64_t row, int64_t output, V16 sum) {
    int part = int(std::min<int64_t>(LANES, c.outputs - output));
    if (part <= 0) return;
    if (c.bias) sum = sum + load_part((const T*)c.bias + output, part);
    int64_t at = row * c.out_stride + output;
    if (c.wide) store_part((float*)c.out + at, sum, part);
    else store_part((T*)c.out + at, sum, part);
}
INLINE void finish(const Call& c, int64_t row, int64_t output, V16 sum) {
    c.narrow ? finish<bf16>(c, row, output, sum) : finish<float>(c, row, output, sum);
}

// Calls f.template operator()<ROWS>(first) for tiles of MOST rows and one of what is left.
template <int MOST, class F>
INLINE void for_row_tiles(int64_t rows, F f) {
    int64_t first = 0;
    for (; first + MOST <= rows; first += MOST) f.template operator()<MOST>(first);
    [&]<int... ROWS>(std::integer_sequence<int, ROWS...>) {
        ((rows - first == ROWS + 1 ? f.template operator()<ROWS + 1>(first) : void()), ...);
    }(std::make_integer_sequence<int, MOST - 1>());
}

// Sums of products with first and second bytes, in steps of the second.
INLINE W16 in_steps(W16 first, W16 second) { return shift_left<REST_BITS>(first) + second; }

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

}  // namespace
