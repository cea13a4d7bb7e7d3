// Blocks of attention in matrix registers, for bfloat16 and int8 caches.
//
// bfloat16: queries and weights are rounded to it; a product is summed in float32 in the order of the instruction.
// int8: a query is split into two digits of base 128 under one scale, and so are the weights of a block, already
// times the scales of the values, so that products of integers are exact. Either way a query's result depends neither
// on the tile it is in nor on the line there.
#pragma once

#include "amx.h"
#include "attention.h"
#include "product.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

// bfloat16 numbers as float32.
INLINE V16 round_to_bf16(V16 a) {
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))))};
}

// Whole numbers up to LARGEST as 128 * high + low.
constexpr float LARGEST = 127 * 128;
INLINE void store_digits(V16 numbers, int8_t* high, int8_t* low) {
    __m512i n = _mm512_cvtps_epi32(numbers.v);
    __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(64)), 7);
    _mm_storeu_si128((__m128i*)high, _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128((__m128i*)low, _mm512_cvtepi32_epi8(_mm512_sub_epi32(n, _mm512_slli_epi32(upper, 7))));
}
INLINE V16 from_digits(const int32_t* high, const int32_t* low) {
    __m512i n = _mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(high), 7), _mm512_loadu_si512(low));
    return {_mm512_cvtepi32_ps(n)};
}

template <class KV>
class TileBlocks {
    static constexpr int ROW_BYTES = 64;                     // of a tile
    static constexpr bool WHOLE = sizeof(KV) == 1;           // integers
    static constexpr int DIGITS = WHOLE ? 2 : 1;             // lines of a tile for a query
    static constexpr int QUERIES = AMX_ROWS / DIGITS;      // queries of a tile
    static constexpr int LINE = ROW_BYTES / sizeof(KV);  // elements of a tile's line
    static constexpr int GROUPED = 4 / sizeof(KV);           // elements of a factor that lie side by side
    static constexpr int KEY_LINES = BLOCK / LINE;           // lines of a block's weights
    static constexpr int TILE = AMX_ROWS * LANES;          // four-byte items of a tile
    static constexpr int SLOTS = 4;                          // tiles of queries that go through the stages together

  public:
    static constexpr int LEAST_ROWS = 3 * AMX_ROWS;
    static constexpr int MOST_DIM = 512;  // sums of digits stay below 2**31

    explicit TileBlocks(const Call& call) : c(call), width(int((call.dim + LINE - 1) / LINE * LINE)) {}

    size_t query_bytes() const {
        // A tile that begins at the last query ends behind it.
        return scales_offset() + c.tokens * c.query_heads * sizeof(float);
    }
    size_t worker_bytes() const {
        return 4 * BLOCK * width * sizeof(KV) + SLOTS * AMX_ROWS * (2 * BLOCK + width) * sizeof(float);
    }
    void use(void* memory) {
        queries = (KV*)memory;
        query_scales = (float*)((char*)memory + scales_offset());
    }
    void put_query(int64_t index, const float* query) {
        KV* to = queries + index * DIGITS * width;
        V16 scale = zeros();
        if constexpr (WHOLE) {
            float most = largest_size(query, int(c.dim));
            query_scales[index] = most / LARGEST;
            scale = broadcast(most >= SMALLEST ? LARGEST / most : 0.0f);
        }
        for (int d = 0; d < width; d += LANES) {
            V16 part = load_part(query + d, std::clamp<int>(int(c.dim) - d, 0, LANES));
            if constexpr (WHOLE) store_digits(part * scale, to + d, to + width + d);
            else store(to + d, part);
        }
    }
    // Mixed values lie as interleaved lines of values come out: four of every 4 * GROUPED side by side.
    const float* in_order(const float* mixed, float* ordered) const {
        for (int d = 0; d < width; d += 4) {
            int line = d / LINE * LINE, in_line = d % LINE;
            int part = in_line / 4 % GROUPED, lane = in_line / (4 * GROUPED);
            std::memcpy(ordered + d, mixed + line + part * LANES + lane * 4, 4 * sizeof(float));
        }
        return ordered;
    }

    class Worker {
      public:
        Worker(const TileBlocks& blocks, void* memory, int rows)
            : c(blocks.c), width(blocks.width), queries(blocks.queries), query_scales(blocks.query_scales),
              packed(BLOCK * width / GROUPED), keys((int32_t*)memory), values(keys + 2 * packed),
              tiles(ROW_BYTES, AMX_ROWS, std::min(AMX_ROWS, rows * DIGITS)) {
            int32_t* space = values + 2 * packed;
            for (Slot& slot : slots) {
                slot.sums = space;
                slot.weights = (KV*)(space + AMX_ROWS * BLOCK);
                slot.mixes = space + 2 * AMX_ROWS * BLOCK;
                space += AMX_ROWS * (2 * BLOCK + width);
            }
        }

