// Sampling, penalties and log probabilities, row by row.
//
// Sampling weights are integers (2**40 for the most likely token), made by correctly rounded float32 operations in
// the order of the torch reference, so that sums have no order and both draw the same token. Tokens are needed in
// falling order of their logits only around four places: the ends of top-k, top-p and min-p, and the token drawn.
// So likely tokens are collected and dealt into buckets by their distance from the best, and only the buckets at
// those places are sorted.

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace {

constexpr float HIGHEST = std::numeric_limits<float>::max();
constexpr float WEIGHT_ONE = float(int64_t(1) << 40);
// Tokens are collected up to these distances from the best, one after the other, until the token drawn is among
// them: the first mostly decides, and beyond the last weights are 0.
constexpr float LIMITS[] = {-5.0f, -10.0f, -28.0f};
constexpr int BUCKETS = 1024;

// Random123's philox4x32-10; the upper 53 bits of the first two words.
double uniform(uint64_t key, uint64_t counter) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c1 = uint32_t(b);
        c3 = uint32_t(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return double((uint64_t(c0) << 21) | (c1 >> 11)) * 0x1p-53;
}

// e**x for -60 <= x <= 0 without fused operations, as the reference has it.
INLINE V16 exp_rounded(V16 x) {
    x = max(x, broadcast(-60.0f));
    V16 power = nearest(x * broadcast(1.44269504f));
    V16 r = x - power * broadcast(0.693359375f);
    r = r - power * broadcast(-2.12194440e-4f);
    V16 y = r * broadcast(1.9875691500e-4f);
    y = (y + broadcast(1.3981999507e-3f)) * r;
    y = (y + broadcast(8.3334519073e-3f)) * r;
    y = (y + broadcast(4.1665795894e-2f)) * r;
    y = (y + broadcast(1.6666665459e-1f)) * r;
    y = (y + broadcast(5.0000001201e-1f)) * (r * r);
    y = (y + r) + broadcast(1.0f);
    return scale_by_power(y, power);
}

// A sum of whole numbers below 2**41, sixteen a time.
class WholeSum {
  public:
#ifdef __AVX512F__
    INLINE void add(V16 a) {
        low_ = _mm512_add_epi64(low_, _mm512_cvttps_epi64(_mm512_castps512_ps256(a.v)));
        high_ = _mm512_add_epi64(high_, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(a.v, 1)));
    }
    int64_t total() const { return _mm512_reduce_add_epi64(_mm512_add_epi64(low_, high_)); }

  private:
    __m512i low_ = _mm512_setzero_si512(), high_ = _mm512_setzero_si512();
#else
    INLINE void add(V16 a) {
        float lanes[LANES];
        store(lanes, a);
        for (float lane : lanes) total_ += int64_t(lane);
    }
    int64_t total() const { return total_; }

  private:
    int64_t total_ = 0;
#endif
};

// A row's logits, and the mask of the tokens that may be drawn, null for all. Those that may not are -inf.
struct Row {
    const float* logits;
    int count;
    const uint32_t* mask;

    float operator[](int i) const { return !mask || mask[i / 32] >> i % 32 & 1 ? logits[i] : -INFINITE; }
    // Sixteen from `i` on, NaN and what lies beyond the end as -inf.
    INLINE V16 sixteen(int i) const { return mask ? sixteen<true>(i) : sixteen<false>(i); }
    // Calls f(i, sixteen(i)) for all.
    template <class F>
    INLINE void each(F f) const {
        mask ? each<true>(f) : each<false>(f);
    }

  private:
    template <bool MASKED>
    INLINE V16 sixteen(int i) const {
        V16 nothing = broadcast(-INFINITE);
        bool whole = i + LANES <= count;
        V16 a = numbers_or(whole ? load(logits + i) : load_part(logits + i, count - i), nothing);
        if constexpr (MASKED) a = bits_or(a, mask[i / 32] >> i % 32, nothing);
        return whole ? a : lanes_or(a, 0, count - i, nothing);
    }
    template <bool MASKED, class F>
    INLINE void each(F f) const {
        for (int i = 0; i < count; i += LANES) f(i, sixteen<MASKED>(i));
    }
};

float highest(const Row& row) {
    V16 most = broadcast(-INFINITE);
    row.each([&](int, V16 a) { most = max(most, a); });
    return largest(most);
}

int first_of(const Row& row, float value) {
    V16 wanted = broadcast(value);
    for (int i = 0; i < row.count; i += LANES)
        if (uint32_t found = at_least(row.sixteen(i), wanted)) return i + __builtin_ctz(found);
    return 0;
}

struct Token {
    float logit, x;  // x: distance of the scaled logit from the best, <= 0
    int id;
    int64_t weight;
};

