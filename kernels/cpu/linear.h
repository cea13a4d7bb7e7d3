// Linear layers, for the kernels that are made of them: an expert's, or those of a head.
#pragma once

#include <cstdint>

#include "simd.h"

constexpr int64_t SERIAL_ELEMENTS = 1 << 12;  // activations, for fewer of which no thread is woken to prepare them

struct LinearCall {
    const void *x, *weight, *bias;
    void* out;
    int64_t x_stride, out_stride;  // elements from row to row
    int64_t rows, inputs, outputs;
    int64_t packed;  // whether the weight is in panels (see packing.py), not rows [outputs, inputs]
    int64_t threads;
    int64_t narrow;    // the weight is bfloat16, else float32
    int64_t x_narrow;  // likewise x, bias and, unless it is wide, out
    int64_t wide;      // out is float32 whatever x is
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
    int64_t way;       // see paths.py
    int64_t wide;      // out is float32 whatever x is
};

enum Way { VECTORS, BYTE_TILES, BFLOAT16_TILES, PAIRS };  // as in paths.py

// Both return 0, or -1 without memory.
EXPORT int linear(const LinearCall* call);
EXPORT int linear_quantized(const QuantizedCall* call);
