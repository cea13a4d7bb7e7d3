// The one inner loop of attention and linear layers: a few rows of A times a strip of B, held in registers.
#pragma once

#include <utility>

#include "simd.h"

// Rows of A in a tile, and vectors of 16 columns of B beside each other, so that the sums fill the register file.
constexpr int TILE_ROWS = 6;
#ifdef __AVX512F__
template <int ROWS>
constexpr int TILE_VECTORS = 4;
#else
template <int ROWS>
constexpr int TILE_VECTORS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
#endif

// sums[r][c] = A[r][0] B[0][c] + A[r][1] B[1][c] + …, one after the other. a: row pointers; b(k): the k-th row.
// A sum's order depends neither on ROWS nor on VECTORS.
template <int ROWS, int VECTORS, class B>
INLINE void product(const float* const* a, B b, int depth, V16 (&sums)[ROWS][VECTORS]) {
    const float* rows[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        rows[r] = a[r];
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; ++c) sums[r][c] = zeros();
    }
    for (int k = 0; k < depth; ++k) {
        auto line = b(k);
        V16 strip[VECTORS];
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; ++c) strip[c] = load(line + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            V16 x = broadcast(rows[r][k]);
#pragma GCC unroll 8
            for (int c = 0; c < VECTORS; ++c) sums[r][c] = fma(x, strip[c], sums[r][c]);
        }
    }
}

// Calls f.template operator()<ROWS>(first) for tiles of six rows and one of what is left.
template <class F>
INLINE void for_tiles(int rows, F f) {
    int first = 0;
    for (; first + TILE_ROWS <= rows; first += TILE_ROWS) f.template operator()<TILE_ROWS>(first);
    switch (rows - first) {
        case 1: f.template operator()<1>(first); break;
        case 2: f.template operator()<2>(first); break;
        case 3: f.template operator()<3>(first); break;
        case 4: f.template operator()<4>(first); break;
        case 5: f.template operator()<5>(first); break;
    }
}

// Rows in tiles of at most MOST, of one size, or some one larger than others.
template <int MOST>
struct RowTiles {
    int64_t rows, tiles;

    explicit RowTiles(int64_t rows_) : rows(rows_), tiles((rows_ + MOST - 1) / MOST) {}
    // The first row of a tile, and how many it has.
    int64_t first(int64_t tile) const { return tile * rows / tiles; }
    int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
    // Calls f.template operator()<ROWS>() for the rows that a tile has.
    template <class F>
    INLINE void of_size(int64_t tile, F f) const {
        int64_t count = size(tile);
        [&]<int... LESS>(std::integer_sequence<int, LESS...>) {
            ((count == LESS + 1 ? f.template operator()<LESS + 1>() : void()), ...);
        }(std::make_integer_sequence<int, MOST>());
    }
};

// Sixteen rows of sixteen become sixteen columns: to[c * stride + r] = rows[r][c].
#ifdef __AVX512F__
template <class T>
INLINE void transpose16(const T* const* rows, int column, float* to, int stride) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = load(rows[r] + column).v;
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
        a[r] = _mm512_shuffle_ps(b[r], b[r + 2], 0x44);
        a[r + 1] = _mm512_shuffle_ps(b[r], b[r + 2], 0xee);
        a[r + 2] = _mm512_shuffle_ps(b[r + 1], b[r + 3], 0x44);
        a[r + 3] = _mm512_shuffle_ps(b[r + 1], b[r + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        b[c] = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88);
        b[c + 4] = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
        b[c + 8] = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
        b[c + 12] = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        _mm512_storeu_ps(to + (c + 0) * stride, _mm512_shuffle_f32x4(b[c], b[c + 8], 0x88));
        _mm512_storeu_ps(to + (c + 8) * stride, _mm512_shuffle_f32x4(b[c], b[c + 8], 0xdd));
        _mm512_storeu_ps(to + (c + 4) * stride, _mm512_shuffle_f32x4(b[c + 4], b[c + 12], 0x88));
        _mm512_storeu_ps(to + (c + 12) * stride, _mm512_shuffle_f32x4(b[c + 4], b[c + 12], 0xdd));
    }
}
#else
INLINE __m256 load_half(const float* p) { return _mm256_loadu_ps(p); }
INLINE __m256 load_half(const bf16* p) { return load8(p); }
INLINE __m256 load_half(const int8_t* p) { return load8(p); }
template <class T>
INLINE void transpose8(const T* const* rows, int column, float* to, int stride) {
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) a[r] = load_half(rows[r] + column);
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < 8; r += 4) {
        a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
        a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
        a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
        a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        _mm256_storeu_ps(to + c * stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x20));
        _mm256_storeu_ps(to + (c + 4) * stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x31));
    }
}
template <class T>
INLINE void transpose16(const T* const* rows, int column, float* to, int stride) {
    transpose8(rows, column, to, stride);
    transpose8(rows + 8, column, to + 8, stride);
    transpose8(rows, column + 8, to + 8 * stride, stride);
    transpose8(rows + 8, column + 8, to + 8 * stride + 8, stride);
}
#endif