bool before(const Token& a, const Token& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

struct Parameters {
    float temperature, top_p, log_min_p;
    int top_k;
    double u;
};

class Sampler {
  public:
    int draw(const Row& row, const Parameters& p) {
        float best = highest(row);
        if (p.temperature == 0 || best / p.temperature <= -HIGHEST) return first_of(row, best);
        scale(row, best, p.temperature);
        for (float limit : LIMITS) {
            collect(row, limit);
            int token = choose(p);
            if (token >= 0) return token;
        }
        return first_of(row, best);  // not reached: the last limit leaves nothing out
    }

  private:
    std::vector<Token> tokens_, bucket_;
    std::vector<float> x_;  // distances of all scaled logits from the best, padded with -inf
    int counts_[BUCKETS];
    int64_t weights_[BUCKETS];
    float limit_ = 0;

    void scale(const Row& row, float best, float temperature) {
        V16 divisor = broadcast(temperature), most = broadcast(HIGHEST), least = broadcast(-HIGHEST);
        V16 origin = min(max(broadcast(best) / divisor, least), most);
        x_.resize(padded(row.count));
        row.each([&](int first, V16 logit) {
            V16 x = temperature == 1 ? logit : logit / divisor;
            store(x_.data() + first, min(max(x, least), most) - origin);
        });
    }

    int64_t sum_of_weights() const {
        WholeSum sum;
        for (size_t i = 0; i < x_.size(); i += LANES) sum.add(weights(load(x_.data() + i)));
        return sum.total();
    }

    static V16 weights(V16 x) { return exp_rounded(x) * broadcast(WEIGHT_ONE); }

    // Collects the tokens with x >= limit and counts them in buckets.
    void collect(const Row& row, float limit) {
        V16 bound = broadcast(limit);
        limit_ = limit;
        tokens_.clear();
        std::fill_n(counts_, BUCKETS, 0);
        std::fill_n(weights_, BUCKETS, 0);
        for (int first = 0; first < row.count; first += LANES) {
            V16 x = load(x_.data() + first);
            uint32_t likely = at_least(x, bound);
            if (!likely) continue;
            float weight[LANES];
            store(weight, weights(x));
            for (; likely; likely &= likely - 1) {
                int i = __builtin_ctz(likely);
                Token token{row[first + i], x_[first + i], first + i, int64_t(weight[i])};
                tokens_.push_back(token);
                int b = bucket_of(token.x);
                ++counts_[b];
                weights_[b] += token.weight;
            }
        }
    }

    int bucket_of(float x) const { return int(x * ((BUCKETS - 1) / limit_)); }

    // Walks the tokens in falling order until stop(count, weight), of what came before and the next token together,
    // is true; returns that token and the weight up to and with it, or null.
    template <class Stop>
    const Token* walk(Stop stop, int64_t& weight) {
        int64_t count = 0;
        weight = 0;
        for (int b = 0; b < BUCKETS; ++b) {
            if (!counts_[b]) continue;
            if (!stop(count + counts_[b], weight + weights_[b])) {
                count += counts_[b];
                weight += weights_[b];
                continue;
            }
            bucket_.clear();
            for (const Token& token : tokens_)
                if (bucket_of(token.x) == b) bucket_.push_back(token);
            std::sort(bucket_.begin(), bucket_.end(), before);
            for (const Token& token : bucket_) {
                weight += token.weight;
                if (stop(++count, weight)) return &token;
            }
        }
        return nullptr;
    }

    // The token drawn, or -1 if the tokens collected do not decide it.
    int choose(const Parameters& p) {
        bool complete = limit_ == LIMITS[std::size(LIMITS) - 1];  // no other token has a weight
        // Each filter keeps the tokens up to some place in falling order: the least of the three weights up to
        // there is what all of them keep.
        int64_t total, weight;
        if (p.top_k > 0 && walk([&](int64_t count, int64_t) { return count >= p.top_k; }, weight)) total = weight;
        else if (p.top_k > 0 && !complete) return -1;
        else total = sum_of_weights();
        int64_t kept = total;
        if (p.top_p < 1) {
            double bound = double(p.top_p) * double(total);
            if (walk([&](int64_t, int64_t upto) { return double(upto) >= bound; }, weight))
                kept = std::min(kept, weight);
            else if (!complete) return -1;
        }
        if (p.log_min_p > -INFINITE) {
            int64_t likely = 0;
            for (const Token& token : tokens_)
                if (token.x >= p.log_min_p) likely += token.weight;
            // Tokens that were not collected may be likely enough too, but count only if the others do not decide.
            if (complete || p.log_min_p >= limit_) kept = std::min(kept, likely);
            else if (!p.top_k && p.top_p >= 1) return -1;
        }
        int64_t target = std::min(int64_t(p.u * double(kept)), kept - 1);
        const Token* drawn = walk([&](int64_t, int64_t upto) { return upto > target; }, weight);
        return drawn ? drawn->id : -1;
    }
};

// The `wanted` greatest logits of a row, the lower id first among equals.
void top(const Row& logits, int wanted, float* values, int32_t* ids) {
    if (!wanted) return;
    int found = 0;
    auto insert = [&](float value, int id) {
        int at = found < wanted ? found++ : wanted - 1;
        for (; at > 0 && values[at - 1] < value; --at) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
        }
        values[at] = value;
        ids[at] = id;
    };
    logits.each([&](int first, V16 a) {
        int lanes = std::min(LANES, logits.count - first);
        uint32_t greater = (1u << lanes) - 1;
        if (found == wanted) greater &= above(a, broadcast(values[wanted - 1]));
        if (!greater) return;
        float row[LANES];
        store(row, a);
        for (; greater; greater &= greater - 1) {
            int i = __builtin_ctz(greater);
            if (found < wanted || row[i] > values[wanted - 1]) insert(row[i], first + i);
        }
    });
}

}  // namespace

