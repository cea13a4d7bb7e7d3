// Linear layers whose rows do not depend on each other, to the bit.
//
// An output is summed over the input features in blocks of 128: in order within a block, then block after block, in
// float32; bfloat16 by instructions that multiply pairs of features pair after pair, and with AMX in the order of its
// instruction, 32 features at a time. Tiles, chunks of rows and threads only decide who computes an output, never how.

#include <algorithm>

#include "amx.h"
#include "linear.h"
#include "product.h"
#include "threads.h"

namespace {

constexpr int DEPTH = 128;
constexpr int CHUNK_ROWS = 96;
constexpr int WIDEN_FROM = 13;  // rows from which on a bfloat16 panel is widened first

struct Call : LinearCall {
    int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
    int panel_outputs(int64_t panel) const { return int(std::min<int64_t>(PANEL, outputs - panel * PANEL)); }
    // Rows are shared out where there are many; a panel of rows that must be transposed first serves all of them.
    int64_t chunk_rows(int64_t most, int64_t multiple) const {
        int64_t chunks = packed ? std::max<int64_t>(1, (rows + most - 1) / most) : 1;
        int64_t each = (rows + chunks - 1) / chunks;
        return std::max<int64_t>(1, (each + multiple - 1) / multiple) * multiple;
    }
};

Scratch& scratch(int which) {
    thread_local Scratch memory[2];
    return memory[which];
}

// panel[k][n] = weight[n][k] for `depth` input and `count` output features, zero beyond. `next`: of what will be
// transposed then; lines of memory so far apart are not fetched ahead by themselves.
template <class T>
void transpose_panel(const T* weight, int64_t stride, int count, int depth, float* panel, const T* next) {
    static const T nothing[LANES] = {};
    for (int n = 0; n < PANEL; n += LANES) {
        const T* ahead = n + LANES < PANEL ? weight + (n + LANES) * stride : next;
        for (int k = 0; k < depth; k += LANES) {
            if (k * sizeof(T) % 64 == 0)
                for (int i = 0; i < LANES; ++i) _mm_prefetch((const char*)(ahead + i * stride + k), _MM_HINT_T0);
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

// sums[row][0 .. 63] (+)= x[row][0 .. depth - 1] times a panel's block, for all rows. line(k): the block's k-th line.
template <class Line>
void add_block(const float* x, int64_t x_stride, int rows, Line line, int depth, bool first, float* sums) {
    for_tiles(rows, [&]<int ROWS>(int row) {
        constexpr int VECTORS = TILE_VECTORS<ROWS>;
        const float* a[ROWS];
        for (int r = 0; r < ROWS; ++r) a[r] = x + (row + r) * x_stride;
        for (int n = 0; n < PANEL; n += VECTORS * LANES) {
            V16 block[ROWS][VECTORS];
            product<ROWS, VECTORS>(a, [&](int k) { return line(k) + n; }, depth, block);
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < VECTORS; ++i) {
                    float* at = sums + (row + r) * PANEL + n + i * LANES;
                    store(at, first ? block[r][i] : load(at) + block[r][i]);
                }
        }
    });
}

template <class T>
void add_packed_block(const Call& c, int64_t panel, int64_t k, int depth, const float* x, int64_t x_stride, int rows,
                      float* block, float* sums) {
    auto wide = [&](int i) { return block + i * PANEL; };
    const T* packed = (const T*)c.weight + (panel * c.inputs + k) * PANEL;
    if (sizeof(T) == 4 || c.inputs % 2) {
        add_block(x, x_stride, rows, [&](int i) { return packed + i * PANEL; }, depth, k == 0, sums);
    } else if constexpr (sizeof(T) == 2) {
        auto line = [&](int i) { return PairedLine{packed + i / 2 * 2 * PANEL, i % 2}; };
        if (rows < WIDEN_FROM) {
            add_block(x, x_stride, rows, line, depth, k == 0, sums);
            return;
        }
        for (int i = 0; i < depth; ++i)
            for (int n = 0; n < PANEL; n += LANES) store(wide(i) + n, load(line(i) + n));
        add_block(x, x_stride, rows, wide, depth, k == 0, sums);
    }
}

template <class X>
void finish_row(const Call& c, int64_t row, int64_t panel, const float* sums) {
    int count = c.panel_outputs(panel);
    for (int n = 0; n < count; n += LANES) {
        int64_t output = panel * PANEL + n;
        int part = std::min(LANES, count - n);
        V16 bias = c.bias ? load_part((const X*)c.bias + output, part) : zeros();
        V16 values = load(sums + n) + bias;
        int64_t at = row * c.out_stride + output;
        if (c.wide) store_part((float*)c.out + at, values, part);
        else store_part((X*)c.out + at, values, part);
    }
}

// T: of the weight; X: of x, bias and out.
template <class T, class X>
void linear(const Call& c) {
    const float* x = (const float*)c.x;
    int64_t x_stride = c.x_stride;
    if constexpr (sizeof(X) == 2) {
        x_stride = padded(c.inputs);
        float* wide = scratch(0).take<float>(c.rows * x_stride);
        x = wide;
        parallel(c.rows, int(c.threads), [&](int64_t row, int) {
            for (int64_t k = 0; k < c.inputs; k += LANES)
                store(wide + row * x_stride + k,
                      load_part((const X*)c.x + row * c.x_stride + k, int(std::min<int64_t>(LANES, c.inputs - k))));
        });
    }
    int64_t chunk_rows = c.chunk_rows(CHUNK_ROWS, TILE_ROWS), chunks = (c.rows + chunk_rows - 1) / chunk_rows;
    size_t own = DEPTH * PANEL + chunk_rows * PANEL;
    float* memory = scratch(1).take<float>(own * c.threads);
    parallel(c.panels() * chunks, int(c.threads), [&](int64_t unit, int thread) {
        float *block = memory + own * thread, *sums = block + DEPTH * PANEL;
        int64_t panel = unit / chunks, first_row = unit % chunks * chunk_rows;
        int rows = int(std::min(chunk_rows, c.rows - first_row)), count = c.panel_outputs(panel);
        for (int64_t k = 0; k < c.inputs; k += DEPTH) {
            int depth = int(std::min<int64_t>(DEPTH, c.inputs - k));
            const float* a = x + first_row * x_stride + k;
            if (c.packed) {
                add_packed_block<T>(c, panel, k, depth, a, x_stride, rows, block, sums);
            } else {
                const T* weight = (const T*)c.weight + panel * PANEL * c.inputs;
                const T* next = k + DEPTH < c.inputs ? weight + k + DEPTH : weight + PANEL * c.inputs;
                transpose_panel(weight + k, c.inputs, count, depth, block, next);
                add_block(a, x_stride, rows, [&](int i) { return block + i * PANEL; }, depth, k == 0, sums);
            }
        }
        for (int row = 0; row < rows; ++row) finish_row<X>(c, first_row + row, panel, sums + row * PANEL);
    });
}

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)

constexpr int PAIR_LINE = 2 * PANEL;    // elements of two input features of a panel
constexpr int PAIRS_DEPTH = 2 * LANES;  // input features of a row of x that lie side by side

// Pairs of input features of `count` output features, from rows of a weight; zero beyond.
void pack_pairs(const bf16* weight, int64_t stride, int count, int64_t depth, bf16* panel) {
    for (int64_t k = 0; k < depth; k += PAIRS_DEPTH) {
        int part = int(std::min<int64_t>(PAIRS_DEPTH, depth - k));
        for (int n = 0; n < PANEL; n += LANES) {
            const bf16* rows[LANES];
            bf16 copies[LANES][PAIRS_DEPTH];
            if (part == PAIRS_DEPTH && n + LANES <= count) {
                for (int i = 0; i < LANES; ++i) rows[i] = weight + (n + i) * stride + k;
            } else {
                std::memset(copies, 0, sizeof(copies));
                for (int i = 0; i < LANES; ++i) {
                    if (n + i < count) std::memcpy(copies[i], weight + (n + i) * stride + k, part * sizeof(bf16));
                    rows[i] = copies[i];
                }
            }
            // A pair is moved as one float would be.
            transpose16((const float* const*)rows, 0, (float*)(panel + k * PANEL) + n, PANEL);
        }
    }
}

#endif

#ifdef __AVX512BF16__

constexpr int PAIR_ROWS = 6;           // of a tile, at most: with a whole panel, its sums fill the registers
constexpr int64_t PAIRS_AHEAD = 4096;  // elements ahead of its use that a weight is fetched
constexpr int64_t CHUNK_TILES = 64;

// Rows of x in bfloat16; of a tile, 32 features by 32 features the words [rows][16 pairs], with zeros beyond the last
// feature.
struct PairedRows : RowTiles<PAIR_ROWS> {
    bf16* words;
    int64_t depth;

    explicit PairedRows(const Call& c)
        : RowTiles(c.rows), depth((c.inputs + PAIRS_DEPTH - 1) / PAIRS_DEPTH * PAIRS_DEPTH) {
        words = scratch(0).take<bf16>(rows * depth);
    }
    template <class X>
    void put(const Call& c, int64_t tile) const {
        int64_t from = first(tile), count = size(tile);
        for (int64_t r = 0; r < count; ++r) {
            const X* x = (const X*)c.x + (from + r) * c.x_stride;
            bf16* to = words + from * depth + r * PAIRS_DEPTH;
            for (int64_t k = 0; k < depth; k += PAIRS_DEPTH, to += count * PAIRS_DEPTH)
                for (int half = 0; half < PAIRS_DEPTH; half += LANES) {
                    int part = int(std::clamp<int64_t>(c.inputs - k - half, 0, LANES));
                    store(to + half, load_part(x + k + half, part));
                }
        }
    }
};

// sums[row][0 .. 63] = ROWS rows of a tile times a panel, in order.
template <int ROWS>
void multiply_pairs(const bf16* x, const bf16* panel, int64_t inputs, float* sums) {
    constexpr int VECTORS = PANEL / LANES;
    V16 total[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) total[r][v] = zeros();
    for (int64_t k = 0; k < inputs; k += PAIRS_DEPTH, x += ROWS * PAIRS_DEPTH) {
        int pairs = int(std::min<int64_t>(PAIRS_DEPTH, inputs - k) / 2);
        for (int i = 0; i < pairs; ++i, panel += PAIR_LINE) {
            __m512bh weights[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                weights[v] = (__m512bh)_mm512_loadu_si512(panel + v * 2 * LANES);
                _mm_prefetch((const char*)(panel + PAIRS_AHEAD + v * 2 * LANES), _MM_HINT_T0);
            }
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                int32_t pair;
                std::memcpy(&pair, x + r * PAIRS_DEPTH + 2 * i, sizeof(pair));
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) total[r][v].v = _mm512_dpbf16_ps(total[r][v].v, weights[v], both);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(sums + r * PANEL + v * LANES, total[r][v]);
}

// Two products a lane and instruction. An output is summed over pairs of input features in order.
template <class X>
void linear_pairs(const Call& c) {
    PairedRows x(c);
    parallel(x.tiles, c.rows * c.inputs < SERIAL_ELEMENTS ? 1 : int(c.threads), [&](int64_t tile, int) { x.put<X>(c, tile); });
    int64_t chunks = c.packed ? std::max<int64_t>(1, (x.tiles + CHUNK_TILES - 1) / CHUNK_TILES) : 1;
    size_t panel_size = c.packed ? 0 : x.depth * PANEL, own = panel_size * sizeof(bf16) + PAIR_ROWS * PANEL * sizeof(float);
    char* memory = scratch(1).take<char>(own * c.threads);
    parallel(c.panels() * chunks, int(c.threads), [&](int64_t unit, int thread) {
        bf16* space = (bf16*)(memory + own * thread);
        float* sums = (float*)(space + panel_size);
        int64_t panel = unit / chunks, chunk = unit % chunks;
        const bf16* b = (const bf16*)c.weight + panel * c.inputs * PANEL;
        if (!c.packed) {
            pack_pairs(b, c.inputs, c.panel_outputs(panel), c.inputs, space);
            b = space;
        }
        for (int64_t tile = chunk * x.tiles / chunks; tile < (chunk + 1) * x.tiles / chunks; ++tile) {
            int64_t first = x.first(tile);
            const bf16* a = x.words + first * x.depth;
            x.of_size(tile, [&]<int ROWS>() { multiply_pairs<ROWS>(a, b, c.inputs, sums); });
            for (int64_t r = 0; r < x.size(tile); ++r) finish_row<X>(c, first + r, panel, sums + r * PANEL);
        }
    });
}

#endif

#ifdef __AMX_BF16__

constexpr int AMX_DEPTH = 32;  // input features of a tile
constexpr int AMX_CHUNK_ROWS = 128;

// sums[16][64] = 16 rows of x times a panel.
void amx_rows(const bf16* x, int64_t x_stride, const bf16* panel, int64_t depth, const bf16* end, float* sums) {
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += AMX_DEPTH) {
        const bf16* b = k + AMX_DEPTH <= depth ? panel + k * PANEL : end;
        _tile_loadd(4, x + k, x_stride * sizeof(bf16));
        _tile_loadd(5, b, PAIR_LINE * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, b + 2 * LANES, PAIR_LINE * sizeof(bf16));
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, b + 4 * LANES, PAIR_LINE * sizeof(bf16));
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, b + 6 * LANES, PAIR_LINE * sizeof(bf16));
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, sums, PANEL * sizeof(float));
    _tile_stored(1, sums + LANES, PANEL * sizeof(float));
    _tile_stored(2, sums + 2 * LANES, PANEL * sizeof(float));
    _tile_stored(3, sums + 3 * LANES, PANEL * sizeof(float));
}

