// Rotary embedding, the write into the paged cache, and causal attention over it, in one call.
//
// Keys are taken in blocks of 64 at fixed absolute positions. A block gives each query its own maximum, sum and mixed
// values (a state), and the blocks of a query are merged in order of position. A score is summed over the head's
// dimensions in order, a mixed value over the block's keys in order. So the arithmetic of a query depends on its
// position and its keys alone, and how queries and blocks are dealt out to tiles and threads changes no bit.

#include <algorithm>
#include <cmath>
#include <vector>

#include "product.h"
#include "threads.h"

namespace {

constexpr int BLOCK = 64;
constexpr int BLOCK_VECTORS = BLOCK / LANES;
constexpr int UNIT_ROWS = 192;    // queries times heads that share a block's unpacking
constexpr int UNPACK_FROM = 13;   // from so many on, a block's values are unpacked as well
constexpr int SPLIT_ROWS = 24;    // up to so many, the blocks of a unit may go to several threads
constexpr int UNITS_A_THREAD = 4; // so that threads end together

struct Call {
    const void *q, *k, *v;
    void *out, *cache;
    const float *cos, *sin;
    const int32_t *row_offsets, *row_starts, *row_slots, *page_table;
    int64_t q_stride, k_stride, v_stride;  // elements from token to token
    int64_t page_stride, value_stride;     // elements from page to page, from a page's keys to its values
    int64_t table_stride;                  // elements from line to line of the page table
    int64_t rows, tokens, query_heads, kv_heads, dim, rotated, page_size, pages;
    int64_t window;  // 0: all keys
    int64_t threads;
    int64_t narrow, narrow_cache;  // whether activations and the cache are bfloat16, not float32
    float scale;
};

// Some queries of a row, the query heads of one key head, and a range of key blocks.
struct Unit {
    int row, head, first, count;  // `first` counts from the row's first new token
    int first_block, end_block;
    int64_t partial;  // index of the state of its first block and row among the partial states, or -1: no other unit
                      // has blocks of these queries
    int64_t cost() const { return int64_t(count) * (end_block - first_block); }
};


// Largest score, sum of weights and weighted sum of values of each of some queries; `acc` has `width` floats a query.
struct State {
    float *peak, *total, *mixed;

    void clear(int rows, int width) {
        std::fill_n(peak, rows, -INFINITE);
        std::fill_n(total, rows, 0.0f);
        std::fill_n(mixed, int64_t(rows) * width, 0.0f);
    }
};

Scratch& scratch(int which) {
    thread_local Scratch memory[3];
    return memory[which];
}

template <class KV>
class Attention {
  public:
    explicit Attention(const Call& call)
        : c(call), group(int(call.query_heads / call.kv_heads)), width(int(padded(call.dim))),
          most_rows(std::max(UNIT_ROWS, group)) {}

    int run() {
        make_units();
        queries = scratch(0).take<float>(c.tokens * c.query_heads * width);
        size_t own = padded(width * BLOCK * 2 + TILE_ROWS * BLOCK + most_rows * (width + 2));
        float* memory = scratch(1).take<float>(own * threads + partial_states * (width + 2));
        partials.peak = memory + own * threads;
        partials.total = partials.peak + partial_states;
        partials.mixed = partials.total + partial_states;

        parallel((c.tokens + 7) / 8, threads, [&](int64_t i, int) {
            for (int64_t token = i * 8; token < std::min(i * 8 + 8, c.tokens); ++token)
                c.narrow ? prepare<bf16>(token) : prepare<float>(token);
        });
        parallel(units.size(), threads, [&](int64_t i, int thread) { work(units[i], memory + own * thread); });
        parallel(splits.size(), threads, [&](int64_t i, int) { merge(splits[i]); });
        return bad_page ? -2 : 0;
    }

  private:
    const Call& c;
    const int group, width, most_rows;
    int threads = 1;
    std::vector<Unit> units, splits;
    int64_t partial_states = 0;
    State partials{};
    float* queries = nullptr;  // [tokens, query heads, width], rotated and scaled
    std::atomic<bool> bad_page{false};

    int first_key(int64_t position) const { return c.window ? int(std::max<int64_t>(0, position - c.window + 1)) : 0; }

    // Calls f(index, line) with the cached keys of positions start .. end - 1, one key head's; values lie
    // value_stride on.
    template <class F>
    void for_lines(int row, int head, int64_t start, int64_t end, F f) {
        const int32_t* table = c.page_table + c.row_slots[row] * c.table_stride;
        int64_t page = start / c.page_size, slot = start % c.page_size, step = c.kv_heads * c.dim;
        for (int64_t i = 0; i < end - start; ++page, slot = 0) {
            int64_t id = table[page];
            if (id < 0 || id >= c.pages) {
                bad_page = true;
                id = 0;
            }
            KV* line = (KV*)c.cache + id * c.page_stride + slot * step + head * c.dim;
            for (; slot < c.page_size && i < end - start; ++slot, ++i, line += step) f(int(i), line);
        }
    }

