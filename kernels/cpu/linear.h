// Linear layers, for the kernels that are made of them: an expert's, or those of a head.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

struct LinearCall {
    const void *x, *weight, *bias;
    void* out;
    int64_t x_stride, out_stride;  // elements from row to row
    int64_t rows, inputs, outputs;
    int64_t packed;  // whether the weight is in panels (see packing.py), not rows [outputs, inputs]
    int64_t threads;
    int64_t narrow;    // the weight is bfloat16, else float32
    int64_t x_narrow;  // likewise x, bias and out
};

struct QuantizedCall {
    const void* x;
    const uint8_t* weight;
    const void* bias;
    void* out;
    int64_t x_stride, out_stride;  // elements from row to row
    int64_t rows, inputs, outputs, threads;
    int64_t narrow;    // x, bias and out are bfloat16, else float32
    int64_t bits;      // of a weight: 4 or 8
    int64_t way;       // 0: vectors; 1: matrix instructions of bytes; 2: of bfloat16 (int4); 0 where there are none
};

// Both return 0, or -1 without memory.
EXPORT int linear(const LinearCall* call);
EXPORT int linear_quantized(const QuantizedCall* call);

// Weights of one shape, one behind the other: of experts, or of heads.
struct Stack {
    enum Kind : int64_t { ROWS = 0, PANELS = 1, INT8 = 2, INT4 = 3 };

    const char* data;
    int64_t kind, narrow;           // narrow: rows or panels are bfloat16, else float32
    int64_t outputs, inputs;        // of each
    int64_t panel_bytes;            // of 64 outputs
    int64_t second_way, third_way;  // rows from which on a quantized layer takes the ways of these numbers

    int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }

    // Rows of x times some panels of one, on this thread, into their columns of out's rows. x_narrow: x and out are
    // bfloat16. Returns 0, or -1 without memory.
    int multiply(int64_t index, int64_t first_panel, int64_t end_panel, const void* x, int64_t rows, int64_t x_stride,
                 void* out, int64_t out_stride, bool x_narrow) const {
        int64_t first = first_panel * PANEL, count = std::min(end_panel * PANEL, outputs) - first;
        const char* weight = data + index * (panel_bytes / PANEL * outputs) + first_panel * panel_bytes;
        char* to = (char*)out + first * (x_narrow ? 2 : 4);
        if (kind == ROWS || kind == PANELS) {
            LinearCall call{x,    weight, nullptr, to, x_stride, out_stride, rows, inputs, count, kind == PANELS, 1,
                            narrow, x_narrow};
            return linear(&call);
        }
        int64_t way = rows >= third_way ? 2 : rows >= second_way ? 1 : 0;
        QuantizedCall call{x, (const uint8_t*)weight, nullptr, to, x_stride, out_stride, rows, inputs, count, 1,
                           x_narrow, kind == INT8 ? 8 : 4, way};
        return linear_quantized(&call);
    }
};