// All rows lie `stride` elements apart. Functions return 0, or -1 without memory, or -2 if a row or token does not
// exist.

namespace {

struct Logits {
    float* data;
    int64_t stride, rows, vocabulary;

    float* row(int64_t i) const { return data + i * stride; }
    bool has(int64_t row, int64_t token) const { return row >= 0 && row < rows && token >= 0 && token < vocabulary; }
};

struct UniformCall {
    const int64_t *seeds, *positions;
    double* out;
    int64_t count;
};

struct SampleCall {
    Logits logits;
    const float *temperature, *top_p, *log_min_p;
    const int32_t* top_k;
    const int64_t *seeds, *positions;
    int32_t* tokens;
    const int32_t* places;  // [rows]: which mask a row has, negative for none; null if none has one
    const uint32_t* masks;  // [masks, words]
    int64_t words, masks_count, threads;
};

struct ArgmaxCall {
    Logits logits;
    int32_t* tokens;
    int64_t threads;
};

struct LogprobsCall {
    Logits logits;
    const int32_t* tokens;
    float *chosen, *values;  // [rows], [rows, top_n]
    int32_t* ids;            // [rows, top_n]
    int64_t top_n, threads;
};

struct PenaltiesCall {
    Logits logits;
    const int32_t *rows, *tokens, *counts;
    int64_t entries;
    const float *repetition, *frequency, *presence;
};

struct BiasCall {
    Logits logits;
    const int32_t *rows, *tokens;
    const float* values;
    int64_t entries;
};

}  // namespace

EXPORT int counter_uniform(const UniformCall* c) {
    for (int64_t i = 0; i < c->count; ++i) c->out[i] = uniform(c->seeds[i], c->positions[i]);
    return 0;
}

EXPORT int sample(const SampleCall* c) try {
    for (int64_t row = 0; c->places && row < c->logits.rows; ++row)
        if (c->places[row] >= c->masks_count) return -2;
    parallel(c->logits.rows, int(c->threads), [&](int64_t row, int) {
        thread_local Sampler sampler;
        double u = uniform(c->seeds[row], c->positions[row]);
        Parameters p{c->temperature[row], c->top_p[row], c->log_min_p[row], c->top_k[row], u};
        const uint32_t* mask = c->places && c->places[row] >= 0 ? c->masks + c->places[row] * c->words : nullptr;
        c->tokens[row] = sampler.draw({c->logits.row(row), int(c->logits.vocabulary), mask}, p);
    });
    return 0;
} catch (const std::bad_alloc&) {
    return -1;
}

EXPORT int argmax(const ArgmaxCall* c) {
    int count = int(c->logits.vocabulary);
    parallel(c->logits.rows, int(c->threads), [&](int64_t row, int) {
        Row logits{c->logits.row(row), count, nullptr};
        c->tokens[row] = first_of(logits, highest(logits));
    });
    return 0;
}

EXPORT int logprobs(const LogprobsCall* c) {
    int count = int(c->logits.vocabulary);
    for (int64_t row = 0; row < c->logits.rows; ++row)
        if (!c->logits.has(row, c->tokens[row])) return -2;
    parallel(c->logits.rows, int(c->threads), [&](int64_t row, int) {
        Row logits{c->logits.row(row), count, nullptr};
        float best = highest(logits);
        V16 total = zeros(), shift = broadcast(best);
        logits.each([&](int, V16 a) { total = total + exp(a - shift); });
        float log_total = std::log(sum(total)), logit = logits[c->tokens[row]];
        c->chosen[row] = ((logit == logit ? logit : -INFINITE) - best) - log_total;
        float* values = c->values + row * c->top_n;
        top(logits, int(c->top_n), values, c->ids + row * c->top_n);
        for (int64_t i = 0; i < c->top_n; ++i) values[i] = (values[i] - best) - log_total;
    });
    return 0;
}

EXPORT int apply_penalties(const PenaltiesCall* c) {
    for (int64_t i = 0; i < c->entries; ++i) {
        int64_t row = c->rows[i], token = c->tokens[i];
        if (!c->logits.has(row, token)) return -2;
        float& logit = c->logits.row(row)[token];
        float value = logit > 0 ? logit / c->repetition[row] : logit * c->repetition[row];
        value = value - float(c->counts[i]) * c->frequency[row];
        logit = value - (c->counts[i] > 0 ? c->presence[row] : 0.0f);
    }
    return 0;
}

EXPORT int add_bias(const BiasCall* c) {
    for (int64_t i = 0; i < c->entries; ++i) {
        if (!c->logits.has(c->rows[i], c->tokens[i])) return -2;
        c->logits.row(c->rows[i])[c->tokens[i]] += c->values[i];
    }
    return 0;
}