    // Rotates one head from `from` and stores it times `scale`.
    template <class Act, class To>
    void rotate(const Act* from, To* to, const float* cos, const float* sin, float scale) {
        int half = int(c.rotated / 2);
        V16 factor = broadcast(scale);
        for (int i = 0; i < half; i += LANES) {
            int count = std::min(LANES, half - i);
            V16 a = load_part(from + i, count), b = load_part(from + half + i, count);
            V16 x = load_part(cos + i, count), y = load_part(sin + i, count);
            store_part(to + i, (a * x - b * y) * factor, count);
            store_part(to + half + i, (b * x + a * y) * factor, count);
        }
        copy(from + c.rotated, to + c.rotated, int(c.dim - c.rotated), scale);
    }
    template <class Act, class To>
    void copy(const Act* from, To* to, int count, float scale) {
        for (int i = 0; i < count; i += LANES) {
            int part = std::min(LANES, count - i);
            store_part(to + i, load_part(from + i, part) * broadcast(scale), part);
        }
    }

    // Rotates a token's queries into `queries` and writes its keys and values into the cache.
    template <class Act>
    void prepare(int64_t token) {
        int row = int(std::upper_bound(c.row_offsets, c.row_offsets + c.rows + 1, token) - c.row_offsets) - 1;
        int64_t position = c.row_starts[row] + token - c.row_offsets[row];
        const float *cos = c.cos + position * (c.rotated / 2), *sin = c.sin + position * (c.rotated / 2);
        const Act *q = (const Act*)c.q + token * c.q_stride, *k = (const Act*)c.k + token * c.k_stride;
        const Act* v = (const Act*)c.v + token * c.v_stride;
        for (int h = 0; h < c.query_heads; ++h)
            rotate(q + h * c.dim, queries + (token * c.query_heads + h) * width, cos, sin, c.scale);
        for_lines(row, 0, position, position + 1, [&](int, KV* line) {
            for (int h = 0; h < c.kv_heads; ++h, line += c.dim) {
                rotate(k + h * c.dim, line, cos, sin, 1.0f);
                copy(v + h * c.dim, line + c.value_stride, int(c.dim), 1.0f);
            }
        });
    }

