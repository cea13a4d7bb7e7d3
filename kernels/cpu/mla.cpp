// Multi-head latent attention, absorbed: rotary embedding, the write into the paged cache, and causal attention over
// it, in one call.
//
// All query heads share one key a position, of rank + rotated numbers, whose first `rank` are its value too. So a
// block of keys is read once for all of them. Blocks of 128 keys lie at fixed positions; each gives a query its own
// maximum, sum and mixed values (a state), and they are merged in order. How tokens, heads and blocks are dealt out to
// threads changes no bit, nor does the instruction set.

#include <vector>

#include "attention.h"
#include "product.h"

namespace {

constexpr int KEYS = 128;        // of a block
constexpr int KEY_VECTORS = KEYS / LANES;
constexpr int STRIP = 64;        // keys that are multiplied at a time
constexpr int DEPTH = 64;        // numbers of each that are
constexpr int UNIT_ROWS = 96;    // tokens times heads that share the unpacking of a block
constexpr int UNITS_A_THREAD = 4;  // so that threads end together
constexpr int64_t ALONE_PRODUCTS = 1 << 19;  // for fewer, waking a thread costs more than it saves

struct LatentCall {
    const void *q_latent, *q_rope, *latent, *k_rope;
    void *out, *cache;
    const float *cos, *sin;
    const int32_t *row_offsets, *row_starts, *row_slots, *page_table;
    int64_t q_latent_stride, q_latent_head, q_rope_stride, q_rope_head;  // elements from token to token, head to head
    int64_t latent_stride, k_rope_stride;                                // elements from token to token
    int64_t page_stride, table_stride;  // elements from page to page, from line to line of the page table
    int64_t rows, tokens, heads, rank, rotated, page_size, pages;
    int64_t threads;
    int64_t narrow, cache_narrow;  // activations, cached keys are bfloat16, else float32
    int64_t interleaved;  // numbers that are rotated together lie side by side, not half of them apart
    float scale;

    int dim() const { return int(rank + rotated); }
};

// Some tokens of a row, some heads, and a range of key blocks.
struct Unit {
    int row, head, heads, first, count;  // `first` counts from the row's first new token
    int first_block, end_block;
    int64_t partial;  // index of the state of its first block and query among the partial states, or -1: no other
                      // unit has blocks of these queries

    int queries() const { return count * heads; }
    int64_t cost() const { return int64_t(queries()) * (end_block - first_block); }
};

Scratch& scratch(int which) {
    thread_local Scratch memory[2];
    return memory[which];
}

template <class KV>
struct Keys {
    int count = 0;
    const KV* lines[KEYS];
};

template <class Act, class KV>
class LatentAttention {
  public:
    explicit LatentAttention(const LatentCall& call)
        : c(call), width(int(padded(call.rank))), q_width(int(padded(call.dim()))),
          most(std::max<int>(UNIT_ROWS, int(call.heads))) {}

    int run() {
        make_units();
        size_t own = padded(size_t(most) * (q_width + KEYS + width + 2) + DEPTH * STRIP + 2 * padded(most) + LANES);
        float* memory = scratch(0).take<float>(own * threads + partial_states * (width + 2));
        partials.peak = memory + own * threads;
        partials.total = partials.peak + partial_states;
        partials.mixed = partials.total + partial_states;
        parallel((c.tokens + 15) / 16, threads, [&](int64_t i, int) {
            for (int64_t token = i * 16; token < std::min(i * 16 + 16, c.tokens); ++token) write(token);
        });
        parallel(units.size(), threads, [&](int64_t i, int thread) { work(units[i], memory + own * thread); });
        parallel(splits.size(), threads, [&](int64_t i, int) { merge(splits[i]); });
        return bad_page ? -2 : 0;
    }

  private:
    const LatentCall& c;
    const int width, q_width, most;
    int threads = 1;
    std::vector<Unit> units, splits;
    int64_t partial_states = 0;
    State partials{};
    std::atomic<bool> bad_page{false};

    // Where the key of each position lies, from start to end - 1: f(index, key).
    template <class F>
    void for_lines(int row, int64_t start, int64_t end, F f) {
        const int32_t* table = c.page_table + c.row_slots[row] * c.table_stride;
        int64_t page = start / c.page_size, slot = start % c.page_size;
        for (int64_t i = 0; i < end - start; ++page, slot = 0) {
            int64_t id = table[page];
            if (id < 0 || id >= c.pages) {
                bad_page = true;
                id = 0;
            }
            KV* line = (KV*)c.cache + id * c.page_stride + slot * c.dim();
            for (; slot < c.page_size && i < end - start; ++slot, ++i, line += c.dim()) f(int(i), line);
        }
    }
    void find(const Unit& unit, int block, int end, Keys<KV>& keys) {
        keys.count = std::min(KEYS, end - block * KEYS);
        for_lines(unit.row, block * KEYS, block * KEYS + keys.count, [&](int i, KV* key) { keys.lines[i] = key; });
    }

