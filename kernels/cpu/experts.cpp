// Mixtures of experts: which experts a token goes to, and what they make of it.
//
// The rows of a step are sorted by expert, so that each expert's weights are read once. Its products are those of the
// linear layers, whose rows do not depend on each other, and the results of a token are added in the order in which
// its experts were chosen: so neither the other tokens nor the threads change a bit.

#include <algorithm>
#include <vector>

#include "linear.h"
#include "threads.h"

namespace {

constexpr int64_t CHUNK_TOKENS = 512;          // of which the values in between are held at a time
constexpr int64_t PIECES_A_THREAD = 8;         // so that threads end together
constexpr int64_t SERIAL_ELEMENTS = 1 << 14;   // for fewer, waking a thread costs more than it saves

// The weights of one of an expert's two layers, expert after expert.
struct Stack {
    enum Kind : int64_t { ROWS = 0, PANELS = 1, INT8 = 2, INT4 = 3 };

    const char* data;
    int64_t kind, narrow;           // narrow: rows or panels are bfloat16, else float32
    int64_t outputs, inputs;        // of each
    int64_t panel_bytes;            // of 64 outputs
    int64_t few_way, byte_tiles, many, many_way;  // the way of a quantized layer, and rows from which on it is another

    int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }

    // Rows of x times some panels of one, on this thread, into their columns of out's rows. Returns 0, or -1 without
    // memory.
    int multiply(int64_t index, int64_t first_panel, int64_t end_panel, const float* x, int64_t rows, int64_t x_stride,
                 float* out, int64_t out_stride) const {
        int64_t first = first_panel * PANEL, count = std::min(end_panel * PANEL, outputs) - first;
        const char* weight = data + index * (panel_bytes / PANEL * outputs) + first_panel * panel_bytes;
        if (kind == ROWS || kind == PANELS) {
            LinearCall call{x,    weight, nullptr, out + first, x_stride, out_stride, rows, inputs, count,
                            kind == PANELS, 1, narrow, 0, 0};
            return linear(&call);
        }
        int64_t way = few_way;
        if (rows >= byte_tiles) way = BYTE_TILES;
        if (rows >= many) way = many_way;
        QuantizedCall call{x, (const uint8_t*)weight, nullptr, out + first, x_stride, out_stride, rows, inputs,
                           count, 1, 0, kind == INT8 ? 8 : 4, way, 0};
        return linear_quantized(&call);
    }
};

struct ExpertsCall {
    const void* x;
    const int32_t* ids;    // [tokens, chosen]
    const float* weights;  // likewise
    const void* shared;    // what is added to the mixtures, or null
    void* out;
    Stack gate_up, down;
    int64_t x_stride;  // elements from token to token
    int64_t tokens, chosen, experts, threads;
    int64_t narrow;  // x and out are bfloat16, else float32
};

struct RouteCall {
    const float *logits, *bias;  // bias: or null
    int32_t* ids;
    float* weights;
    int64_t tokens, experts, chosen, groups, top_groups;
    int64_t sigmoid;    // scores are the sigmoids of logits, else their softmax
    int64_t normalize;  // weights of a token sum to `scaling`
    int64_t threads;
    float scaling;
};

Scratch& scratch(int which) {
    thread_local Scratch memory[2];
    return memory[which];
}

template <class F>
void for_rows(int64_t rows, int64_t width, int64_t threads, F f) {
    int64_t piece = std::max<int64_t>(1, SERIAL_ELEMENTS / std::max<int64_t>(1, width));
    parallel((rows + piece - 1) / piece, int(threads), [&](int64_t i, int) {
        for (int64_t row = i * piece; row < std::min((i + 1) * piece, rows); ++row) f(row);
    });
}

// Up to CHUNK_TOKENS tokens.
template <class X>
class Chunk {
  public:
    Chunk(const ExpertsCall& call, int64_t first, int64_t tokens)
        : c(call), first(first), tokens(tokens), rows(tokens * c.chosen), hidden(c.down.outputs),
          inner(c.down.inputs) {}