// The same for 32 rows and 32 of the panel's outputs: half the loads for each product.
void amx_square(const bf16* x, int64_t x_stride, const bf16* panel, int64_t depth, const bf16* end, float* sums) {
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += AMX_DEPTH) {
        const bf16* b = k + AMX_DEPTH <= depth ? panel + k * PANEL : end;
        _tile_loadd(4, x + k, x_stride * sizeof(bf16));
        _tile_loadd(6, b, PAIR_LINE * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 2 * LANES, PAIR_LINE * sizeof(bf16));
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + AMX_ROWS * x_stride + k, x_stride * sizeof(bf16));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, PANEL * sizeof(float));
    _tile_stored(1, sums + LANES, PANEL * sizeof(float));
    _tile_stored(2, sums + AMX_ROWS * PANEL, PANEL * sizeof(float));
    _tile_stored(3, sums + AMX_ROWS * PANEL + LANES, PANEL * sizeof(float));
}

template <class X>
void linear_amx(const Call& c) {
    // Rows are copied beside each other with zeros up to whole tiles; 64 bytes more keep them off the same cache sets.
    int64_t depth = (c.inputs + AMX_DEPTH - 1) / AMX_DEPTH * AMX_DEPTH, stride = depth + AMX_DEPTH;
    int64_t tile_rows = (c.rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS;
    bf16* x = scratch(0).take<bf16>(tile_rows * stride);
    parallel(tile_rows, c.rows * c.inputs < (1 << 15) ? 1 : int(c.threads), [&](int64_t row, int) {
        bf16* to = x + row * stride;
        int64_t used = row < c.rows ? c.inputs : 0;
        const X* from = (const X*)c.x + row * c.x_stride;
        if constexpr (sizeof(X) == 2) {
            std::memcpy(to, from, used * sizeof(bf16));
        } else {
            for (int64_t k = 0; k < used; k += LANES) {
                int part = int(std::min<int64_t>(LANES, used - k));
                store_part(to + k, load_part(from + k, part), part);
            }
        }
        std::memset(to + used, 0, (depth - used) * sizeof(bf16));
    });
    int64_t chunk_rows = c.chunk_rows(AMX_CHUNK_ROWS, 2 * AMX_ROWS), chunks = (c.rows + chunk_rows - 1) / chunk_rows;
    size_t panel_size = (c.packed ? AMX_DEPTH : depth) * PANEL;
    size_t own = panel_size * sizeof(bf16) + 2 * AMX_ROWS * PANEL * sizeof(float);
    char* memory = scratch(1).take<char>(own * c.threads);
    parallel(c.panels() * chunks, int(c.threads), [&](int64_t unit, int thread) {
        bf16* space = (bf16*)(memory + own * thread);
        float* sums = (float*)(space + panel_size);
        int64_t panel = unit / chunks, first_row = unit % chunks * chunk_rows;
        int count = c.panel_outputs(panel);
        const bf16 *b, *end = space;
        if (c.packed) {
            b = (const bf16*)c.weight + panel * c.inputs * PANEL;
            int64_t whole = c.inputs / AMX_DEPTH * AMX_DEPTH, left = c.inputs - whole;
            std::memcpy(space, b + whole * PANEL, left * PANEL * sizeof(bf16));
            std::memset(space + left * PANEL, 0, (AMX_DEPTH - left) * PANEL * sizeof(bf16));
        } else {
            b = space;
            pack_pairs((const bf16*)c.weight + panel * PANEL * c.inputs, c.inputs, count, c.inputs, space);
            end = space + (depth - AMX_DEPTH) * PANEL;
        }
        Tiles tiles;
        int64_t last_row = std::min(first_row + chunk_rows, c.rows);
        for (int64_t row = first_row; row < last_row; row += 2 * AMX_ROWS) {
            int rows = int(std::min<int64_t>(2 * AMX_ROWS, last_row - row));
            const bf16* a = x + row * stride;
            if (rows <= AMX_ROWS) {
                amx_rows(a, stride, b, c.inputs, end, sums);
            } else {
                amx_square(a, stride, b, c.inputs, end, sums);
                amx_square(a, stride, b + PANEL, c.inputs, end + PANEL, sums + 2 * LANES);
            }
            for (int i = 0; i < rows; ++i) finish_row<X>(c, row + i, panel, sums + i * PANEL);
        }
    });
}

#endif

template <class X>
void linear_bf16(const Call& c) {
#ifdef __AMX_BF16__
    if (c.inputs % 2 == 0 && amx_granted()) return linear_amx<X>(c);
#endif
#ifdef __AVX512BF16__
    if constexpr (sizeof(X) == 2)  // float32 keeps its bits
        if (c.inputs % 2 == 0) return linear_pairs<X>(c);
#endif
    linear<bf16, X>(c);
}

}  // namespace

EXPORT int linear(const LinearCall* call) try {
    const Call c{*call};
    if (c.narrow) c.x_narrow ? linear_bf16<bf16>(c) : linear_bf16<float>(c);
    else c.x_narrow ? linear<float, bf16>(c) : linear<float, float>(c);
    return 0;
} catch (const std::bad_alloc&) {
    return -1;
}