    void make_units() {
        int64_t most = std::max<int64_t>(1, UNIT_ROWS / group), least = (2 * TILE_ROWS + group - 1) / group;
        int64_t wanted = UNITS_A_THREAD * c.threads;
        int64_t queries_a_unit = std::clamp((c.tokens * c.kv_heads + wanted - 1) / wanted, std::min(least, most), most);
        int64_t cost = 0;
        for (int row = 0; row < c.rows; ++row) {
            int new_tokens = c.row_offsets[row + 1] - c.row_offsets[row];
            for (int first = 0; first < new_tokens; first += queries_a_unit) {
                int count = int(std::min<int64_t>(queries_a_unit, new_tokens - first));
                int start = c.row_starts[row] + first;
                Unit unit{row, 0, first, count, first_key(start) / BLOCK, (start + count - 1) / BLOCK + 1, -1};
                for (unit.head = 0; unit.head < c.kv_heads; ++unit.head) units.push_back(unit);
                cost += unit.cost() * c.kv_heads * group;
            }
        }
        // Waking a thread costs as much as a few blocks.
        threads = cost < 24 ? 1 : int(c.threads);
        if (threads > 1 && int64_t(units.size()) < wanted) split_units(int(wanted));
        std::sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost() > b.cost(); });
    }

    void split_units(int wanted) {
        int parts = int((wanted + units.size() - 1) / units.size());
        std::vector<Unit> whole;
        whole.swap(units);
        for (Unit unit : whole) {
            int blocks = unit.end_block - unit.first_block, rows = unit.count * group;
            if (rows > SPLIT_ROWS || blocks == 1) {
                units.push_back(unit);
                continue;
            }
            unit.partial = partial_states;
            partial_states += int64_t(blocks) * rows;
            splits.push_back(unit);
            int step = (blocks + parts - 1) / parts;
            for (int b = 0; b < blocks; b += step) {
                Unit part = unit;
                part.first_block += b;
                part.end_block = std::min(part.first_block + step, unit.end_block);
                part.partial += int64_t(b) * rows;
                units.push_back(part);
            }
        }
    }

    State partial(int64_t index) const {
        return {partials.peak + index, partials.total + index, partials.mixed + index * width};
    }

    // Where a query of a unit lies among all queries and heads of the step.
    int64_t query_index(const Unit& unit, int row) const {
        int64_t token = c.row_offsets[unit.row] + unit.first + row / group;
        return token * c.query_heads + unit.head * group + row % group;
    }

    void work(const Unit& unit, float* memory) {
        int rows = unit.count * group;
        float *keys = memory, *values = keys + width * BLOCK, *weights = values + width * BLOCK;
        State state;
        state.mixed = weights + TILE_ROWS * BLOCK;
        state.peak = state.mixed + most_rows * width;
        state.total = state.peak + most_rows;
        if (unit.partial < 0) state.clear(rows, width);
        int first_position = c.row_starts[unit.row] + unit.first;
        bool unpack = rows >= UNPACK_FROM || c.dim % LANES;
        for (int block = unit.first_block; block < unit.end_block; ++block) {
            if (unit.partial >= 0) {
                state = partial(unit.partial + int64_t(block - unit.first_block) * rows);
                state.clear(rows, width);
            }
            int start = block * BLOCK, count = std::min(BLOCK, first_position + unit.count - start);
            const KV* lines[BLOCK];
            for_lines(unit.row, unit.head, start, start + count, [&](int i, KV* line) {
                lines[i] = line;
                prefetch(line + c.value_stride);
            });
            transpose_keys(lines, count, keys);
            for (int i = 0; i < count; ++i) lines[i] += c.value_stride;
            if (block + 1 < unit.end_block) {
                int64_t end = std::min(start + 2 * BLOCK, first_position + unit.count);
                for_lines(unit.row, unit.head, start + BLOCK, end, [&](int, KV* line) { prefetch(line); });
            }
            if (unpack) unpack_values(lines, count, values);
            // Queries before the block see none of it.
            int unseen = std::max(0, start - first_position) * group;
            for_tiles(rows - unseen, [&]<int ROWS>(int tile) {
                int row = unseen + tile;
                float old_scale[LANES], new_scale[LANES];
                score<ROWS>(unit, row, start, keys, weights, state, old_scale, new_scale);
                float* mixed = state.mixed + row * width;
                if (unpack)
                    mix<ROWS>(weights, [&](int j) { return values + j * width; }, count, old_scale, new_scale, mixed);
                else
                    mix<ROWS>(weights, [&](int j) { return lines[j]; }, count, old_scale, new_scale, mixed);
            });
        }
        if (unit.partial < 0) finish(unit, state);
    }

    void prefetch(const KV* line) const {
        for (int64_t at = 0; at < c.dim; at += 64 / sizeof(KV)) __builtin_prefetch(line + at);
    }

    // keys[d][j] = lines[j][d]. From `count` on it does not matter what is there, for such scores are masked, but
    // what lay in the memory before might be denormal, and slow.
    void transpose_keys(const KV* const* lines, int count, float* keys) {
        for (int j = int(padded(count)); j < BLOCK; j += LANES)
            for (int d = 0; d < c.dim; ++d) store(keys + d * BLOCK + j, zeros());
        for (int j = 0; j < count; j += LANES) {
            const KV* rows[LANES];
            for (int i = 0; i < LANES; ++i) rows[i] = lines[std::min(j + i, count - 1)];
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

    void unpack_values(const KV* const* lines, int count, float* values) {
        for (int j = 0; j < count; ++j)
            for (int d = 0; d < width; d += LANES)
                store(values + j * width + d, load_part(lines[j] + d, std::min<int>(LANES, c.dim - d)));
    }

    // Scores of ROWS queries against a block, then weights e**(score - block's peak); merges peaks and totals into
    // the state, and returns the factors that the state's and the block's mixed values are to be merged with.
    template <int ROWS>
    void score(const Unit& unit, int row, int start, const float* keys, float* weights, State state, float* old_scale,
               float* new_scale) {
        constexpr int VECTORS = TILE_VECTORS<ROWS>;
        const float* q[ROWS];
        for (int r = 0; r < ROWS; ++r) q[r] = queries + query_index(unit, row + r) * width;
        for (int j = 0; j < BLOCK; j += VECTORS * LANES) {
            V16 sums[ROWS][VECTORS];
            product<ROWS, VECTORS>(q, [&](int d) { return keys + d * BLOCK + j; }, int(c.dim), sums);
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < VECTORS; ++i) store(weights + r * BLOCK + j + i * LANES, sums[r][i]);
        }
        float peaks[LANES] = {}, totals[LANES] = {};
        for (int r = 0; r < ROWS; ++r) {
            int position = c.row_starts[unit.row] + unit.first + (row + r) / group;
            int first = first_key(position) - start, end = position + 1 - start;
            V16 s[BLOCK_VECTORS];
            for (int i = 0; i < BLOCK_VECTORS; ++i) s[i] = load(weights + r * BLOCK + i * LANES);
            if (first > 0 || end < BLOCK)
                for (int i = 0; i < BLOCK_VECTORS; ++i)
                    s[i] = lanes_or(s[i], first - i * LANES, end - i * LANES, broadcast(-INFINITE));
            peaks[r] = largest(max(max(s[0], s[1]), max(s[2], s[3])));
            V16 peak = broadcast(peaks[r] == -INFINITE ? 0.0f : peaks[r]);
            for (int i = 0; i < BLOCK_VECTORS; ++i) store(weights + r * BLOCK + i * LANES, s[i] = exp(s[i] - peak));
            totals[r] = sum((s[0] + s[1]) + (s[2] + s[3]));
        }
        merge_scales(load_part(state.peak + row, ROWS), load(peaks), state.peak + row, old_scale, new_scale, ROWS);
        V16 total = fma(load_part(state.total + row, ROWS), load(old_scale), load(totals) * load(new_scale));
        store_part(state.total + row, total, ROWS);
    }

    // The factors for two states with these peaks; writes the greater peaks.
    static void merge_scales(V16 a, V16 b, float* peak, float* a_scale, float* b_scale, int rows) {
        V16 greater = max(a, b);
        V16 shift = max(greater, broadcast(std::numeric_limits<float>::lowest()));  // both may be -inf
        store(a_scale, exp(a - shift));
        store(b_scale, exp(b - shift));
        store_part(peak, greater, rows);
    }

    // Merges the weighted values of a block into `mixed`.
    template <int ROWS, class Values>
    void mix(const float* weights, Values values, int count, const float* old_scale, const float* new_scale,
             float* mixed) {
        constexpr int MOST = TILE_VECTORS<ROWS>;
        int d = 0;
        for (; d + MOST * LANES <= width; d += MOST * LANES)
            mix_strip<ROWS, MOST>(weights, values, d, count, old_scale, new_scale, mixed);
        if constexpr (MOST > 1)
            for (; d < width; d += LANES)
                mix_strip<ROWS, 1>(weights, values, d, count, old_scale, new_scale, mixed);
    }
    template <int ROWS, int VECTORS, class Values>
    INLINE void mix_strip(const float* weights, Values values, int d, int count, const float* old_scale,
                          const float* new_scale, float* mixed) {
        const float* rows[ROWS];
        for (int r = 0; r < ROWS; ++r) rows[r] = weights + r * BLOCK;
        V16 sums[ROWS][VECTORS];
        product<ROWS, VECTORS>(rows, [&](int j) { return values(j) + d; }, count, sums);
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < VECTORS; ++i) {
                float* at = mixed + r * width + d + i * LANES;
                store(at, fma(load(at), broadcast(old_scale[r]), sums[r][i] * broadcast(new_scale[r])));
            }
    }

    // Merges the states of a split unit's blocks into the first, in order.
    void merge(const Unit& unit) {
        int rows = unit.count * group, blocks = unit.end_block - unit.first_block;
        State state = partial(unit.partial);
        for (int block = 1; block < blocks; ++block) {
            State next = partial(unit.partial + int64_t(block) * rows);
            for (int r = 0; r < rows; ++r) {
                float old_scale[LANES], new_scale[LANES];
                V16 peak = broadcast(state.peak[r]), next_peak = broadcast(next.peak[r]);
                merge_scales(peak, next_peak, state.peak + r, old_scale, new_scale, 1);
                state.total[r] = std::fma(state.total[r], old_scale[0], next.total[r] * new_scale[0]);
                for (int d = 0; d < width; d += LANES) {
                    float* at = state.mixed + r * width + d;
                    store(at, fma(load(at), load(old_scale), load(next.mixed + r * width + d) * load(new_scale)));
                }
            }
        }
        finish(unit, state);
    }

    void finish(const Unit& unit, State state) { c.narrow ? divide<bf16>(unit, state) : divide<float>(unit, state); }
    template <class Act>
    void divide(const Unit& unit, State state) {
        for (int r = 0; r < unit.count * group; ++r) {
            Act* out = (Act*)c.out + query_index(unit, r) * c.dim;
            V16 total = broadcast(state.total[r]);
            for (int d = 0; d < c.dim; d += LANES)
                store_part(out + d, load(state.mixed + r * width + d) / total, std::min<int>(LANES, c.dim - d));
        }
    }
};

}  // namespace

// Returns 0, -1 without memory, or -2 if the page table names a page that does not exist.
EXPORT int attention(const Call* call) try {
    return call->narrow_cache ? Attention<bf16>(*call).run() : Attention<float>(*call).run();
} catch (const std::bad_alloc&) {
    return -1;
}
