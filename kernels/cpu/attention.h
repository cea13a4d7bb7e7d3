// What the forms of attention share: the call, blocks of keys, and the state of a query.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

constexpr int BLOCK = 64;  // keys of a block
constexpr int BLOCK_VECTORS = BLOCK / LANES;

constexpr float SMALLEST = 1e-30f;  // vectors with nothing above it are stored as zeros in int8

enum CacheType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// Nothing in it changes between steps with the same numbers of rows and tokens and the same buffers: what a step's
// rows are is read from row_offsets, row_starts, row_slots and page_table.
struct Call {
    const void *q, *k, *v;
    void *out, *cache;
    float* scales;  // of int8 vectors
    const float *cos, *sin;
    const int32_t *row_offsets, *row_starts, *row_slots, *page_table;
    int64_t q_stride, k_stride, v_stride;              // elements from token to token
    int64_t page_stride, value_stride;                 // elements from page to page, from a page's keys to its values
    int64_t scale_page_stride, scale_value_stride;     // the same for scales
    int64_t table_stride;                              // elements from line to line of the page table
    int64_t rows, tokens, query_heads, kv_heads, dim, rotated, page_size, pages;
    int64_t window;  // 0: all keys
    int64_t threads;
    int64_t narrow;  // whether activations are bfloat16, not float32
    int64_t cache_type;
    float scale;

    int group() const { return int(query_heads / kv_heads); }
    int first_key(int64_t position) const { return window ? int(std::max<int64_t>(0, position - window + 1)) : 0; }
};

// Largest score, sum of weights and weighted sum of values of each of some queries.
struct State {
    float *peak, *total, *mixed;

    void clear(int rows, int width) {
        std::fill_n(peak, rows, -INFINITE);
        std::fill_n(total, rows, 0.0f);
        std::fill_n(mixed, int64_t(rows) * width, 0.0f);
    }
    State from(int64_t row, int width) const { return {peak + row, total + row, mixed + row * width}; }
};

INLINE float largest_size(const float* x, int count) {
    V16 most = zeros();
    for (int i = 0; i < count; i += LANES) {
        V16 part = load_part(x + i, std::min(LANES, count - i));
        most = max(most, max(part, zeros() - part));
    }
    return largest(most);
}

// Where the keys of a block, those of head 0, lie in the cache; their values lie value_stride on.
template <class KV>
struct Lines {
    int count = 0;
    const KV* keys[BLOCK];
    const float* scales[BLOCK];
};

// A block's keys and values of one head.
template <class KV>
struct Head {
    const Call* call;
    const Lines<KV>* lines;
    int head;

    const KV* key(int i) const { return lines->keys[i] + head * call->dim; }
    const KV* value(int i) const { return key(i) + call->value_stride; }
    float key_scale(int i) const { return lines->scales[i][head]; }
    float value_scale(int i) const { return lines->scales[i][head + call->scale_value_stride]; }
};

// Queries that attend to a block: `rows` of one key head, the query heads of a token side by side.
struct Rows {
    int64_t query;       // number of the first among all of the step, as `put_query` got it
    int rows, position;  // position: of the first
    int start;           // position of the block's first key

    // The first that sees any of the block.
    int unseen(int group) const { return std::max(0, start - position) * group; }
};

// Some heads of a block, the queries that attend to them, and the block that comes next, if one does.
template <class KV>
struct Task {
    const Call* call;
    const Lines<KV> *lines, *next_lines;
    int first_head, heads;
    Rows first_rows;  // queries of the first head; those of the others lie query_step apart
    int64_t query_step;

    Head<KV> head(int i) const { return {call, lines, first_head + i}; }
    Rows rows(int i) const {
        Rows rows = first_rows;
        rows.query += i * query_step;
        return rows;
    }

    // Fetches one of `parts` parts of the next block's keys, or of its values, into the second level of cache (a block
    // of all heads would fill the first). All heads together, for their lines follow each other in memory, and the
    // processor goes on fetching ahead in a run.
    INLINE void prefetch(int part, int parts, bool values) const {
        if (next_lines) fetch(*next_lines, part, parts, values);
    }
    // Inline, or GCC takes it for a function without effects and drops the call.
    INLINE void fetch(const Lines<KV>& from, int part, int parts, bool values) const {
        int64_t offset = first_head * call->dim + (values ? call->value_stride : 0);
        int64_t scale_offset = first_head + (values ? call->scale_value_stride : 0);
        int end = std::min(from.count, BLOCK * (part + 1) / parts);
        for (int i = BLOCK * part / parts; i < end; ++i) {
            for (int64_t at = 0; at < heads * call->dim; at += 64 / sizeof(KV))
                __builtin_prefetch(from.keys[i] + offset + at, 0, 2);
            if constexpr (sizeof(KV) == 1) __builtin_prefetch(from.scales[i] + scale_offset, 0, 2);
        }
    }
};

// Scores, in place, become weights e**(score - peak) of the keys that row `row` sees; returns the peak.
INLINE float weigh(const Call& c, const Rows& rows, int row, V16 (&s)[BLOCK_VECTORS]) {
    int position = rows.position + row / c.group();
    int first = c.first_key(position) - rows.start, end = position + 1 - rows.start;
    if (first > 0 || end < BLOCK)
        for (int i = 0; i < BLOCK_VECTORS; ++i)
            s[i] = lanes_or(s[i], first - i * LANES, end - i * LANES, broadcast(-INFINITE));
    float largest_score = largest(max(max(s[0], s[1]), max(s[2], s[3])));
    V16 peak = broadcast(largest_score == -INFINITE ? 0.0f : largest_score);
    for (int i = 0; i < BLOCK_VECTORS; ++i) s[i] = exp(s[i] - peak);
    return largest_score;
}
INLINE float sum(const V16 (&s)[BLOCK_VECTORS]) { return sum((s[0] + s[1]) + (s[2] + s[3])); }

// The factors for two states with these peaks; writes the greater peaks.
INLINE void merge_scales(V16 a, V16 b, float* peak, float* a_scale, float* b_scale, int rows) {
    V16 greater = max(a, b);
    V16 shift = max(greater, broadcast(std::numeric_limits<float>::lowest()));  // both may be -inf
    store(a_scale, exp(a - shift));
    store(b_scale, exp(b - shift));
    store_part(peak, greater, rows);
}

// Merges peaks and totals of a block into the state of up to 16 rows, and returns the factors that the state's and
// the block's mixed values are to be merged with.
INLINE void merge_peaks(const float* peaks, const float* totals, State state, int rows, float* old_scale,
                        float* new_scale) {
    merge_scales(load_part(state.peak, rows), load(peaks), state.peak, old_scale, new_scale, rows);
    V16 total = fma(load_part(state.total, rows), load(old_scale), load(totals) * load(new_scale));
    store_part(state.total, total, rows);
}
