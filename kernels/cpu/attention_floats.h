// Blocks of attention in float32 vectors, for any type of cache.
//
// A score is summed over the head's dimensions in order, a mixed value over the block's keys in order, so that how
// queries are dealt out to tiles changes no bit, and AVX2 and AVX-512 give the same.
#pragma once

#include "attention.h"
#include "product.h"

template <class KV>
class FloatBlocks {
  public:
    static constexpr int LEAST_ROWS = 2 * TILE_ROWS;  // rows that make a block's unpacking worth while

    explicit FloatBlocks(const Call& call) : c(call), width(int(padded(call.dim))) {}

    size_t query_bytes() const { return c.tokens * c.query_heads * width * sizeof(float); }
    size_t worker_bytes() const {
        return (width * BLOCK * 2 + TILE_ROWS * BLOCK + BLOCK) * sizeof(float);
    }
    void use(void* memory) { queries = (float*)memory; }
    // Takes a query, rotated and scaled.
    void put_query(int64_t index, const float* query) {
        for (int d = 0; d < width; d += LANES)
            store(queries + index * width + d, load_part(query + d, std::min<int>(LANES, c.dim - d)));
    }
    const float* in_order(const float* mixed, float*) const { return mixed; }

    class Worker {
      public:
        Worker(const FloatBlocks& blocks, void* memory, int rows)
            : c(blocks.c), width(blocks.width), queries(blocks.queries), keys((float*)memory),
              values(keys + width * BLOCK), weights(values + width * BLOCK), key_scales(weights + TILE_ROWS * BLOCK),
              unpack(sizeof(KV) == 1 || rows >= UNPACK_FROM || c.dim % LANES) {}

        // The queries of all heads attend to a block; `state` has those of one head after the other.
        void attend(const Task<KV>& task, State state) {
            for (int i = 0; i < task.heads; ++i) {
                take(task, i);
                Rows rows = task.rows(i);
                attend(rows, state.from(i * rows.rows, width));
            }
        }

      private:
        static constexpr int UNPACK_FROM = 13;  // rows from which on a block's values are unpacked as well

        const Call& c;
        const int width;
        const float* queries;
        float *keys, *values, *weights, *key_scales;
        bool unpack;
        Head<KV> block{};
        int count = 0;

        // Makes a head's block the one that is attended to, and prefetches another.
        void take(const Task<KV>& task, int head) {
            block = task.head(head);
            count = block.lines->count;
            transpose_keys(task, head);
            if constexpr (sizeof(KV) == 1)
                for (int i = 0; i < BLOCK; ++i) key_scales[i] = i < count ? block.key_scale(i) : 0.0f;
            if (unpack) unpack_values();
        }

        void attend(const Rows& rows, State state) {
            int unseen = rows.unseen(c.group());
            for_tiles(rows.rows - unseen, [&]<int ROWS>(int tile) {
                int row = unseen + tile;
                float old_scale[LANES], new_scale[LANES];
                State of_tile = state.from(row, width);
                score<ROWS>(rows, row, of_tile, old_scale, new_scale);
                if (unpack)
                    mix<ROWS>([&](int j) { return values + j * width; }, old_scale, new_scale, of_tile.mixed);
                else
                    mix<ROWS>([&](int j) { return block.value(j); }, old_scale, new_scale, of_tile.mixed);
            });
        }

        // keys[d][j] = key j. From `count` on it does not matter what is there, for such scores are masked, but
        // what lay in the memory before might be denormal, and slow.
        void transpose_keys(const Task<KV>& task, int head) {
            for (int j = int(padded(count)); j < BLOCK; j += LANES)
                for (int d = 0; d < c.dim; ++d) store(keys + d * BLOCK + j, zeros());
            for (int j = 0; j < BLOCK; j += LANES) {
                for (bool values : {false, true})
                    task.prefetch(head * BLOCK_VECTORS + j / LANES, task.heads * BLOCK_VECTORS, values);
                if (j >= count) continue;
                const KV* rows[LANES];
                for (int i = 0; i < LANES; ++i) rows[i] = block.key(std::min(j + i, count - 1));
                int d = 0;
                for (; d + LANES <= c.dim; d += LANES) transpose16(rows, d, keys + d * BLOCK + j, BLOCK);
                if (d == c.dim) continue;
                KV ends[LANES][LANES] = {};
                for (int i = 0; i < LANES; ++i) {
                    std::memcpy(ends[i], rows[i] + d, (c.dim - d) * sizeof(KV));
                    rows[i] = ends[i];
                }
                transpose16(rows, 0, keys + d * BLOCK + j, BLOCK);
            }
        }