    template <class To>
    void copy(const Act* from, To* to, int64_t count, float scale) {
        for (int64_t i = 0; i < count; i += LANES) {
            int part = int(std::min<int64_t>(LANES, count - i));
            store_part(to + i, load_part(from + i, part) * broadcast(scale), part);
        }
    }
    // Rotates by the angles of a position, and stores the result times `scale`, first the first of all pairs.
    template <class To>
    void rotate(const Act* from, To* to, int64_t position, float scale) {
        int half = int(c.rotated / 2), step = c.interleaved ? 2 : 1, apart = c.interleaved ? 1 : half;
        const float *cos = c.cos + position * half, *sin = c.sin + position * half;
        for (int i = 0; i < half; i += LANES) {
            int count = std::min(LANES, half - i);
            float a[LANES] = {}, b[LANES] = {};
            for (int j = 0; j < count; ++j) {
                a[j] = widen(from[(i + j) * step]);
                b[j] = widen(from[(i + j) * step + apart]);
            }
            V16 x = load_part(cos + i, count), y = load_part(sin + i, count), factor = broadcast(scale);
            store_part(to + i, (load(a) * x - load(b) * y) * factor, count);
            store_part(to + half + i, (load(b) * x + load(a) * y) * factor, count);
        }
    }

    // Writes a new token's key into the cache.
    void write(int64_t token) {
        int row = int(std::upper_bound(c.row_offsets, c.row_offsets + c.rows + 1, token) - c.row_offsets) - 1;
        int64_t position = c.row_starts[row] + token - c.row_offsets[row];
        for_lines(row, position, position + 1, [&](int, KV* key) {
            copy((const Act*)c.latent + token * c.latent_stride, key, c.rank, 1.0f);
            rotate((const Act*)c.k_rope + token * c.k_rope_stride, key + c.rank, position, 1.0f);
        });
    }

