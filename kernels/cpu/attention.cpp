// Rotary embedding, the write into the paged cache, and causal attention over it, in one call.
//
// Keys are taken in blocks of 64 at fixed absolute positions. A block gives each query its own maximum, sum and mixed
// values (a state), and the blocks of a query are merged in order of position. So the arithmetic of a query depends
// on its position and its keys alone, and how queries and blocks are dealt out to tiles and threads changes no bit.
// What a block computes with is the business of `Blocks`.

#include <vector>

#include "attention_floats.h"
#include "attention_pairs.h"
#include "attention_tiles.h"

namespace {

constexpr int UNIT_ROWS = 192;    // queries times heads that share a block's unpacking
constexpr int SPAN_ROWS = 64;     // up to so many, a unit has all key heads, and its blocks may go to several threads
constexpr int UNITS_A_THREAD = 4; // so that threads end together
constexpr int ALONE_COST = 24;    // waking a thread costs as much as so many blocks of a query

// Some queries of a row, the query heads of some key heads, and a range of key blocks.
struct Unit {
    int row, head, heads, first, count;  // `first` counts from the row's first new token
    int first_block, end_block;
    int64_t partial;  // index of the state of its first block and row among the partial states, or -1: no other unit
                      // has blocks of these queries
    int64_t cost() const { return int64_t(count) * heads * (end_block - first_block); }
};

Scratch& scratch(int which) {
    thread_local Scratch memory[2];
    return memory[which];
}

template <class Blocks, class KV>
class Attention {
  public:
    explicit Attention(const Call& call)
        : c(call), blocks(call), group(call.group()), width(blocks.width), most_rows(std::max(UNIT_ROWS, group)) {}

    int run() {
        make_units();
        blocks.use(scratch(0).take<char>(blocks.query_bytes()));
        size_t own = padded(blocks.worker_bytes() / sizeof(float) + most_rows * (width + 2) + 16);
        memory = scratch(1).take<float>(own * threads + partial_states * (width + 2));
        partials.peak = memory + own * threads;
        partials.total = partials.peak + partial_states;
        partials.mixed = partials.total + partial_states;

        parallel((c.tokens + 7) / 8, threads, [&](int64_t i, int thread) {
            float* line = memory + own * thread;
            for (int64_t token = i * 8; token < std::min(i * 8 + 8, c.tokens); ++token)
                c.narrow ? prepare<bf16>(token, line) : prepare<float>(token, line);
        });
        parallel(units.size(), threads, [&](int64_t i, int thread) { work(units[i], memory + own * thread); });
        parallel(splits.size(), threads, [&](int64_t i, int thread) { merge(splits[i], memory + own * thread); });
        return bad_page ? -2 : 0;
    }

  private:
    const Call& c;
    Blocks blocks;
    const int group, width, most_rows;
    int threads = 1;
    float* memory = nullptr;
    std::vector<Unit> units, splits;
    int64_t partial_states = 0;
    State partials{};
    std::atomic<bool> bad_page{false};