        // The queries of all heads attend to a block; `state` has those of one head after the other. Several tiles of
        // queries go through each stage together, so that none waits for the instructions before it.
        void attend(const Task<KV>& task, State state) {
            int rows = task.first_rows.rows, unseen = task.first_rows.unseen(c.group());
            if (rows <= QUERIES) {
                for (int first = 0; first < task.heads; first += SLOTS) {
                    int count = std::min(SLOTS, task.heads - first);
                    for (int i = 0; i < count; ++i)
                        slots[i].set(task.rows(first + i), unseen, rows - unseen,
                                     state.from((first + i) * rows + unseen, width), i);
                    stages(
                        count, [&](int i) { take_keys(task, first + i, i); },
                        [&](int i) { take_values(task, first + i, i); });
                }
                return;
            }
            for (int head = 0; head < task.heads; ++head) {
                take_keys(task, head, 0);
                take_values(task, head, 0);
                for (int row = unseen; row < rows;) {
                    int count = 0;
                    for (; count < SLOTS && row < rows; ++count, row += QUERIES)
                        slots[count].set(task.rows(head), row, std::min(QUERIES, rows - row),
                                         state.from(head * rows + row, width), 0);
                    stages(count, [](int) {}, [](int) {});
                }
            }
        }

      private:
        // A tile of queries on its way.
        struct Slot {
            Rows rows;
            int row, count;  // the tile's first query among the rows, and their number
            State state;     // of that query
            int head;        // its place among the heads that are unpacked
            alignas(64) float peaks[LANES], totals[LANES], weight_scales[LANES];
            int32_t* sums;  // [AMX_ROWS][BLOCK]
            KV* weights;    // [AMX_ROWS][BLOCK]
            int32_t* mixes; // [AMX_ROWS][width]

            void set(const Rows& rows_, int row_, int count_, State state_, int head_) {
                rows = rows_, row = row_, count = count_, state = state_, head = head_;
            }
        };

        template <class Keys, class Values>
        INLINE void stages(int count, Keys before_scores, Values before_mixes) {
            // One ahead, for tiles are not loaded before what was stored there has left the store buffer.
            before_scores(0);
            for (int i = 0; i < count; ++i) {
                if (i + 1 < count) before_scores(i + 1);
                score(slots[i]);
            }
            for (int i = 0; i < count; ++i) weigh_rows(slots[i]);
            before_mixes(0);
            for (int i = 0; i < count; ++i) {
                if (i + 1 < count) before_mixes(i + 1);
                mix(slots[i]);
            }
            for (int i = 0; i < count; ++i) merge(slots[i]);
        }

        void take_keys(const Task<KV>& task, int index, int place) {
            Head<KV> head = task.head(index);
            int count = head.lines->count;
            for (int j = 0; j < BLOCK; j += LANES) {
                task.prefetch(index * BLOCK_VECTORS + j / LANES, task.heads * BLOCK_VECTORS, false);
                pack_keys(head, j, count, keys + place % 2 * packed);
            }
            if constexpr (WHOLE)
                for (int i = 0; i < BLOCK; ++i) {
                    key_scales[place][i] = i < count ? head.key_scale(i) : 0.0f;
                    value_scales[place][i] = i < count ? head.value_scale(i) : 0.0f;
                }
        }
        void take_values(const Task<KV>& task, int index, int place) {
            Head<KV> head = task.head(index);
            int count = head.lines->count;
            for (int j = 0; j < BLOCK; j += LANES) {
                task.prefetch(index * BLOCK_VECTORS + j / LANES, task.heads * BLOCK_VECTORS, true);
                for (int i = j; i < j + LANES; i += GROUPED) interleave_values(head, i, count, values + place % 2 * packed);
            }
        }
        void weigh_rows(Slot& slot) {
            std::fill_n(slot.peaks, LANES, 0.0f);
            std::fill_n(slot.totals, LANES, 0.0f);
            for (int r = 0; r < slot.count; ++r) {
                V16 s[BLOCK_VECTORS];
                load_scores(slot, r, s);
                slot.peaks[r] = weigh(c, slot.rows, slot.row + r, s);
                slot.weight_scales[r] = store_weights(slot, r, s);
                slot.totals[r] = sum(s);
            }
        }