        void unpack_values() {
            for (int j = 0; j < count; ++j) {
                const KV* line = block.value(j);
                V16 scale = broadcast(1.0f);
                if constexpr (sizeof(KV) == 1) scale = broadcast(block.value_scale(j));
                for (int d = 0; d < width; d += LANES) {
                    V16 part = load_part(line + d, std::min<int>(LANES, c.dim - d));
                    store(values + j * width + d, sizeof(KV) == 1 ? part * scale : part);
                }
            }
        }

        template <int ROWS>
        void score(const Rows& rows, int row, State state, float* old_scale, float* new_scale) {
            constexpr int VECTORS = TILE_VECTORS<ROWS>;
            const float* q[ROWS];
            for (int r = 0; r < ROWS; ++r) q[r] = queries + (rows.query + row + r) * width;
            for (int j = 0; j < BLOCK; j += VECTORS * LANES) {
                V16 sums[ROWS][VECTORS];
                product<ROWS, VECTORS>(q, [&](int d) { return keys + d * BLOCK + j; }, int(c.dim), sums);
                for (int r = 0; r < ROWS; ++r)
                    for (int i = 0; i < VECTORS; ++i) store(weights + r * BLOCK + j + i * LANES, sums[r][i]);
            }
            float peaks[LANES] = {}, totals[LANES] = {};
            for (int r = 0; r < ROWS; ++r) {
                V16 s[BLOCK_VECTORS];
                for (int i = 0; i < BLOCK_VECTORS; ++i) {
                    s[i] = load(weights + r * BLOCK + i * LANES);
                    if constexpr (sizeof(KV) == 1) s[i] = s[i] * load(key_scales + i * LANES);
                }
                peaks[r] = weigh(c, rows, row + r, s);
                totals[r] = sum(s);
                for (int i = 0; i < BLOCK_VECTORS; ++i) store(weights + r * BLOCK + i * LANES, s[i]);
            }
            merge_peaks(peaks, totals, state, ROWS, old_scale, new_scale);
        }

        // Merges the weighted values of a block into `mixed`.
        template <int ROWS, class Values>
        void mix(Values line, const float* old_scale, const float* new_scale, float* mixed) {
            constexpr int MOST = TILE_VECTORS<ROWS>;
            int d = 0;
            for (; d + MOST * LANES <= width; d += MOST * LANES)
                mix_strip<ROWS, MOST>(line, d, old_scale, new_scale, mixed);
            if constexpr (MOST > 1)
                for (; d < width; d += LANES) mix_strip<ROWS, 1>(line, d, old_scale, new_scale, mixed);
        }
        template <int ROWS, int VECTORS, class Values>
        INLINE void mix_strip(Values line, int d, const float* old_scale, const float* new_scale, float* mixed) {
            const float* rows[ROWS];
            for (int r = 0; r < ROWS; ++r) rows[r] = weights + r * BLOCK;
            V16 sums[ROWS][VECTORS];
            product<ROWS, VECTORS>(rows, [&](int j) { return line(j) + d; }, count, sums);
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < VECTORS; ++i) {
                    float* at = mixed + r * width + d + i * LANES;
                    store(at, fma(load(at), broadcast(old_scale[r]), sums[r][i] * broadcast(new_scale[r])));
                }
        }
    };

    const Call& c;
    const int width;  // floats of a query's mixed values

  private:
    float* queries = nullptr;  // [queries, width]
};
