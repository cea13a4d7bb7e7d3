// Rounding weights to int4 in groups of 32, as `quantize_int4` of packing.py does.

#include <algorithm>

#include "simd.h"
#include "threads.h"

namespace {

constexpr int GROUP = 32;
constexpr int64_t PIECE_GROUPS = 1024;

struct Call {
    const float* weight;  // [groups, 32]
    uint8_t* quants;      // likewise
    uint16_t *scales, *minimums;  // float16 [groups]
    int64_t groups, threads;
};

INLINE float as_half(float x) { return _cvtsh_ss(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

struct Group {
    V16 first, second;

    float total() const { return sum(first + second); }
    Group minus(float x) const { return {first - broadcast(x), second - broadcast(x)}; }
    float dot(const Group& other) const { return sum(fma(first, other.first, second * other.second)); }
};

INLINE V16 rounded(V16 w, float inverse, float minimum) {
    return min(max(nearest((w - broadcast(minimum)) * broadcast(inverse)), zeros()), broadcast(15.0f));
}

struct Fit {
    float scale, minimum, error;
    Group quants;

    Fit(const Group& w, float scale_, float minimum_) : scale(as_half(scale_)), minimum(as_half(minimum_)) {
        float inverse = scale > 0 ? 1 / scale : 0;
        quants = {rounded(w.first, inverse, minimum), rounded(w.second, inverse, minimum)};
        V16 s = broadcast(scale), m = broadcast(minimum);
        Group off{fma(quants.first, s, m) - w.first, fma(quants.second, s, m) - w.second};
        error = off.dot(off);
    }
    // Scale and minimum for these quants that come closest to the weights.
    Fit by_least_squares(const Group& w) const {
        float mean_q = quants.total() / GROUP, mean_w = w.total() / GROUP;
        Group q = quants.minus(mean_q);
        float spread = q.dot(q);
        if (!(spread > 0)) return *this;
        float slope = q.dot(w.minus(mean_w)) / spread;
        if (!(slope > 0)) slope = scale;
        return Fit(w, slope, mean_w - slope * mean_q);
    }
};

INLINE void store_quants(uint8_t* to, V16 q) {
    float values[LANES];
    store(values, q);
    for (int i = 0; i < LANES; ++i) to[i] = uint8_t(values[i]);
}

void quantize_group(const Call& c, int64_t group) {
    Group w{load(c.weight + group * GROUP), load(c.weight + group * GROUP + LANES)};
    float low = -largest(max(zeros() - w.first, zeros() - w.second));
    float high = largest(max(w.first, w.second));
    Fit best(w, (high - low) / 15, low);
    for (float narrower : {0.0f, 0.04f, 0.08f}) {
        float margin = (high - low) * (narrower / 2);
        Fit plain(w, (high - low - 2 * margin) / 15, low + margin), fitted = plain.by_least_squares(w);
        if (plain.error < best.error) best = plain;
        if (fitted.error < best.error) best = fitted;
    }
    store_quants(c.quants + group * GROUP, best.quants.first);
    store_quants(c.quants + group * GROUP + LANES, best.quants.second);
    c.scales[group] = _cvtss_sh(best.scale, _MM_FROUND_TO_NEAREST_INT);
    c.minimums[group] = _cvtss_sh(best.minimum, _MM_FROUND_TO_NEAREST_INT);
}

}  // namespace

EXPORT int quantize_int4(const Call* call) {
    const Call& c = *call;
    parallel((c.groups + PIECE_GROUPS - 1) / PIECE_GROUPS, int(c.threads), [&](int64_t piece, int) {
        int64_t end = std::min(c.groups, (piece + 1) * PIECE_GROUPS);
        for (int64_t group = piece * PIECE_GROUPS; group < end; ++group) quantize_group(c, group);
    });
    return 0;
}
