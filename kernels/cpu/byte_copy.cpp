// An int4 weight once more, in bytes, as packing.py says, and linear layers by that copy.
//
// Nothing has to be unpacked, and sums are scaled once for a span of 96 inputs, so that nearly all instructions of a tile
// are products. It is worth its memory for many rows. Activations are rounded to one byte each
// with a scale for a span; sums are exact within a span and float32 over spans, in order: a row's result depends on that
// row alone, and is the same in every instruction set.

#include "quantized.h"

namespace {

constexpr int SPAN = 96;
constexpr int SPAN_GROUPS = SPAN / GROUP;
constexpr int SPAN_WORDS = SPAN / 4;
constexpr int SPAN_BYTES = SPAN * LANES;  // of a span of sixteen outputs
constexpr int AHEAD = 4096;               // how far ahead of its use a weight is fetched
constexpr int MOST_ROWS = 16;             // of a tile
constexpr int IN_REGISTERS = 12;          // float sums that find room there beside the sums of a span
constexpr int ZERO = 128;                 // the byte of a weight of 0

int64_t spans_of(int64_t inputs) { return (inputs + SPAN - 1) / SPAN; }

// Sixteen outputs of a copy: span by span the bytes [24 words][16 outputs][4 inputs] and scales float32 [16].
template <class Byte>
struct Copy {
    static constexpr int SPAN_STEP = SPAN_BYTES + LANES * int(sizeof(float));

    Byte* at;
    int64_t sixteen_bytes;

    Copy(Byte* copy, int64_t inputs, int64_t panel, int sixteen) : sixteen_bytes(spans_of(inputs) * SPAN_STEP) {
        at = copy + (panel * (PANEL / LANES) + sixteen) * sixteen_bytes;
    }
};

// Rows of x in signed bytes, in tiles; of a tile, span by span the words [rows][24], scales [rows] and, to begin the sums
// with, what the weights' zeros add, negated [rows].
struct SpanRows {
    const Call& c;
    int64_t spans, tiles;
    int32_t* words;
    float* scales;
    int32_t* starts;

    explicit SpanRows(const Call& call)
        : c(call), spans(spans_of(c.inputs)), tiles((c.rows + MOST_ROWS - 1) / MOST_ROWS) {
        int64_t count = c.rows * spans;
        words = scratch(0).take<int32_t>(count * (SPAN_WORDS + 2));
        scales = (float*)(words + count * SPAN_WORDS);
        starts = (int32_t*)(scales + count);
    }
    // The first row of a tile: they are of one size, or some one larger than others.
    int64_t first(int64_t tile) const { return tile * c.rows / tiles; }
    // Where what is of a row begins that is the first of its tile.
    int32_t* words_from(int64_t row) const { return words + row * spans * SPAN_WORDS; }
    float* scales_from(int64_t row) const { return scales + row * spans; }
    int32_t* starts_from(int64_t row) const { return starts + row * spans; }

    void put(int64_t tile) const {
        int64_t from = first(tile), rows = first(tile + 1) - from;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t s = 0; s < spans; ++s) {
                int64_t at = (from + r) * c.x_stride + s * SPAN;
                int count = int(std::min<int64_t>(SPAN, c.inputs - s * SPAN));
                auto* bytes = (int8_t*)(words_from(from) + (s * rows + r) * SPAN_WORDS);
                int64_t index = s * rows + r;
                Steps steps = round_to_bytes<1, SPAN / LANES>(c, at, count, bytes);
                scales_from(from)[index] = steps.scale;
                starts_from(from)[index] = -ZERO * int32_t(steps.sum);
            }
    }
};

// ROWS rows from `first` on times VECTORS sixteens of outputs, the first of which is `sixteen` of a panel.
template <int ROWS, int VECTORS>
void copy_tile(const Call& c, const SpanRows& x, int64_t panel, int sixteen, int64_t first) {
    constexpr bool REGISTERS = ROWS * VECTORS <= IN_REGISTERS;
    Copy<const uint8_t> copy(c.weight, c.inputs, panel, sixteen);
    const uint8_t* weights = copy.at;
    const int32_t *words = x.words_from(first), *starts = x.starts_from(first);
    const float* scales = x.scales_from(first);
    alignas(64) float memory[REGISTERS ? 1 : ROWS * VECTORS][LANES] = {};
    V16 totals[REGISTERS ? ROWS : 1][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < (REGISTERS ? ROWS : 1); ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) totals[r][v] = zeros();
    for (int64_t s = 0; s < x.spans; ++s, words += ROWS * SPAN_WORDS, starts += ROWS, scales += ROWS) {
        W16 sums[ROWS][VECTORS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = broadcast_word(starts[r]);
        for (int i = 0; i < SPAN_WORDS; ++i, weights += LANES * 4) {
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                const uint8_t* at = weights + v * copy.sixteen_bytes;
                W16 weight = load_words(at);
                _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r)
                    sums[r][v] = add_products_at(sums[r][v], weight, words + r * SPAN_WORDS + i);
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            V16 step = load((const float*)(weights + v * copy.sixteen_bytes));
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                V16 values = to_floats(sums[r][v]) * step, scale = broadcast(scales[r]);
                if constexpr (REGISTERS) totals[r][v] = fma(values, scale, totals[r][v]);
                else store(memory[r * VECTORS + v], fma(values, scale, load(memory[r * VECTORS + v])));
            }
        }
        weights += LANES * sizeof(float);
    }
    for (int v = 0; v < VECTORS; ++v)
        for (int r = 0; r < ROWS; ++r) {
            V16 total;
            if constexpr (REGISTERS) total = totals[r][v];
            else total = load(memory[r * VECTORS + v]);
            finish(c, first + r, panel * PANEL + (sixteen + v) * LANES, total);
        }
}

