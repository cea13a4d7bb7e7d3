// Sampling, penalties and log probabilities, row by row.
//
// Sampling weights are integers (2**40 for the most likely token), made by correctly rounded float32 operations in the order of
// the torch reference, so that sums have no order and both draw the same token. Tokens are needed in falling order of their
// logits only around four places: the ends of top-k, top-p and min-p, and the token drawn. So likely tokens are collected
// and dealt into buckets by their distance from the best, and only the buckets at those places are sorted.

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace {

constexpr float HIGHEST = std::numeric_limits<float>::max();
constexpr float WEIGHT_ONE = float(int64_t(1) << 40);
constexpr float LIKELY = -9.0f;   // tokens less likely than e**-9 of the best are rarely asked about
constexpr float FARTHEST = -28.0f; // below, weights are 0
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

// Reads logits sixteen at a time, NaN and what lies beyond the end as -inf: calls f(first index, values).
template <class F>
INLINE void for_logits(const float* logits, int count, F f) {
    V16 nothing = broadcast(-INFINITE);
    int i = 0;
    for (; i + LANES <= count; i += LANES) f(i, numbers_or(load(logits + i), nothing));
    if (i < count) f(i, lanes_or(numbers_or(load_part(logits + i, count - i), nothing), 0, count - i, nothing));
}

float highest(const float* logits, int count) {
    V16 most = broadcast(-INFINITE);
    for_logits(logits, count, [&](int, V16 a) { most = max(most, a); });
    return largest(most);
}

int first_of(const float* logits, int count, float value) {
    V16 wanted = broadcast(value), nothing = broadcast(-INFINITE);
    for (int i = 0; i < count; i += LANES) {
        V16 a = numbers_or(lanes_or(load_part(logits + i, count - i), 0, count - i, nothing), nothing);
        if (uint32_t found = at_least(a, wanted)) return i + __builtin_ctz(found);
    }
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
    int draw(const float* logits, int count, const Parameters& p) {
        float best = highest(logits, count);
        if (p.temperature == 0 || best / p.temperature <= -HIGHEST) return first_of(logits, count, best);
        int64_t all = collect(logits, count, best, p.temperature, LIKELY);
        int token = choose(p, all);
        if (token >= 0) return token;
        collect(logits, count, best, p.temperature, FARTHEST);
        return choose(p, all);
    }

  private:
    std::vector<Token> tokens_, bucket_;
    int counts_[BUCKETS];
    int64_t weights_[BUCKETS];
    float limit_ = 0;

    // Collects the tokens with x >= limit; returns the sum of all weights.
    int64_t collect(const float* logits, int count, float best, float temperature, float limit) {
        V16 scale = broadcast(temperature), most = broadcast(HIGHEST), least = broadcast(-HIGHEST), bound = broadcast(limit);
        V16 origin = min(max(broadcast(best) / scale, least), most);
        WholeSum all;
        tokens_.clear();
        limit_ = limit;
        for_logits(logits, count, [&](int first, V16 logit) {
            V16 x = min(max(logit / scale, least), most) - origin;
            V16 weight = exp_rounded(x) * broadcast(WEIGHT_ONE);
            all.add(weight);
            uint32_t likely = at_least(x, bound);
            if (!likely) return;
            float logit_lanes[LANES], x_lanes[LANES], weight_lanes[LANES];
            store(logit_lanes, logit);
            store(x_lanes, x);
            store(weight_lanes, weight);
            for (; likely; likely &= likely - 1) {
                int i = __builtin_ctz(likely);
                tokens_.push_back({logit_lanes[i], x_lanes[i], first + i, int64_t(weight_lanes[i])});
            }
        });
        std::fill_n(counts_, BUCKETS, 0);
        std::fill_n(weights_, BUCKETS, 0);
        for (const Token& token : tokens_) {
            int b = bucket_of(token.x);
            ++counts_[b];
            weights_[b] += token.weight;
        }
        return all.total();
    }

    int bucket_of(float x) const { return int(x * ((BUCKETS - 1) / limit_)); }

    // Walks the tokens in falling order until stop(count, weight), of what came before and the next token together, is true;
    // returns that token and the weight up to and with it, or null.
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

    // The token drawn, or -1 if the tokens collected do not decide it. `all`: the sum of all weights.
    int choose(const Parameters& p, int64_t all) {
        bool complete = limit_ == FARTHEST;  // no other token has a weight
        // Each filter keeps the tokens up to some place in falling order: the least of the three weights up to there is what
        // all of them keep.
        int64_t total = all, weight;
        if (p.top_k > 0) {
            if (walk([&](int64_t count, int64_t) { return count >= p.top_k; }, weight)) total = weight;
            else if (!complete) return -1;
        }
        int64_t kept = total;
        if (p.top_p < 1) {
            double bound = double(p.top_p) * double(total);
            if (walk([&](int64_t, int64_t upto) { return double(upto) >= bound; }, weight)) kept = std::min(kept, weight);
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
void top(const float* logits, int count, int wanted, float* values, int32_t* ids) {
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
    for_logits(logits, count, [&](int first, V16 a) {
        int lanes = std::min(LANES, count - first);
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

EXPORT void counter_uniform(const int64_t* seeds, const int64_t* positions, double* out, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) out[row] = uniform(seeds[row], positions[row]);
}

// logits: [rows, vocabulary], `stride` elements from row to row.
EXPORT void sample(const float* logits, int64_t stride, int64_t rows, int64_t vocabulary, const float* temperature,
                       const int32_t* top_k, const float* top_p, const float* log_min_p, const int64_t* seeds,
                       const int64_t* positions, int32_t* tokens, int64_t threads) {
    parallel(rows, int(threads), [&](int64_t row, int) {
        thread_local Sampler sampler;
        double u = uniform(seeds[row], positions[row]);
        tokens[row] = sampler.draw(logits + row * stride, int(vocabulary),
                                   {temperature[row], top_p[row], log_min_p[row], top_k[row], u});
    });
}

EXPORT void argmax(const float* logits, int64_t stride, int64_t rows, int64_t vocabulary, int32_t* tokens, int64_t threads) {
    parallel(rows, int(threads), [&](int64_t row, int) {
        const float* line = logits + row * stride;
        tokens[row] = first_of(line, int(vocabulary), highest(line, int(vocabulary)));
    });
}

// values, ids: [rows, top_n]. Returns 0, or -2 if a token is not in the vocabulary.
EXPORT int logprobs(const float* logits, int64_t stride, int64_t rows, int64_t vocabulary, const int32_t* tokens, int64_t top_n,
                        float* chosen, float* values, int32_t* ids, int64_t threads) {
    for (int64_t row = 0; row < rows; ++row)
        if (tokens[row] < 0 || tokens[row] >= vocabulary) return -2;
    parallel(rows, int(threads), [&](int64_t row, int) {
        const float* line = logits + row * stride;
        float most = highest(line, int(vocabulary));
        V16 total = zeros(), shift = broadcast(most);
        for_logits(line, int(vocabulary), [&](int, V16 a) { total = total + exp(a - shift); });
        float log_total = std::log(sum(total)), logit = line[tokens[row]];
        chosen[row] = ((logit == logit ? logit : -INFINITE) - most) - log_total;
        top(line, int(vocabulary), int(top_n), values + row * top_n, ids + row * top_n);
        for (int64_t i = row * top_n; i < (row + 1) * top_n; ++i) values[i] = (values[i] - most) - log_total;
    });
    return 0;
}

// Returns 0, or -2 if an entry is outside of logits.
EXPORT int apply_penalties(float* logits, int64_t stride, int64_t rows, int64_t vocabulary, const int32_t* entry_rows,
                               const int32_t* entry_tokens, const int32_t* counts, int64_t entries, const float* repetition,
                               const float* frequency, const float* presence) {
    for (int64_t i = 0; i < entries; ++i) {
        int64_t row = entry_rows[i], token = entry_tokens[i];
        if (row < 0 || row >= rows || token < 0 || token >= vocabulary) return -2;
        float& logit = logits[row * stride + token];
        float value = logit > 0 ? logit / repetition[row] : logit * repetition[row];
        value = value - float(counts[i]) * frequency[row];
        logit = value - (counts[i] > 0 ? presence[row] : 0.0f);
    }
    return 0;
}

EXPORT int add_bias(float* logits, int64_t stride, int64_t rows, int64_t vocabulary, const int32_t* entry_rows,
                        const int32_t* entry_tokens, const float* values, int64_t entries) {
    for (int64_t i = 0; i < entries; ++i) {
        int64_t row = entry_rows[i], token = entry_tokens[i];
        if (row < 0 || row >= rows || token < 0 || token >= vocabulary) return -2;
        logits[row * stride + token] += values[i];
    }
    return 0;
}
