// What the ways of a linear layer with int4 or int8 weights share.
#pragma once

#include <algorithm>
#include <utility>

#include "bytes.h"
#include "linear.h"
#include "product.h"
#include "threads.h"

namespace {

constexpr int GROUP = 32;
constexpr int STRIP = 32;  // output features of a piece of work: half a panel
constexpr int SIXTEENS = STRIP / LANES;
constexpr int PIECES = 8;  // of the work of a thread, so that none waits long for another
constexpr int REST_BITS = 8;  // of the lower byte of an activation of 16 bits
constexpr float REST = 1 << REST_BITS;
constexpr float SMALLEST = 1e-33f;  // groups with nothing above it are zeros: its inverse is a number still

struct Call : QuantizedCall {
    int64_t groups() const { return (inputs + GROUP - 1) / GROUP; }
    int64_t strips() const { return (outputs + STRIP - 1) / STRIP; }
    int group_inputs(int64_t group) const { return int(std::min<int64_t>(GROUP, inputs - group * GROUP)); }
};

// A block of a weight: a group of a panel's features, w = scale * u + minimum for unsigned u. `sixteen`: which sixteen of
// the panel's outputs.
template <int BITS>
struct Block {
    static constexpr int SIXTEEN_QUANTS = LANES * GROUP * BITS / 8, QUANTS = PANEL / LANES * SIXTEEN_QUANTS;
    static constexpr int BYTES = QUANTS + (BITS == 4 ? 2 : 1) * 2 * PANEL;
    static constexpr int AHEAD = 8 * BYTES;  // how far ahead of its use a weight is fetched

    const uint8_t* at;

    Block(const Call& c, int64_t panel, int64_t group) : at(c.weight + (panel * c.groups() + group) * BYTES) {}
    const uint8_t* quants(int sixteen) const { return at + sixteen * SIXTEEN_QUANTS; }
    const uint8_t* steps(int sixteen) const { return at + QUANTS + sixteen * 2 * LANES; }

    INLINE V16 scale(int sixteen) const { return load_halves(steps(sixteen)); }
    INLINE V16 minimum(int sixteen, V16 scale) const {
        return BITS == 4 ? load_halves(steps(sixteen) + 2 * PANEL) : scale * broadcast(-128.0f);
    }
    template <int COUNT>
    INLINE void fetch_ahead(int sixteen) const {
#pragma GCC unroll 32
        for (int i = 0; i < COUNT * SIXTEEN_QUANTS; i += 64)
            _mm_prefetch((const char*)quants(sixteen) + AHEAD + i, _MM_HINT_T0);
        _mm_prefetch((const char*)steps(sixteen) + AHEAD, _MM_HINT_T0);
        if (BITS == 4) _mm_prefetch((const char*)steps(sixteen) + AHEAD + 2 * PANEL, _MM_HINT_T0);
    }
};

inline Scratch& scratch(int which) {
    thread_local Scratch memory[2];
    return memory[which];
}

// Calls f(first strip, end, thread) for parts of the strips: few, for each costs a turn, and tiles a configuration.
template <class F>
void for_strips(const Call& c, F f) {
    int64_t count = c.strips(), each = count / (PIECES * c.threads);
    each = each > 1 ? each / 2 * 2 : 1;  // whole panels
    parallel((count + each - 1) / each, int(c.threads), [&](int64_t piece, int thread) {
        f(piece * each, std::min(count, (piece + 1) * each), thread);
    });
}

// Calls f(row) for rows below `rows`, to prepare them.
template <class F>
void for_rows(const Call& c, int64_t rows, F f) {
    parallel(rows, c.rows * c.inputs < SERIAL_ELEMENTS ? 1 : int(c.threads), [&](int64_t row, int) { f(row); });
}

// Values in whole steps of a scale.
struct Steps {
    float scale, sum;  // sum: of the steps
};

// The first `count` of a group's values, and zeros behind them, in words of 16 bits: x = scale * word. Words leave room at
// the end, so that each is REST times a signed byte and another one.
template <class T>
INLINE Steps round_to_words(const T* x, int count, int16_t* words) {
    constexpr float MOST = 127 * REST;
    V16 values[GROUP / LANES], most = zeros(), sums = zeros();
    for (int i = 0; i < GROUP / LANES; ++i) {
        values[i] = load_part(x + i * LANES, std::clamp(count - i * LANES, 0, LANES));
        most = max(absolute(values[i]), most);
    }
    float largest_size = largest(most);
    bool none = largest_size <= SMALLEST;
    V16 inverse = broadcast(none ? 0 : MOST / largest_size);
    for (int i = 0; i < GROUP / LANES; ++i) {
        V16 steps = nearest(values[i] * inverse);
        store_half_words(words + i * LANES, steps);
        sums = sums + steps;  // exact
    }
    float steps = sum(sums);
    bool numbers = steps == steps;  // else there are values that are none, and nor shall the results be
    return {!numbers ? steps : none ? 0 : largest_size / MOST, numbers ? steps : 0};
}

// A group of a row's activations; the scale, and the sum of what the words stand for. Rows behind the last are zeros.
INLINE Steps round_group(const Call& c, int64_t row, int64_t group, int16_t* words) {
    int64_t at = row * c.x_stride + group * GROUP;
    int count = row < c.rows ? c.group_inputs(group) : 0;
    Steps steps = c.narrow ? round_to_words((const bf16*)c.x + at, count, words)
                           : round_to_words((const float*)c.x + at, count, words);
    return {steps.scale, steps.sum == 0 ? 0 : steps.scale * steps.sum};  // the scale may be no number
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

}  // namespace