        void merge(Slot& slot) {
            float old_scale[LANES], new_scale[LANES];
            merge_peaks(slot.peaks, slot.totals, slot.state, slot.count, old_scale, new_scale);
            for (int r = 0; r < slot.count; ++r) {
                V16 before = broadcast(old_scale[r]), factor = broadcast(new_scale[r]);
                V16 weight_scale = broadcast(slot.weight_scales[r]);
                const int32_t* from = slot.mixes + r * DIGITS * width;
                float* to = slot.state.mixed + r * width;
                for (int d = 0; d < width; d += LANES) {
                    V16 values = load((const float*)from + d);
                    if constexpr (WHOLE) values = from_digits(from + d, from + width + d) * weight_scale;
                    store(to + d, fma(load(to + d), before, values * factor));
                }
            }
        }

        const Call& c;
        const int width;
        const KV* queries;
        const float* query_scales;
        const int packed;  // items of a block's keys
        // Of two heads each:
        int32_t* keys;    // [width / LINE][BLOCK / 16] tiles: lines of GROUPED dimensions, columns of keys
        int32_t* values;  // [KEY_LINES][width / 16] tiles: lines of GROUPED keys, columns of dimensions
        float key_scales[SLOTS][BLOCK], value_scales[SLOTS][BLOCK];
        Slot slots[SLOTS];
        Tiles tiles;

        // Four bytes of a key are moved as a float would be.
        void pack_keys(Head<KV> head, int j, int count, int32_t* packed_keys) {
            alignas(64) static const KV nothing[LINE] = {};
            for (int line = 0; line < width / LINE; ++line) {
                const float* rows[LANES];
                KV ends[LANES][LINE];
                int left = std::min<int>(LINE, int(c.dim) - line * LINE);
                if (left < LINE) std::memset(ends, 0, sizeof(ends));
                for (int i = 0; i < LANES; ++i) {
                    rows[i] = (const float*)nothing;
                    if (j + i >= count) continue;
                    rows[i] = (const float*)(head.key(j + i) + line * LINE);
                    if (left < LINE) rows[i] = (const float*)std::memcpy(ends[i], rows[i], left * sizeof(KV));
                }
                int32_t* tile = packed_keys + (line * BLOCK_VECTORS + j / LANES) * TILE;
                transpose16(rows, 0, (float*)tile, LANES);
            }
        }

        __m512i load_line(const KV* line, int left) const {
            if constexpr (WHOLE) {
                return left >= LINE ? _mm512_loadu_si512(line) : _mm512_maskz_loadu_epi8((1ull << left) - 1, line);
            } else {
                return left >= LINE ? _mm512_loadu_si512(line) : _mm512_maskz_loadu_epi16((1u << left) - 1, line);
            }
        }

        // Puts the values of GROUPED keys from j on side by side; zeros from `count` on.
        void interleave_values(Head<KV> head, int j, int count, int32_t* packed_values) {
            int32_t* to = packed_values + (j / LINE * (width / LANES)) * TILE + j % LINE / GROUPED * LANES;
            for (int at = 0; at < width; at += LINE, to += GROUPED * TILE) {
                __m512i v[GROUPED];
                for (int i = 0; i < GROUPED; ++i)
                    v[i] = j + i < count ? load_line(head.value(j + i) + at, int(c.dim) - at) : _mm512_setzero_si512();
                if constexpr (WHOLE) {
                    __m512i low[2] = {_mm512_unpacklo_epi8(v[0], v[1]), _mm512_unpacklo_epi8(v[2], v[3])};
                    __m512i high[2] = {_mm512_unpackhi_epi8(v[0], v[1]), _mm512_unpackhi_epi8(v[2], v[3])};
                    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(low[0], low[1]));
                    _mm512_storeu_si512(to + TILE, _mm512_unpackhi_epi16(low[0], low[1]));
                    _mm512_storeu_si512(to + 2 * TILE, _mm512_unpacklo_epi16(high[0], high[1]));
                    _mm512_storeu_si512(to + 3 * TILE, _mm512_unpackhi_epi16(high[0], high[1]));
                } else {
                    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(v[0], v[1]));
                    _mm512_storeu_si512(to + TILE, _mm512_unpackhi_epi16(v[0], v[1]));
                }
            }
        }

