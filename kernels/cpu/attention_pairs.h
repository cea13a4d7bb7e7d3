// Blocks of attention for bfloat16 caches, two products a lane and instruction, where there are no tiles for it.
//
// Queries and weights are rounded to bfloat16. A score is summed over pairs of dimensions in order, a mixed value over
// pairs of keys in order, in float32, so that how queries are dealt out to tiles changes no bit.
#pragma once

#include "attention.h"
#include "product.h"

#ifdef __AVX512BF16__

class PairBlocks {
    static constexpr int LINE = 2 * LANES;  // dimensions of a register

  public:
    static constexpr int LEAST_ROWS = 2 * TILE_ROWS;  // rows that make a block's unpacking worth while

    static bool takes(const Call& call) { return call.narrow && call.dim % LINE == 0; }

    explicit PairBlocks(const Call& call) : c(call), width(int(call.dim)) {}

    size_t query_bytes() const { return c.tokens * c.query_heads * width * sizeof(bf16); }
    size_t worker_bytes() const { return (2 * width * BLOCK + TILE_ROWS * BLOCK) * sizeof(bf16); }
    void use(void* memory) { queries = (bf16*)memory; }
    // Takes a query, rotated and scaled.
    void put_query(int64_t index, const float* query) {
        for (int d = 0; d < width; d += LANES) store(queries + index * width + d, load(query + d));
    }
    // Mixed values lie as interleaved lines of values come out: four of every eight side by side.
    const float* in_order(const float* mixed, float* ordered) const {
        for (int d = 0; d < width; d += 4)
            std::memcpy(ordered + d, mixed + d / LINE * LINE + d / 4 % 2 * LANES + d % LINE / 8 * 4, 4 * sizeof(float));
        return ordered;
    }

    class Worker {
      public:
        Worker(const PairBlocks& blocks, void* memory, int)
            : c(blocks.c), width(blocks.width), queries(blocks.queries), keys((uint32_t*)memory),
              values(keys + width / 2 * BLOCK), weights((bf16*)(values + width / 2 * BLOCK)) {}

        // The queries of all heads attend to a block; `state` has those of one head after the other.
        void attend(const Task<bf16>& task, State state) {
            for (int i = 0; i < task.heads; ++i) {
                take(task, i);
                Rows rows = task.rows(i);
                attend(rows, state.from(i * rows.rows, width));
            }
        }

      private:
        const Call& c;
        const int width;
        const bf16* queries;
        uint32_t *keys, *values;  // pairs: of dimensions, [width / 2][BLOCK], and of keys, [BLOCK / 2][width]
        bf16* weights;            // [TILE_ROWS][BLOCK]

        // Makes a head's block the one that is attended to, and prefetches another.
        void take(const Task<bf16>& task, int index) {
            Head<bf16> head = task.head(index);
            int count = head.lines->count;
            for (int j = 0; j < BLOCK; j += LANES) {
                for (bool of_values : {false, true})
                    task.prefetch(index * BLOCK_VECTORS + j / LANES, task.heads * BLOCK_VECTORS, of_values);
                take_keys(head, j, count);
                for (int i = j; i < j + LANES; i += 2) take_values(head, i, count);
            }
        }
        // Sixteen keys from j on; behind the last it does not matter what is there, but denormals would be slow.
        void take_keys(const Head<bf16>& head, int j, int count) {
            for (int d = 0; d < width; d += LINE) {
                if (j >= count) {
                    for (int i = 0; i < LANES; ++i) _mm512_storeu_si512(keys + (d / 2 + i) * BLOCK + j, _mm512_setzero_si512());
                    continue;
                }
                const float* rows[LANES];  // a pair is moved as one float would be
                for (int i = 0; i < LANES; ++i) rows[i] = (const float*)(head.key(std::min(j + i, count - 1)) + d);
                transpose16(rows, 0, (float*)keys + d / 2 * BLOCK + j, BLOCK);
            }
        }
        void take_values(const Head<bf16>& head, int j, int count) {
            uint32_t* to = values + j / 2 * width;
            for (int d = 0; d < width; d += LINE) {
                __m512i zero = _mm512_setzero_si512();
                __m512i first = j < count ? _mm512_loadu_si512(head.value(j) + d) : zero;
                __m512i second = j + 1 < count ? _mm512_loadu_si512(head.value(j + 1) + d) : zero;
                _mm512_storeu_si512(to + d, _mm512_unpacklo_epi16(first, second));
                _mm512_storeu_si512(to + d + LANES, _mm512_unpackhi_epi16(first, second));
            }
        }

        // sums[r][i] = rows of a times a strip of lines of b, over `pairs` pairs.
        template <int ROWS, int VECTORS>
        INLINE static void product(const uint32_t* const (&a)[ROWS], const uint32_t* b, int line, int pairs,
                                   V16 (&sums)[ROWS][VECTORS]) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int i = 0; i < VECTORS; ++i) sums[r][i] = zeros();
            for (int k = 0; k < pairs; ++k, b += line) {
                __m512i strip[VECTORS];
#pragma GCC unroll 4
                for (int i = 0; i < VECTORS; ++i) strip[i] = _mm512_loadu_si512(b + i * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    __m512bh pair = (__m512bh)_mm512_set1_epi32(int(a[r][k]));
#pragma GCC unroll 4
                    for (int i = 0; i < VECTORS; ++i)
                        sums[r][i] = {_mm512_dpbf16_ps(sums[r][i].v, (__m512bh)strip[i], pair)};
                }
            }
        }

        void attend(const Rows& rows, State state) {
            int unseen = rows.unseen(c.group());
            for_tiles(rows.rows - unseen, [&]<int ROWS>(int tile) {
                attend_tile<ROWS>(rows, unseen + tile, state.from(unseen + tile, width));
            });
        }
        template <int ROWS>
        void attend_tile(const Rows& rows, int row, State state) {
            const uint32_t* lines[ROWS];
            for (int r = 0; r < ROWS; ++r) lines[r] = (const uint32_t*)(queries + (rows.query + row + r) * width);
            V16 scores[ROWS][BLOCK_VECTORS];
            product<ROWS, BLOCK_VECTORS>(lines, keys, BLOCK, width / 2, scores);
            float peaks[LANES] = {}, totals[LANES] = {}, old_scale[LANES], new_scale[LANES];
            for (int r = 0; r < ROWS; ++r) {
                peaks[r] = weigh(c, rows, row + r, scores[r]);
                for (int i = 0; i < BLOCK_VECTORS; ++i) {
                    bf16* to = weights + r * BLOCK + i * LANES;
                    store(to, scores[r][i]);
                    scores[r][i] = load(to);
                }
                totals[r] = sum(scores[r]);
                lines[r] = (const uint32_t*)(weights + r * BLOCK);
            }
            merge_peaks(peaks, totals, state, ROWS, old_scale, new_scale);
            int d = 0;
            for (; d + 2 * LINE <= width; d += 2 * LINE) mix<ROWS, 4>(lines, d, old_scale, new_scale, state.mixed);
            if (d < width) mix<ROWS, 2>(lines, d, old_scale, new_scale, state.mixed);
        }
        // Merges the weighted values of a block into `mixed`.
        template <int ROWS, int VECTORS>
        INLINE void mix(const uint32_t* const (&lines)[ROWS], int d, const float* old_scale, const float* new_scale,
                        float* mixed) {
            V16 sums[ROWS][VECTORS];
            product<ROWS, VECTORS>(lines, values + d, width, BLOCK / 2, sums);
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
    bf16* queries = nullptr;  // [queries, width]
};

#endif
