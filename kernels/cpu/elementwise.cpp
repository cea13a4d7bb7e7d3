// Norms, activations and embeddings, row by row.

#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t PIECE_ELEMENTS = 1 << 12;  // for fewer, waking a thread costs more than it saves

template <class F>
void for_rows(int64_t rows, int64_t width, int64_t threads, F f) {
    int64_t piece = std::max<int64_t>(1, PIECE_ELEMENTS / std::max<int64_t>(1, width));
    parallel((rows + piece - 1) / piece, int(threads), [&](int64_t i, int) {
        for (int64_t row = i * piece; row < std::min((i + 1) * piece, rows); ++row) f(row);
    });
}

template <class T>
INLINE V16 rounded(V16 a) {
    T narrow[LANES];
    store(narrow, a);
    return load(narrow);
}

template <class T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t width, float eps) {
    V16 squares = zeros();
    for (int64_t i = 0; i < width; i += LANES) {
        int part = int(std::min<int64_t>(LANES, width - i));
        V16 a = load_part(x + i, part);
        if (residual) {
            a = rounded<T>(load_part(residual + i, part) + a);
            store_part(residual + i, a, part);
        }
        squares = fma(a, a, squares);
    }
    V16 factor = broadcast(1.0f / std::sqrt(sum(squares) / float(width) + eps));
    const T* from = residual ? residual : x;
    for (int64_t i = 0; i < width; i += LANES) {
        int part = int(std::min<int64_t>(LANES, width - i));
        V16 normalized = rounded<T>(load_part(from + i, part) * factor);
        store_part(out + i, load_part(weight + i, part) * normalized, part);
    }
}

template <class T>
void silu_and_mul(const T* gate, const T* up, T* out, int64_t width) {
    V16 one = broadcast(1.0f);
    for (int64_t i = 0; i < width; i += LANES) {
        int part = int(std::min<int64_t>(LANES, width - i));
        V16 a = load_part(gate + i, part);
        V16 silu = rounded<T>(a / (one + exp(zeros() - a)));
        store_part(out + i, silu * load_part(up + i, part), part);
    }
}

struct NormCall {
    const void* x;
    void* residual;  // or null
    const void* weight;
    void* out;
    int64_t rows, width, threads, narrow;  // narrow: everything is bfloat16
    int64_t heads, stride;  // rows of x side by side, and elements from one such group to the next
    float eps;
};

struct SiluCall {
    const void* gate_up;  // [rows, 2 width]
    void* out;            // [rows, width]
    int64_t rows, width, threads, narrow;
};

struct WidenCall {
    const bf16* x;
    float* out;
    int64_t count, threads;
};

struct EmbeddingCall {
    const int64_t* ids;
    const char* weight;
    char* out;
    int64_t count, vocabulary, row_bytes, threads;
};

template <class T>
void norm_rows(const NormCall& c) {
    for_rows(c.rows, c.width, c.threads, [&](int64_t row) {
        int64_t at = row * c.width;
        T* residual = c.residual ? (T*)c.residual + at : nullptr;
        const T* x = (const T*)c.x + row / c.heads * c.stride + row % c.heads * c.width;
        rms_norm(x, residual, (const T*)c.weight, (T*)c.out + at, c.width, c.eps);
    });
}

template <class T>
void silu_rows(const SiluCall& c) {
    for_rows(c.rows, c.width, c.threads, [&](int64_t row) {
        const T* gate = (const T*)c.gate_up + row * 2 * c.width;
        silu_and_mul(gate, gate + c.width, (T*)c.out + row * c.width, c.width);
    });
}

}  // namespace

// Returns 0, or -2 if an id is not in the vocabulary.
EXPORT int embedding(const EmbeddingCall* call) {
    const EmbeddingCall& c = *call;
    for (int64_t i = 0; i < c.count; ++i)
        if (c.ids[i] < 0 || c.ids[i] >= c.vocabulary) return -2;
    for_rows(c.count, c.row_bytes / 4, c.threads, [&](int64_t row) {
        std::memcpy(c.out + row * c.row_bytes, c.weight + c.ids[row] * c.row_bytes, c.row_bytes);
    });
    return 0;
}

EXPORT int rms_norm(const NormCall* call) {
    call->narrow ? norm_rows<bf16>(*call) : norm_rows<float>(*call);
    return 0;
}

EXPORT int silu_and_mul(const SiluCall* call) {
    call->narrow ? silu_rows<bf16>(*call) : silu_rows<float>(*call);
    return 0;
}

EXPORT int widen(const WidenCall* call) {
    const WidenCall& c = *call;
    parallel((c.count + PIECE_ELEMENTS - 1) / PIECE_ELEMENTS, int(c.threads), [&](int64_t piece, int) {
        int64_t end = std::min((piece + 1) * PIECE_ELEMENTS, c.count), i = piece * PIECE_ELEMENTS;
        for (; i + LANES <= end; i += LANES) store(c.out + i, load(c.x + i));
        if (i < end) store_part(c.out + i, load_part(c.x + i, int(end - i)), int(end - i));
    });
    return 0;
}