// A macro, for the instructions take the numbers of registers.
#define TIMES(to, left, right)                          \
    do {                                                \
        if constexpr (WHOLE) _tile_dpbssd(to, left, right); \
        else _tile_dpbf16ps(to, left, right);           \
    } while (0)

        // sums = the slot's queries times the block's keys.
        void score(const Slot& slot) {
            written();
            const KV* q = queries + (slot.rows.query + slot.row) * DIGITS * width;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int line = 0; line < width / LINE; ++line) {
                const int32_t* tile = keys + slot.head % 2 * packed + line * BLOCK_VECTORS * TILE;
                _tile_loadd(4, q + line * LINE, width * sizeof(KV));
                _tile_loadd(6, tile, ROW_BYTES);
                TIMES(0, 4, 6);
                _tile_loadd(7, tile + TILE, ROW_BYTES);
                TIMES(1, 4, 7);
                _tile_loadd(6, tile + 2 * TILE, ROW_BYTES);
                TIMES(2, 4, 6);
                _tile_loadd(7, tile + 3 * TILE, ROW_BYTES);
                TIMES(3, 4, 7);
            }
            _tile_stored(0, slot.sums, BLOCK * sizeof(float));
            _tile_stored(1, slot.sums + LANES, BLOCK * sizeof(float));
            _tile_stored(2, slot.sums + 2 * LANES, BLOCK * sizeof(float));
            _tile_stored(3, slot.sums + 3 * LANES, BLOCK * sizeof(float));
        }

        // mixes = the slot's weights times the block's values.
        void mix(const Slot& slot) {
            written();
            int vectors = width / LANES;
            for (int at = 0; at < vectors; at += 2) {
                _tile_zero(0);
                _tile_zero(1);
                for (int line = 0; line < KEY_LINES; ++line) {
                    const int32_t* tile = values + slot.head % 2 * packed + (line * vectors + at) * TILE;
                    _tile_loadd(4, slot.weights + line * LINE, BLOCK * sizeof(KV));
                    _tile_loadd(6, tile, ROW_BYTES);
                    TIMES(0, 4, 6);
                    _tile_loadd(7, tile + TILE, ROW_BYTES);
                    TIMES(1, 4, 7);
                }
                _tile_stored(0, slot.mixes + at * LANES, width * sizeof(float));
                _tile_stored(1, slot.mixes + (at + 1) * LANES, width * sizeof(float));
            }
        }
#undef TIMES

        INLINE void load_scores(const Slot& slot, int r, V16 (&s)[BLOCK_VECTORS]) {
            const int32_t* from = slot.sums + r * DIGITS * BLOCK;
            for (int i = 0; i < BLOCK_VECTORS; ++i) {
                if constexpr (WHOLE)
                    s[i] = from_digits(from + i * LANES, from + BLOCK + i * LANES) *
                           (load(key_scales[slot.head] + i * LANES) *
                            broadcast(query_scales[slot.rows.query + slot.row + r]));
                else
                    s[i] = load((const float*)from + i * LANES);
            }
        }

        // Stores a query's weights as the left factor; s becomes what is to be summed. Returns the weights' scale.
        INLINE float store_weights(const Slot& slot, int r, V16 (&s)[BLOCK_VECTORS]) {
            KV* to = slot.weights + r * DIGITS * BLOCK;
            if constexpr (WHOLE) {
                V16 w[BLOCK_VECTORS];
                for (int i = 0; i < BLOCK_VECTORS; ++i) w[i] = s[i] * load(value_scales[slot.head] + i * LANES);
                float most = largest(max(max(w[0], w[1]), max(w[2], w[3])));
                V16 scale = broadcast(most >= SMALLEST ? LARGEST / most : 0.0f);
                for (int i = 0; i < BLOCK_VECTORS; ++i)
                    store_digits(w[i] * scale, to + i * LANES, to + BLOCK + i * LANES);
                return most / LARGEST;
            } else {
                for (int i = 0; i < BLOCK_VECTORS; ++i) {
                    s[i] = round_to_bf16(s[i]);
                    __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(s[i].v), 16);
                    _mm256_storeu_si256((__m256i*)(to + i * LANES), _mm512_cvtepi32_epi16(bits));
                }
                return 1.0f;
            }
        }
    };

    const Call& c;
    const int width;

  private:
    KV* queries = nullptr;  // [queries, DIGITS, width]
    float* query_scales = nullptr;

    size_t scales_offset() const {
        return padded(((c.tokens * c.query_heads) * DIGITS + AMX_ROWS) * width * sizeof(KV));
    }
};

#endif