    // Calls f(index, keys, scales) for the cached vectors of positions start .. end - 1.
    template <class F>
    void for_lines(int row, int64_t start, int64_t end, F f) {
        const int32_t* table = c.page_table + c.row_slots[row] * c.table_stride;
        int64_t page = start / c.page_size, slot = start % c.page_size, step = c.kv_heads * c.dim;
        for (int64_t i = 0; i < end - start; ++page, slot = 0) {
            int64_t id = table[page];
            if (id < 0 || id >= c.pages) {
                bad_page = true;
                id = 0;
            }
            KV* line = (KV*)c.cache + id * c.page_stride + slot * step;
            float* scales = c.scales + id * c.scale_page_stride + slot * c.kv_heads;
            for (; slot < c.page_size && i < end - start; ++slot, ++i, line += step, scales += c.kv_heads)
                f(int(i), line, scales);
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
    // Stores a vector in eight bits a number, and what they are to be multiplied with.
    void quantize(const float* from, int8_t* to, float* scale) {
        float most = largest_size(from, int(c.dim));
        *scale = most * (1.0f / 127);
        V16 factor = broadcast(most >= SMALLEST ? 127 / most : 0.0f);
        for (int d = 0; d < c.dim; d += LANES) {
            int part = std::min<int>(LANES, c.dim - d);
            store_whole(to + d, load_part(from + d, part) * factor, part);
        }
    }

    // Where a query is among those of the step, so that the queries of a unit's head lie in one run.
    int64_t query_index(int head, int64_t token, int member) const { return (head * c.tokens + token) * group + member; }

    // Rotates a token's queries and writes its keys and values into the cache. line: memory for a vector.
    template <class Act>
    void prepare(int64_t token, float* line) {
        int row = int(std::upper_bound(c.row_offsets, c.row_offsets + c.rows + 1, token) - c.row_offsets) - 1;
        int64_t position = c.row_starts[row] + token - c.row_offsets[row];
        const float *cos = c.cos + position * (c.rotated / 2), *sin = c.sin + position * (c.rotated / 2);
        const Act *q = (const Act*)c.q + token * c.q_stride, *k = (const Act*)c.k + token * c.k_stride;
        const Act* v = (const Act*)c.v + token * c.v_stride;
        for (int head = 0; head < c.kv_heads; ++head)
            for (int member = 0; member < group; ++member, q += c.dim) {
                rotate(q, line, cos, sin, c.scale);
                blocks.put_query(query_index(head, token, member), line);
            }
        for_lines(row, position, position + 1, [&](int, KV* key, float* scales) {
            for (int head = 0; head < c.kv_heads; ++head, key += c.dim, k += c.dim, v += c.dim) {
                KV* value = key + c.value_stride;
                if constexpr (sizeof(KV) == 1) {
                    rotate(k, line, cos, sin, 1.0f);
                    quantize(line, key, scales + head);
                    copy(v, line, int(c.dim), 1.0f);
                    quantize(line, value, scales + c.scale_value_stride + head);
                } else {
                    rotate(k, key, cos, sin, 1.0f);
                    copy(v, value, int(c.dim), 1.0f);
                }
            }
        });
    }

    void make_units() {
        int64_t most = std::max<int64_t>(1, UNIT_ROWS / group), least = (Blocks::LEAST_ROWS + group - 1) / group;
        int64_t wanted = UNITS_A_THREAD * c.threads;
        int64_t queries_a_unit = std::clamp((c.tokens * c.kv_heads + wanted - 1) / wanted, std::min(least, most), most);
        int64_t cost = 0;
        for (int row = 0; row < c.rows; ++row) {
            int new_tokens = c.row_offsets[row + 1] - c.row_offsets[row];
            bool spans = new_tokens * c.query_heads <= SPAN_ROWS;
            int step = spans ? new_tokens : int(queries_a_unit);
            for (int first = 0; first < new_tokens; first += step) {
                int count = std::min(step, new_tokens - first), start = c.row_starts[row] + first;
                Unit unit{row, 0, spans ? int(c.kv_heads) : 1, first, count,
                          c.first_key(start) / BLOCK, (start + count - 1) / BLOCK + 1, -1};
                for (; unit.head < c.kv_heads; unit.head += unit.heads) {
                    units.push_back(unit);
                    cost += unit.cost() * group;
                }
            }
        }
        threads = cost < ALONE_COST ? 1 : int(c.threads);
        // Fewer than threads are not cut finer: a block is fetched while the one before it, of the same unit, is attended to.
        if (threads > 1 && int64_t(units.size()) < wanted)
            split_units(int(units.size()) < threads ? threads : int(wanted));
        std::sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost() > b.cost(); });
    }

    void split_units(int wanted) {
        int parts = int((wanted + units.size() - 1) / units.size());
        std::vector<Unit> whole;
        whole.swap(units);
        for (Unit unit : whole) {
            int blocks_of_unit = unit.end_block - unit.first_block, rows = state_rows(unit);
            if (rows > SPAN_ROWS || blocks_of_unit == 1) {
                units.push_back(unit);
                continue;
            }
            unit.partial = partial_states;
            partial_states += int64_t(blocks_of_unit) * rows;
            splits.push_back(unit);
            int step = (blocks_of_unit + parts - 1) / parts;
            for (int b = 0; b < blocks_of_unit; b += step) {
                Unit part = unit;
                part.first_block += b;
                part.end_block = std::min(part.first_block + step, unit.end_block);
                part.partial += int64_t(b) * rows;
                units.push_back(part);
            }
        }
    }

    int state_rows(const Unit& unit) const { return unit.count * group * unit.heads; }

