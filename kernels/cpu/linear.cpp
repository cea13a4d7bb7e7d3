// Linear layers whose rows do not depend on each other, to the bit.
//
// An output is summed over the input features in blocks of 128: in order within a block, then block after block, in
// float32. Tiles, chunks of rows and threads only decide who computes an output, never how.

#include <algorithm>

#include "product.h"
#include "threads.h"

namespace {

constexpr int PANEL = 64;  // output features of a packed panel
constexpr int DEPTH = 128;
constexpr int CHUNK_ROWS = 96;
constexpr int UNPACK_FROM = 13;  // rows from which on a bfloat16 panel is widened first

struct Call {
    const void *x, *weight, *bias;
    void* out;
    int64_t x_stride;  // elements from row to row
    int64_t rows, inputs, outputs;
    int64_t packed;  // whether the weight is panels [ceil(outputs / 64), inputs, 64] or rows [outputs, inputs]
    int64_t threads;
    int64_t narrow;  // everything is bfloat16
};

Scratch& scratch(int which) {
    thread_local Scratch memory[2];
    return memory[which];
}

// panel[k][n] = weight[n][k] for `depth` input and `count` output features, zero beyond.
template <class T>
void transpose_panel(const T* weight, int64_t stride, int count, int depth, float* panel) {
    static const T nothing[LANES] = {};
    for (int n = 0; n < PANEL; n += LANES) {
        for (int k = 0; k < depth; k += LANES) {
            const T* rows[LANES];
            T copies[LANES][LANES] = {};
            bool whole = k + LANES <= depth;
            for (int i = 0; i < LANES; ++i) {
                const T* row = weight + (n + i) * stride + k;
                rows[i] = n + i >= count ? nothing : whole ? row : copies[i];
                if (n + i < count && !whole) std::memcpy(copies[i], row, (depth - k) * sizeof(T));
            }
            if (whole) {
                transpose16(rows, 0, panel + k * PANEL + n, PANEL);
            } else {
                float square[LANES * LANES];
                transpose16(rows, 0, square, LANES);
                for (int i = 0; i < depth - k; ++i) store(panel + (k + i) * PANEL + n, load(square + i * LANES));
            }
        }
    }
}

// sums[row][0 .. 63] (+)= x[row][0 .. depth - 1] times a panel's block, for all rows.
template <class T>
void add_block(const float* x, int64_t x_stride, int rows, const T* panel, int depth, bool first, float* sums) {
    for_tiles(rows, [&]<int ROWS>(int row) {
        constexpr int VECTORS = TILE_VECTORS<ROWS>;
        const float* a[ROWS];
        for (int r = 0; r < ROWS; ++r) a[r] = x + (row + r) * x_stride;
        for (int n = 0; n < PANEL; n += VECTORS * LANES) {
            V16 block[ROWS][VECTORS];
            product<ROWS, VECTORS>(a, [&](int k) { return panel + k * PANEL + n; }, depth, block);
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < VECTORS; ++i) {
                    float* at = sums + (row + r) * PANEL + n + i * LANES;
                    store(at, first ? block[r][i] : load(at) + block[r][i]);
                }
        }
    });
}

template <class T>
int linear(const Call& c) {
    int64_t panels = (c.outputs + PANEL - 1) / PANEL;
    int64_t chunks = (c.rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    if (!c.packed) chunks = 1;  // a panel is transposed once
    int64_t chunk_rows = chunks ? (c.rows + chunks - 1) / chunks : 0;
    chunk_rows = (chunk_rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;

    const float* x = (const float*)c.x;
    int64_t x_stride = c.x_stride;
    float* wide = nullptr;
    if constexpr (sizeof(T) == 2) {
        wide = scratch(0).take<float>(c.rows * padded(c.inputs));
        x = wide;
        x_stride = padded(c.inputs);
    }
    size_t own = padded(DEPTH * PANEL + chunk_rows * PANEL);
    float* memory = scratch(1).take<float>(own * c.threads);
    if constexpr (sizeof(T) == 2)
        parallel(c.rows, int(c.threads), [&](int64_t row, int) {
            for (int64_t k = 0; k < c.inputs; k += LANES)
                store(wide + row * x_stride + k,
                      load_part((const T*)c.x + row * c.x_stride + k, int(std::min<int64_t>(LANES, c.inputs - k))));
        });
    parallel(panels * chunks, int(c.threads), [&](int64_t unit, int thread) {
        float *block = memory + own * thread, *sums = block + DEPTH * PANEL;
        int64_t panel = unit / chunks, first_row = unit % chunks * chunk_rows;
        int rows = int(std::min(chunk_rows, c.rows - first_row));
        if (rows <= 0) return;
        int count = int(std::min<int64_t>(PANEL, c.outputs - panel * PANEL));
        for (int64_t k = 0; k < c.inputs; k += DEPTH) {
            int depth = int(std::min<int64_t>(DEPTH, c.inputs - k));
            const float* a = x + first_row * x_stride + k;
            if (!c.packed) {
                transpose_panel((const T*)c.weight + panel * PANEL * c.inputs + k, c.inputs, count, depth, block);
                add_block(a, x_stride, rows, block, depth, k == 0, sums);
                continue;
            }
            const T* packed = (const T*)c.weight + (panel * c.inputs + k) * PANEL;
            if (sizeof(T) == 2 && rows >= UNPACK_FROM) {
                for (int i = 0; i < depth * PANEL; i += LANES) store(block + i, load(packed + i));
                add_block(a, x_stride, rows, block, depth, k == 0, sums);
            } else {
                add_block(a, x_stride, rows, packed, depth, k == 0, sums);
            }
        }
        for (int n = 0; n < count; n += LANES) {
            int part = std::min(LANES, count - n);
            V16 bias = c.bias ? load_part((const T*)c.bias + panel * PANEL + n, part) : zeros();
            for (int row = 0; row < rows; ++row)
                store_part((T*)c.out + (first_row + row) * c.outputs + panel * PANEL + n, load(sums + row * PANEL + n) + bias,
                           part);
        }
    });
    return 0;
}

}  // namespace

// Returns 0, or -1 without memory.
EXPORT int linear(const Call* call) try {
    return call->narrow ? linear<bf16>(*call) : linear<float>(*call);
} catch (const std::bad_alloc&) {
    return -1;
}