struct CopyCall {
    const uint8_t* weight;
    uint8_t* copy;
    int64_t outputs, inputs, threads;
};

// Sixteen outputs of a panel. A scale takes the greatest value that the scales and minimums of its groups allow.
void copy_sixteen(const CopyCall& c, const Call& call, int64_t panel, int sixteen) {
    uint8_t* to = Copy<uint8_t>(c.copy, c.inputs, panel, sixteen).at;
    for (int64_t first = 0; first < call.groups(); first += SPAN_GROUPS) {
        int64_t end = std::min(call.groups(), first + SPAN_GROUPS);
        V16 most = zeros(), none = zeros();  // none: no number where a group's scale or minimum is none
        for (int64_t g = first; g < end; ++g) {
            Block<4> block(call, panel, g);
            V16 scale = block.scale(sixteen), minimum = block.minimum(sixteen, scale);
            V16 size = max(absolute(minimum), absolute(fma(scale, broadcast(15.0f), minimum)));
            most = max(most, size);
            none = fma(size, zeros(), none);
        }
        V16 inverse = broadcast(127.0f) / max(most, broadcast(SMALLEST));
        for (int64_t g = first; g < end; ++g, to += GROUP * LANES) {
            Block<4> block(call, panel, g);
            V16 scale = block.scale(sixteen), minimum = block.minimum(sixteen, scale);
            uint8_t table[LANES][16];  // of each output, the byte of each value of four bits
            for (int value = 0; value < 16; ++value) {
                float bytes[LANES];
                V16 steps = nearest(fma(scale, broadcast(float(value)), minimum) * inverse);
                store(bytes, max(min(steps, broadcast(127.0f)), broadcast(-127.0f)) + broadcast(float(ZERO)));
                for (int i = 0; i < LANES; ++i) table[i][value] = uint8_t(bytes[i]);
            }
            const uint8_t* quants = block.quants(sixteen);  // [4][16 outputs][4]: the low halves are the first four words
            constexpr int HALF = GROUP_WORDS / 2 * LANES * 4;
            for (int i = 0; i < HALF; ++i) {
                const uint8_t* bytes = table[i / 4 % LANES];
                to[i] = bytes[quants[i] & 15];
                to[HALF + i] = bytes[quants[i] >> 4];
            }
        }
        for (int64_t g = end; g < first + SPAN_GROUPS; ++g, to += GROUP * LANES) std::memset(to, ZERO, GROUP * LANES);
        store((float*)to, most * broadcast(1.0f / 127) + none);
        to += LANES * sizeof(float);
    }
}

}  // namespace

// The layer of a call whose weight is a copy.
void linear_by_copy(const QuantizedCall& call) {
    const Call c{call};
    SpanRows x(c);
    parallel(x.tiles, c.rows * c.inputs < SERIAL_ELEMENTS ? 1 : int(c.threads), [&](int64_t tile, int) { x.put(tile); });
    for_strips(c, [&](int64_t strip, int64_t end, int) {
        for (; strip < end; ++strip)
            for (int64_t tile = 0; tile < x.tiles; ++tile) {
                int64_t first = x.first(tile);
                for_rows_of_tile<MOST_ROWS>(x.first(tile + 1) - first, [&]<int ROWS>() {
                    constexpr int VECTORS = ROWS * 2 <= MOST_ROWS ? 2 : 1;
                    for (int s = 0; s < SIXTEENS; s += VECTORS)
                        copy_tile<ROWS, VECTORS>(c, x, strip / 2, int(strip % 2) * SIXTEENS + s, first);
                });
            }
    });
}

EXPORT int copy_int4(const CopyCall* call) {
    const CopyCall& c = *call;
    Call of_weight{};
    of_weight.weight = c.weight;
    of_weight.inputs = c.inputs;
    constexpr int SIXTEENS_OF_PANEL = PANEL / LANES;
    int64_t count = (c.outputs + PANEL - 1) / PANEL * SIXTEENS_OF_PANEL;
    parallel(count, int(c.threads), [&](int64_t i, int) {
        copy_sixteen(c, of_weight, i / SIXTEENS_OF_PANEL, int(i % SIXTEENS_OF_PANEL));
    });
    return 0;
}