    void make_units() {
        int step = std::max<int>(1, UNIT_ROWS / int(c.heads));
        int64_t products = 0, blocks = 0;
        for (int row = 0; row < c.rows; ++row) {
            int new_tokens = c.row_offsets[row + 1] - c.row_offsets[row];
            for (int first = 0; first < new_tokens; first += step) {
                int count = std::min(step, new_tokens - first), end = c.row_starts[row] + first + count;
                units.push_back({row, 0, int(c.heads), first, count, 0, (end + KEYS - 1) / KEYS, -1});
                blocks += units.back().end_block;
                products += int64_t(count) * end * c.heads * c.dim();
            }
        }
        threads = products < ALONE_PRODUCTS ? 1 : int(c.threads);
        int64_t wanted = int64_t(UNITS_A_THREAD) * threads, count = int64_t(units.size());
        if (threads > 1 && count && count < wanted) {
            if (blocks >= threads) split_blocks(int((wanted + count - 1) / count));
            else split_heads(int((threads + blocks - 1) / blocks));
        }
        std::sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost() > b.cost(); });
    }
    void split_heads(int parts) {
        std::vector<Unit> whole;
        whole.swap(units);
        int heads = std::max<int>(4, int(c.heads + parts - 1) / parts);
        for (Unit unit : whole)
            for (unit.head = 0; unit.head < c.heads; unit.head += heads) {
                unit.heads = std::min(heads, int(c.heads) - unit.head);
                units.push_back(unit);
            }
    }
    void split_blocks(int parts) {
        std::vector<Unit> whole;
        whole.swap(units);
        for (Unit unit : whole) {
            int blocks = unit.end_block, step = (blocks + parts - 1) / parts;
            if (blocks == 1) {
                units.push_back(unit);
                continue;
            }
            unit.partial = partial_states;
            partial_states += int64_t(blocks) * unit.queries();
            splits.push_back(unit);
            for (int block = 0; block < blocks; block += step) {
                Unit part = unit;
                part.first_block = block;
                part.end_block = std::min(block + step, blocks);
                part.partial += int64_t(block) * unit.queries();
                units.push_back(part);
            }
        }
    }

    int64_t token(const Unit& unit, int query) const {
        return c.row_offsets[unit.row] + unit.first + query / unit.heads;
    }
    int head(const Unit& unit, int query) const { return unit.head + query % unit.heads; }

    void work(const Unit& unit, float* memory) {
        int rows = unit.queries(), start = c.row_starts[unit.row] + unit.first, end = start + unit.count;
        State state{memory, memory + most, memory + 2 * most};
        float* queries = state.mixed + int64_t(most) * width;
        float* weights = queries + int64_t(most) * q_width;
        // Keys past the end are masked, but what lay in the memory before might be denormal, and slow.
        float* turned = (float*)((uintptr_t(weights + int64_t(most) * KEYS) + 63) & ~uintptr_t(63));
        std::fill_n(turned, DEPTH * STRIP, 0.0f);
        float* scales = turned + DEPTH * STRIP;
        for (int r = 0; r < rows; ++r) {
            const int64_t at = token(unit, r), h = head(unit, r);
            float* to = queries + r * q_width;
            copy((const Act*)c.q_latent + at * c.q_latent_stride + h * c.q_latent_head, to, c.rank, c.scale);
            rotate((const Act*)c.q_rope + at * c.q_rope_stride + h * c.q_rope_head, to + c.rank, start + r / unit.heads,
                   c.scale);
        }
        if (unit.partial < 0) state.clear(rows, width);
        Keys<KV> keys[2];
        find(unit, unit.first_block, end, keys[0]);
        for (int block = unit.first_block, turn = 0; block < unit.end_block; ++block, turn ^= 1) {
            bool last = block + 1 == unit.end_block;
            if (!last) find(unit, block + 1, end, keys[turn ^ 1]);
            else keys[turn ^ 1].count = 0;
            if (unit.partial >= 0) {
                state = partials.from(unit.partial + int64_t(block - unit.first_block) * rows, width);
                state.clear(rows, width);
            }
            // Queries before `unseen` see nothing of the block.
            int first_key = block * KEYS, unseen = std::max(0, first_key - start) * unit.heads;
            score(keys[turn], keys[turn ^ 1], queries + unseen * q_width, rows - unseen, turned, weights);
            int position = start * unit.heads + unseen;
            mix(keys[turn], rows - unseen, weights, scales, state.from(unseen, width),
                [&](int r) { return (position + r) / unit.heads + 1 - first_key; });
        }
        if (unit.partial < 0) finish(unit, state);
    }

    // weights[r][j] = query r times key j, summed in strips of DEPTH; fetches the keys that come next.
    void score(const Keys<KV>& keys, const Keys<KV>& next, const float* queries, int rows, float* turned,
               float* weights) {
        int depth = c.dim(), fetched = 0, turns = (keys.count + STRIP - 1) / STRIP * ((depth + DEPTH - 1) / DEPTH);
        for (int j = 0, turn = 0; j < keys.count; j += STRIP)
            for (int d = 0; d < depth; d += DEPTH) {
                int part = std::min(DEPTH, depth - d);
                for (int until = next.count * ++turn / turns; fetched < until; ++fetched)
                    for (int at = 0; at < depth; at += 64 / int(sizeof(KV)))
                        __builtin_prefetch(next.lines[fetched] + at, 0, 2);
                for (int i = j; i < std::min(j + STRIP, keys.count); i += LANES)
                    transpose(keys, i, d, part, turned + i - j);
                for_tiles(rows, [&]<int ROWS>(int row) {
                    constexpr int VECTORS = TILE_VECTORS<ROWS>;
                    const float* q[ROWS];
                    for (int r = 0; r < ROWS; ++r) q[r] = queries + (row + r) * q_width + d;
                    for (int n = 0; n < STRIP; n += VECTORS * LANES) {
                        V16 sums[ROWS][VECTORS];
                        product<ROWS, VECTORS>(q, [&](int k) { return turned + k * STRIP + n; }, part, sums);
                        for (int r = 0; r < ROWS; ++r)
                            for (int i = 0; i < VECTORS; ++i) {
                                float* at = weights + (row + r) * KEYS + j + n + i * LANES;
                                store(at, d ? load(at) + sums[r][i] : sums[r][i]);
                            }
                    }
                });
            }
    }
    // Sixteen keys, or as many as there are, become columns.
    void transpose(const Keys<KV>& keys, int first, int d, int depth, float* to) {
        const KV* rows[LANES];
        for (int i = 0; i < LANES; ++i) rows[i] = keys.lines[std::min(first + i, keys.count - 1)] + d;
        int k = 0;
        for (; k + LANES <= depth; k += LANES) transpose16(rows, k, to + k * STRIP, STRIP);
        if (k == depth) return;
        KV ends[LANES][LANES] = {};
        for (int i = 0; i < LANES; ++i) {
            std::memcpy(ends[i], rows[i] + k, (depth - k) * sizeof(KV));
            rows[i] = ends[i];
        }
        float square[LANES * LANES];
        transpose16(rows, 0, square, LANES);
        for (int i = 0; i < depth - k; ++i) store(to + (k + i) * STRIP, load(square + i * LANES));
    }

    // Scores become weights, and the weighted values are merged into the state. seen(r): keys that query r sees;
    // old_scale: memory for 2 padded(most) floats.
    template <class Seen>
    void mix(const Keys<KV>& keys, int rows, float* weights, float* old_scale, State state, Seen seen) {
        float* new_scale = old_scale + padded(most);
        for (int first = 0; first < rows; first += LANES) {
            float peaks[LANES] = {}, totals[LANES] = {};
            int count = std::min(LANES, rows - first);
            for (int r = 0; r < count; ++r) {
                float* line = weights + (first + r) * KEYS;
                int end = seen(first + r);
                V16 s[KEY_VECTORS], peak = broadcast(-INFINITE);
                for (int i = 0; i < KEY_VECTORS; ++i) {
                    s[i] = load(line + i * LANES);
                    if (end < KEYS) s[i] = lanes_or(s[i], 0, end - i * LANES, broadcast(-INFINITE));
                    peak = max(peak, s[i]);
                }
                peaks[r] = largest(peak);
                peak = broadcast(peaks[r] == -INFINITE ? 0.0f : peaks[r]);
                for (int i = 0; i < KEY_VECTORS; ++i) {
                    s[i] = exp(s[i] - peak);
                    store(line + i * LANES, s[i]);
                }
                totals[r] = sum(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
            }
            merge_peaks(peaks, totals, state.from(first, width), count, old_scale + first, new_scale + first);
        }
        int d = 0;
        for (; d + 4 * LANES <= width; d += 4 * LANES)
            for_tiles(rows, [&]<int ROWS>(int row) {
                for (int n = 0; n < 4 * LANES; n += TILE_VECTORS<ROWS> * LANES)
                    mix_strip<ROWS, TILE_VECTORS<ROWS>>(keys, row, d + n, weights, old_scale, new_scale, state.mixed);
            });
        for (; d < width; d += LANES)
            for_tiles(rows, [&]<int ROWS>(int row) {
                mix_strip<ROWS, 1>(keys, row, d, weights, old_scale, new_scale, state.mixed);
            });
    }
    template <int ROWS, int VECTORS>
    INLINE void mix_strip(const Keys<KV>& keys, int row, int d, const float* weights, const float* old_scale,
                          const float* new_scale, float* mixed) {
        const float* lines[ROWS];
        for (int r = 0; r < ROWS; ++r) lines[r] = weights + (row + r) * KEYS;
        V16 sums[ROWS][VECTORS];
        product<ROWS, VECTORS>(lines, [&](int j) { return keys.lines[j] + d; }, keys.count, sums);
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < VECTORS; ++i) {
                float* at = mixed + int64_t(row + r) * width + d + i * LANES;
                V16 old = broadcast(old_scale[row + r]), factor = broadcast(new_scale[row + r]);
                store(at, fma(load(at), old, sums[r][i] * factor));
            }
    }

    // Merges the states of a split unit's blocks into the first, in order.
    void merge(const Unit& unit) {
        int rows = unit.queries();
        State state = partials.from(unit.partial, width);
        for (int block = 1; block < unit.end_block; ++block) {
            State next = state.from(int64_t(block) * rows, width);
            for (int first = 0; first < rows; first += LANES) {
                int count = std::min(LANES, rows - first);
                float old_scale[LANES], new_scale[LANES], peaks[LANES], totals[LANES];
                store(peaks, load_part(next.peak + first, count));
                store(totals, load_part(next.total + first, count));
                merge_peaks(peaks, totals, state.from(first, width), count, old_scale, new_scale);
                for (int r = 0; r < count; ++r) {
                    float* at = state.mixed + int64_t(first + r) * width;
                    const float* more = next.mixed + int64_t(first + r) * width;
                    V16 old = broadcast(old_scale[r]), factor = broadcast(new_scale[r]);
                    for (int d = 0; d < width; d += LANES)
                        store(at + d, fma(load(at + d), old, load(more + d) * factor));
                }
            }
        }
        finish(unit, state);
    }

    void finish(const Unit& unit, State state) {
        for (int r = 0; r < unit.queries(); ++r) {
            Act* out = (Act*)c.out + (token(unit, r) * c.heads + head(unit, r)) * c.rank;
            const float* mixed = state.mixed + int64_t(r) * width;
            V16 total = broadcast(state.total[r]);
            for (int d = 0; d < c.rank; d += LANES) {
                int part = std::min<int>(LANES, int(c.rank) - d);
                store_part(out + d, load_part(mixed + d, part) / total, part);
            }
        }
    }
};

template <class Act>
int attend(const LatentCall& c) {
    return c.cache_narrow ? LatentAttention<Act, bf16>(c).run() : LatentAttention<Act, float>(c).run();
}

}  // namespace

// Returns 0, -1 without memory, or -2 if the page table names a page that does not exist.
EXPORT int mla_attention(const LatentCall* call) try {
    return call->narrow ? attend<bf16>(*call) : attend<float>(*call);
} catch (const std::bad_alloc&) {
    return -1;
}