    int run() {
        sort();
        states = scratch(0).take<float>(rows * hidden + rows * 2 * inner);
        between = states + rows * hidden;
        for_rows(rows, hidden, c.threads, [&](int64_t row) {
            const X* from = (const X*)c.x + (first + order[row] / c.chosen) * c.x_stride;
            copy(from, states + row * hidden, hidden);
        });
        multiply(c.gate_up, states, hidden, between, 2 * inner);
        for_rows(rows, inner, c.threads, [&](int64_t row) { activate(between + row * 2 * inner); });
        multiply(c.down, between, 2 * inner, states, hidden);
        for_rows(tokens, hidden * c.chosen, c.threads, [&](int64_t token) { add(token); });
        return failed ? -1 : 0;
    }

  private:
    const ExpertsCall& c;
    const int64_t first, tokens, rows, hidden, inner;
    std::vector<int32_t> order, place;  // rows sorted by expert: which of the chosen each is, and the inverse
    std::vector<int64_t> begin;         // where each expert's rows begin
    std::vector<int32_t> hit;           // experts that have rows
    float *states = nullptr, *between = nullptr;
    std::atomic<bool> failed{false};

    void sort() {
        const int32_t* ids = c.ids + first * c.chosen;
        begin.assign(c.experts + 1, 0);
        for (int64_t i = 0; i < rows; ++i) ++begin[ids[i] + 1];
        for (int64_t e = 0; e < c.experts; ++e) {
            if (begin[e + 1]) hit.push_back(int32_t(e));
            begin[e + 1] += begin[e];
        }
        order.resize(rows);
        place.resize(rows);
        std::vector<int64_t> next(begin);
        for (int64_t i = 0; i < rows; ++i) {
            place[i] = int32_t(next[ids[i]]++);
            order[place[i]] = int32_t(i);
        }
    }

    // Each expert's rows of x times its weights, in pieces of some panels.
    void multiply(const Stack& stack, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
        int64_t panels = stack.panels(), all = panels * int64_t(hit.size());
        int64_t each = std::clamp<int64_t>(all / (PIECES_A_THREAD * c.threads), 1, panels);
        int64_t parts = (panels + each - 1) / each;
        parallel(parts * int64_t(hit.size()), int(c.threads), [&](int64_t piece, int) {
            int64_t expert = hit[piece / parts], row = begin[expert], panel = piece % parts * each;
            if (stack.multiply(expert, panel, std::min(panel + each, panels), x + row * x_stride,
                               begin[expert + 1] - row, x_stride, out + row * out_stride, out_stride))
                failed = true;
        });
    }

    static void copy(const X* from, float* to, int64_t count) {
        for (int64_t i = 0; i < count; i += LANES) {
            int part = int(std::min<int64_t>(LANES, count - i));
            store_part(to + i, load_part(from + i, part), part);
        }
    }

    // silu(gate) * up, in the place of the gate.
    void activate(float* gate) {
        const float* up = gate + inner;
        V16 one = broadcast(1.0f);
        for (int64_t i = 0; i < inner; i += LANES) {
            int part = int(std::min<int64_t>(LANES, inner - i));
            V16 a = load_part(gate + i, part);
            store_part(gate + i, a / (one + exp(zeros() - a)) * load_part(up + i, part), part);
        }
    }

    void add(int64_t token) {
        const float* weights = c.weights + (first + token) * c.chosen;
        X* out = (X*)c.out + (first + token) * hidden;
        for (int64_t i = 0; i < hidden; i += LANES) {
            int part = int(std::min<int64_t>(LANES, hidden - i));
            V16 sum = zeros();
            for (int64_t k = 0; k < c.chosen; ++k)
                sum = sum + load_part(states + place[token * c.chosen + k] * hidden + i, part) * broadcast(weights[k]);
            if (c.shared) sum = sum + load_part((const X*)c.shared + (first + token) * hidden + i, part);
            store_part(out + i, sum, part);
        }
    }
};

// The best by `score` of those that are not taken, the first among equals; anything beats NaN.
template <class Score, class Taken>
int64_t best_of(int64_t count, Score score, Taken taken) {
    int64_t best = -1;
    float most = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (taken(i)) continue;
        float value = score(i);
        if (best < 0 || value > most || (most != most && value == value)) {
            best = i;
            most = value;
        }
    }
    return best;
}