    void work(const Unit& unit, float* memory) {
        int rows = unit.count * group, all_rows = state_rows(unit);
        State own{memory, memory + most_rows, memory + 2 * most_rows}, state = own;
        if (unit.partial < 0) state.clear(all_rows, width);
        void* space = (void*)((uintptr_t(own.mixed + int64_t(most_rows) * width) + 63) & ~uintptr_t(63));
        typename Blocks::Worker worker(blocks, space, rows);
        int position = c.row_starts[unit.row] + unit.first, end = position + unit.count;

        Lines<KV> lines[2];
        find(unit, unit.first_block, end, lines[0]);
        for (int block = unit.first_block, turn = 0; block < unit.end_block; ++block, turn ^= 1) {
            Lines<KV>& next = lines[turn ^ 1];
            bool last = block + 1 == unit.end_block;
            if (!last) find(unit, block + 1, end, next);
            if (unit.partial >= 0) {
                state = partials.from(unit.partial + int64_t(block - unit.first_block) * all_rows, width);
                state.clear(all_rows, width);
            }
            int64_t query = query_index(unit.head, c.row_offsets[unit.row] + unit.first, 0);
            Task<KV> task{&c, &lines[turn], last ? nullptr : &next, unit.head, unit.heads,
                          {query, rows, position, block * BLOCK}, c.tokens * group};
            if (block == unit.first_block)
                for (bool values : {false, true}) task.fetch(lines[turn], 0, 1, values);
            worker.attend(task, state);
        }
        if (unit.partial < 0) finish(unit, state, (float*)space);
    }

    // The lines of a block, up to position `end`.
    void find(const Unit& unit, int block, int end, Lines<KV>& lines) {
        lines.count = std::min(BLOCK, end - block * BLOCK);
        for_lines(unit.row, block * BLOCK, block * BLOCK + lines.count, [&](int i, KV* key, float* scales) {
            lines.keys[i] = key;
            if constexpr (sizeof(KV) == 1) lines.scales[i] = scales;
        });
    }

    // Merges the states of a split unit's blocks into the first, in order.
    void merge(const Unit& unit, float* memory) {
        int rows = state_rows(unit);
        State state = partials.from(unit.partial, width);
        for (int block = 1; block < unit.end_block - unit.first_block; ++block) {
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
                    V16 before = broadcast(old_scale[r]), factor = broadcast(new_scale[r]);
                    for (int d = 0; d < width; d += LANES)
                        store(at + d, fma(load(at + d), before, load(more + d) * factor));
                }
            }
        }
        finish(unit, state, memory);
    }

    // line: memory for a vector.
    void finish(const Unit& unit, State state, float* line) {
        c.narrow ? divide<bf16>(unit, state, line) : divide<float>(unit, state, line);
    }
    template <class Act>
    void divide(const Unit& unit, State state, float* line) {
        int rows = unit.count * group;
        for (int r = 0; r < state_rows(unit); ++r) {
            int64_t token = c.row_offsets[unit.row] + unit.first + r % rows / group;
            int64_t head = (unit.head + r / rows) * group + r % group;
            Act* out = (Act*)c.out + (token * c.query_heads + head) * c.dim;
            const float* mixed = blocks.in_order(state.mixed + int64_t(r) * width, line);
            V16 total = broadcast(state.total[r]);
            for (int d = 0; d < c.dim; d += LANES) {
                int part = std::min<int>(LANES, c.dim - d);
                store_part(out + d, load_part(mixed + d, part) / total, part);
            }
        }
    }
};

template <class KV>
int attend(const Call& call) {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
    if constexpr (sizeof(KV) <= 2)
        if ((call.narrow || sizeof(KV) == 1) && call.dim <= TileBlocks<KV>::MOST_DIM && amx_granted())
            return Attention<TileBlocks<KV>, KV>(call).run();
#endif
#ifdef __AVX512BF16__
    if constexpr (sizeof(KV) == 2)
        if (PairBlocks::takes(call)) return Attention<PairBlocks, KV>(call).run();
#endif
    return Attention<FloatBlocks<KV>, KV>(call).run();
}

}  // namespace

// Returns 0, -1 without memory, or -2 if the page table names a page that does not exist.
EXPORT int attention(const Call* call) try {
    switch (call->cache_type) {
        case FLOAT32: return attend<float>(*call);
        case BFLOAT16: return attend<bf16>(*call);
        default: return attend<int8_t>(*call);
    }
} catch (const std::bad_alloc&) {
    return -1;
}