// scores: memory for 2 padded(experts) + padded(groups) floats; taken: for experts and then groups.
void route(const RouteCall& c, int64_t token, float* scores, bool* taken) {
    const float* logits = c.logits + token * c.experts;
    float *choice = scores + padded(c.experts), *of_group = choice + padded(c.experts);
    bool* group_taken = taken + c.experts;
    V16 one = broadcast(1.0f), peak = broadcast(-INFINITE);
    for (int64_t i = 0; !c.sigmoid && i < c.experts; i += LANES) {
        int part = int(std::min<int64_t>(LANES, c.experts - i));
        peak = max(peak, lanes_or(load_part(logits + i, part), 0, part, peak));
    }
    peak = broadcast(largest(peak));
    V16 sums = zeros();
    for (int64_t i = 0; i < c.experts; i += LANES) {
        int part = int(std::min<int64_t>(LANES, c.experts - i));
        V16 x = load_part(logits + i, part);
        V16 score = c.sigmoid ? one / (one + exp(zeros() - x)) : lanes_or(exp(x - peak), 0, part, zeros());
        sums = sums + score;
        store(scores + i, score);
    }
    V16 total = broadcast(c.sigmoid ? 1.0f : sum(sums));
    for (int64_t i = 0; i < c.experts; i += LANES) {
        int part = int(std::min<int64_t>(LANES, c.experts - i));
        V16 score = load(scores + i) / total;
        store(scores + i, score);
        store(choice + i, c.bias ? score + load_part(c.bias + i, part) : score);
    }
    std::fill_n(taken, c.experts, c.top_groups < c.groups);
    if (c.top_groups < c.groups) {
        int64_t each = c.experts / c.groups;
        for (int64_t g = 0; g < c.groups; ++g) {
            const float* mine = choice + g * each;
            auto score = [&](int64_t i) { return mine[i]; };
            int64_t first = best_of(each, score, [](int64_t) { return false; });
            int64_t second = best_of(each, score, [&](int64_t i) { return i == first; });
            of_group[g] = second < 0 ? mine[first] : mine[first] + mine[second];
            group_taken[g] = false;
        }
        for (int64_t i = 0; i < c.top_groups; ++i) {
            int64_t g = best_of(c.groups, [&](int64_t j) { return of_group[j]; }, [&](int64_t j) { return group_taken[j]; });
            group_taken[g] = true;
            std::fill_n(taken + g * each, each, false);
        }
    }
    int32_t* ids = c.ids + token * c.chosen;
    float *weights = c.weights + token * c.chosen, all = 0;
    for (int64_t k = 0; k < c.chosen; ++k) {
        int64_t e = best_of(c.experts, [&](int64_t i) { return choice[i]; }, [&](int64_t i) { return taken[i]; });
        taken[e] = true;
        ids[k] = int32_t(e);
        weights[k] = scores[e];
        all += scores[e];
    }
    for (int64_t k = 0; k < c.chosen; ++k)
        weights[k] = (c.normalize ? weights[k] / (all + 1e-20f) : weights[k]) * c.scaling;
}

template <class X>
int run_experts(const ExpertsCall& c) {
    for (int64_t first = 0; first < c.tokens; first += CHUNK_TOKENS)
        if (int result = Chunk<X>(c, first, std::min(CHUNK_TOKENS, c.tokens - first)).run()) return result;
    return 0;
}

}  // namespace

// Returns 0, -1 without memory, or -2 if an id is that of no expert.
EXPORT int experts(const ExpertsCall* call) try {
    const ExpertsCall& c = *call;
    for (int64_t i = 0; i < c.tokens * c.chosen; ++i)
        if (c.ids[i] < 0 || c.ids[i] >= c.experts) return -2;
    return c.narrow ? run_experts<bf16>(c) : run_experts<float>(c);
} catch (const std::bad_alloc&) {
    return -1;
}

// Returns 0, or -1 without memory.
EXPORT int route_experts(const RouteCall* call) try {
    const RouteCall& c = *call;
    size_t floats = 2 * padded(c.experts) + padded(c.groups), own = floats + padded((c.experts + c.groups) / 4 + 1);
    float* memory = scratch(1).take<float>(own * c.threads);
    constexpr int64_t TOKENS_A_PIECE = 16;
    parallel((c.tokens + TOKENS_A_PIECE - 1) / TOKENS_A_PIECE, int(c.threads), [&](int64_t piece, int thread) {
        float* mine = memory + own * thread;
        int64_t end = std::min((piece + 1) * TOKENS_A_PIECE, c.tokens);
        for (int64_t token = piece * TOKENS_A_PIECE; token < end; ++token) route(c, token, mine, (bool*)(mine + floats));
    });
    return 0;
} catch (const std::bad_alloc&) {
    return -1;
}
